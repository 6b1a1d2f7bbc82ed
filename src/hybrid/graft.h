// The graft itself: which mixer takes an attention layer's place, and what of the attention's
// weights it starts from.
//
// What is replaced is the layer's attention (LayerSpec::mixer); mixers that stand beside it, as in
// Falcon-H1, stay with their weights and factors.
//
// Sources: Apriel-H1's "MIL" (q, k, v, o -> C, B, x, out; Wang et al. 2024, arXiv 2408.15237) and
// the "DIL" of its successors for Gated DeltaNet. `faithful` reproduces the released layouts to the
// row; without it the same rows are paired head by head as grouped-query attention paired them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/weights.h"

namespace cambium {

/// What a person may choose of the new mixers; everything else follows from the attention they
/// replace.
struct GraftOptions {
  std::string mixer = "mamba";  // one of graft_mixers()
  /// A supernet: other mixers that each layer may choose beside its attention and `mixer`.
  std::vector<std::string> beside{};
  int64_t window = 0;           // sliding_window, parallel: tokens; 0 = 128
  int64_t sinks = 0;            // sliding_window, parallel: first tokens that stay visible
  bool sink_logits = false;     // the same: each head gets a sink's learned score without a value
  int64_t state = 0;            // mamba: numbers a channel; 0 = 16, or what divides the head
  std::string recurrent{};      // parallel: the mixer beside the window; empty = gated_delta_net
  double window_dropout = 0.0;  // parallel: share of documents trained without their window
  double window_share = 0.98;   // parallel: the window's of what heads give, at the start
  bool from_attention = true;   // false: random
  bool faithful = false;
  bool rope = true;  // q and k turn by position where those of the attention do
  /// Documents that the start is calibrated by (hybrid/calibrate.h), and tokens of each at most; no
  /// documents: it is not.
  int64_t calibrate = 0;
  int64_t calibrate_tokens = 512;
  /// Steps of fitting the new mixers to their attention; -1 = kFitSteps where the start is
  /// calibrated, else none.
  int64_t fit = -1;

  static constexpr int64_t kFitSteps = 300;
  int64_t fit_steps() const { return fit >= 0 ? fit : calibrate > 0 ? kFitSteps : 0; }
  friend bool operator==(const GraftOptions&, const GraftOptions&) = default;
};

/// What can take the place of attention, by name.
std::vector<std::string> graft_mixers();

/// Error for a mixer that cannot take the place of attention and for options that the chosen one
/// does not know.
void check_graft_options(const GraftOptions& options, const std::string& where);

/// A supernet's mixers: one for `mixer` and one for each of `beside`, with nothing beside them and
/// the options that it knows. Error, by `where`, for options that none of them knows, as
/// check_graft_options has it.
std::vector<GraftOptions> grafts_of(const GraftOptions& options, const std::string& where);

/// The mixer of `options` for a model of this width in place of the attention `from`.
/// Error where that cannot be, naming why.
UnitSpec graft_spec(const UnitSpec& from, int64_t width, const GraftOptions& options);

/// Starts the mixer of `layer` in `student` from the same layer's attention in `teacher`.
/// Parameters with no counterpart take their initial rule from (seed, name).
void graft_layer(Model& student, Model& teacher, int64_t layer, const GraftOptions& options,
                 uint64_t seed);

struct CalibrationData;
struct LayerCalibration;

/// A hybrid: `base` (the teacher itself or an earlier hybrid) with the mixers of `layers` replaced.
/// New mixers start from `teacher`, the original; every other weight comes from `base`. They are
/// made on the CPU; the hybrid is on the device of `base`.
/// Errors: a layer out of range, given twice, or that has no attention any more.
/// With `share`, all but the new mixers is base's own memory: base must outlive the result, or the
/// result take over what base owns (Weights::take_over).
/// With `calibration` the new mixers are calibrated by it, and `found` says what was found.
LoadedModel convert(Model& base, Model& teacher, const std::vector<int64_t>& layers,
                    const GraftOptions& options, uint64_t seed, bool share = false,
                    const CalibrationData* calibration = nullptr,
                    std::vector<LayerCalibration>* found = nullptr);

/// `base` whose attention in `layers` sees the last `window` tokens and the first `sinks` of the
/// text. All weights are base's own memory, as they are stored there: base must outlive the result.
/// Errors as convert.
LoadedModel view_windows(Model& base, const std::vector<int64_t>& layers, int64_t window,
                         int64_t sinks);

/// The spec `convert` builds, without weights.
ModelSpec convert_spec(const ModelSpec& base, const ModelSpec& teacher,
                       const std::vector<int64_t>& layers, const GraftOptions& options);

/// The layer without its mixer (LayerSpec::mixer) or all that it could choose for it: the
/// branch stays, so that the other parameters keep their names, with the mixers beside it and what
/// it makes of the residual (MiniMax's); what normed an output that is no longer there goes.
void take_mixer_out(LayerSpec& layer);

/// `base` with the mixer of `layer` removed, or the whole layer with `whole_block`: for
/// leave-one-out.
LoadedModel remove_layer(Model& base, int64_t layer, bool whole_block);

}  // namespace cambium
