// The same attention with a window and, if asked for, sinks: every parameter stays. A sink's score
// that the attention did not have starts so low that it changes next to nothing.
#include "hybrid/grafts/graft_table.h"

namespace cambium {
namespace {

UnitSpec spec(const UnitSpec& attention, const AttentionShape& /*shape*/,
              const GraftOptions& options) {
  UnitSpec unit = attention;
  unit.kind = "sliding_window";
  unit.options.set("window", window_of(attention, options));
  if (options.sinks > 0) {
    unit.options.set("sinks", options.sinks);
  }
  if (options.sink_logits) {
    unit.options.set("sink_logits", true);
  }
  return unit;
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
