// The same attention with a window and, if asked for, sinks: every parameter stays, but those of an
// index of latent attention, as a window needs no choice. A sink's score that the attention did not
// have starts so low that it changes next to nothing.
#include "hybrid/grafts/graft_table.h"

namespace cambium {
namespace {

UnitSpec spec(const UnitSpec& attention, const AttentionSizes& /*shape*/,
              const GraftOptions& options) {
  return windowed(attention, "sliding_window", options);
}

}  // namespace

Graft sliding_window_graft() {
  return {.mixer = "sliding_window",
          .options = {"window", "sinks", "sink_logits"},
          .released_as = "",
          .spec = spec,
          .start = nullptr,
          .keeps_parameters = true};
}

}  // namespace cambium
