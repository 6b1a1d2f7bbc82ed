// A calibrated start: the new mixers begin by what their attention does with texts, not by its
// weights alone. The teacher runs over some documents, layer by layer; of each layer to be
// converted
//
//   1. its heads' look-back distance and concentration are measured (attention_statistics.h), and
//      the graft's row sets decay, gates and sizes by them (grafts/graft_table.h); rows of latent
//      attention start by what the norms of its latents do (LatentScale),
//   2. every channel that out_proj reads is scaled to the attention's: the new mixer's y and the
//      attention's a of the same inputs give the factor rms(a) / rms(y) times the larger of their
//      cosine (least squares) and a tenth, so that no channel starts closed,
//   3. out_proj is changed by ridge regression towards the attention's outputs.
//
// 1 is "Taylor-Calibrate", whose output gate of 1 % of the values is replaced by one that is open:
// the constant direction of the layer's inputs (least_squares.h) serves as the gate's bias. Step 3
// wants some times more tokens than out_proj has inputs. All of it is computed on the CPU, from the
// inputs that the teacher's device gives.
#pragma once

#include "base/progress.h"
#include "hybrid/attention_statistics.h"
#include "hybrid/graft.h"
#include "train/held_out.h"
#include "train/trainer.h"

namespace cambium {

/// Documents of a calibration: those it measures, and others on which it is judged.
struct CalibrationData {
  /// The first `options.calibrate` of `train`, and up to a quarter as many, at least 4, of `valid`;
  /// where both are one file, of those after. Where there are none after, the same ones.
  CalibrationData(const DocumentSource& train, const DocumentSource& valid, bool one_file,
                  const GraftOptions& options);

  HeldOut fitted;
  HeldOut checked;
};

/// How near a mixer's outputs are to the attention's, over the tokens of some documents, each mixer
/// given the teacher's own inputs.
struct MixerAgreement {
  double explained = 0.0;  // R^2: 1 - sum |o_T - o_S|^2 / sum |o_T - mean o_T|^2
  double cosine = 0.0;     // mean of a token's
  double error = 0.0;      // mean ||o_T - o_S|| / sqrt(C): the loss of the objective align
};

struct LayerCalibration {
  int64_t layer = 0;
  std::vector<HeadStatistics> heads;
  std::vector<double> half_lives;  // tokens, of the heads; empty where nothing is calibrated
  MixerAgreement start;            // as the graft alone starts it
  MixerAgreement calibrated;
};

/// Calibrates the mixers of `layers` in `student`, which graft_layer has started and which are on
/// the CPU. In the order of `layers`.
std::vector<LayerCalibration> calibrate(Model& student, Model& teacher,
                                        const std::vector<int64_t>& layers,
                                        const GraftOptions& options, const CalibrationData& data);

/// Of the mixers of `layers` of a student on the teacher's device, in their order.
std::vector<MixerAgreement> measure_mixers(Model& student, Model& teacher,
                                           const std::vector<int64_t>& layers,
                                           const HeldOut& documents);

/// The training that follows: objective align, all tokens, of the new mixers of `layers` alone.
TrainConfig fit_config(int64_t steps, const std::vector<int64_t>& layers, uint64_t seed);

/// A table for people: a line a layer. `fitted` may be empty: no fit was made.
std::string describe_calibration(const std::vector<LayerCalibration>& layers,
                                 const std::vector<MixerAgreement>& fitted);
/// The same as JSON, for files.
std::string calibration_json(const std::vector<LayerCalibration>& layers,
                             const std::vector<MixerAgreement>& fitted);

}  // namespace cambium
