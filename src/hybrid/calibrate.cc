#include "hybrid/calibrate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/signals.h"
#include "hybrid/grafts/graft_table.h"
#include "hybrid/least_squares.h"
#include "nn/units/head_mixer.h"
#include "ops/matmul/matmul.h"
#include "tensor/copy.h"
#include "train/layer_walk.h"

namespace cambium {
namespace {

constexpr int64_t kRows = 64;  // queries of a document whose attention is looked at

/// A group of documents at one layer: what the mixer reads and gives, (T, C) each, on the CPU.
struct Sample {
  const PackedSequence* group = nullptr;
  int64_t layer = 0;
  OwnedTensor input, output;
};

OwnedTensor on_host(const Tensor& t) {
  OwnedTensor host(Dtype::kF32, {t.dim(0), t.dim(1)});
  if (t.dtype == Dtype::kF32 || t.device.kind == Device::kCpu) {
    copy(host.view, t);
  } else {
    const std::vector<float> values = elements_of(t);
    std::copy(values.begin(), values.end(), host.view.ptr<float>());
  }
  return host;
}

/// Walks the teacher over documents and hands out the samples of layers in ascending order.
class Samples {
 public:
  Samples(const HeldOut& documents, Model& teacher)
      : walk_(documents, teacher, nullptr, std::numeric_limits<int64_t>::max()) {
    walk_.load(0, walk_.groups());
  }
  std::vector<Sample> of(int64_t layer) {
    walk_.advance(layer);
    std::vector<Sample> samples;
    walk_.pass([&](const PackedSequence& group, const MixerTap& tap) {
      samples.push_back({&group, layer, on_host(tap.input), on_host(tap.output)});
    });
    return samples;
  }

 private:
  LayerWalk walk_;
};

/// A copy on the CPU, in f32, of a layer's attention.
class HostAttention {
 public:
  HostAttention(Model& teacher, int64_t layer)
      : spec_(*teacher.spec().layers[static_cast<size_t>(layer)].mixer()),
        unit_(make_unit(spec_, teacher.spec().width)),
        scored_(dynamic_cast<ScoredMixer*>(unit_.get())) {
    CAMBIUM_CHECK(scored_ != nullptr, "{}", spec_.kind);
    const MixerParameters from = layer_parameters(teacher, layer);
    unit_->visit([&](const std::string& name, Parameter& p) {
      const Tensor& values = from.at(name)->tensor;
      tensors_.emplace_back(Dtype::kF32, p.shape);
      p.tensor = tensors_.back().view;
      copy(p.tensor, values);
      parameters_[name] = &p;
    });
  }

  const UnitSpec& spec() const { return spec_; }
  Unit& unit() { return *unit_; }
  const MixerParameters& parameters() const { return parameters_; }
  /// The heads of x (T, C) as scores are made of them: q (T, H, K), k (T, Hkv, K).
  ScoredMixer::Scored scored(Context& ctx, const Tensor& x, const UnitInputs& inputs) {
    auto [q, k] = scored_->scored(ctx, x, inputs);
    for (Tensor* rows : {&q, &k}) {
      if (!rows->contiguous()) {
        const Tensor apart =
            ctx.result(rows->dtype, {rows->dim(0), rows->dim(1), rows->dim(2)}, false);
        copy(apart, *rows);
        *rows = apart;
      }
    }
    return {q, k};
  }
  AttentionConfig config() const { return scored_->config(); }

 private:
  const UnitSpec& spec_;
  std::unique_ptr<Unit> unit_;
  ScoredMixer* scored_;
  std::vector<OwnedTensor> tensors_;
  MixerParameters parameters_;
};

/// While it lives, a mixer gives what its last projection reads: (T, channels) in place of (T, C).
class Unprojected {
 public:
  Unprojected(const MixerParameters& mixer, const std::string& projection)
      : weight_(*mixer.at(projection + ".weight")), weight_before_(weight_.tensor) {
    const int64_t channels = weight_.shape[1];
    identity_ = OwnedTensor(Dtype::kF32, {channels, channels});
    for (int64_t i = 0; i < channels; ++i) {
      identity_.view.ptr<float>()[i * channels + i] = 1.0F;
    }
    weight_.tensor = identity_.view;
    if (const auto bias = mixer.find(projection + ".bias"); bias != mixer.end()) {
      bias_ = bias->second;
      bias_before_ = bias_->tensor;
      bias_->tensor = {};
    }
  }
  ~Unprojected() {
    weight_.tensor = weight_before_;
    if (bias_ != nullptr) {
      bias_->tensor = bias_before_;
    }
  }
  Unprojected(const Unprojected&) = delete;
  Unprojected& operator=(const Unprojected&) = delete;

 private:
  Parameter& weight_;
  Tensor weight_before_;
  OwnedTensor identity_;
  Parameter* bias_ = nullptr;
  Tensor bias_before_;
};

/// Root mean square a head of what `rows` (heads D, C) and `bias` give.
class SizeOfHeads {
 public:
  SizeOfHeads(const std::vector<float>& rows, const std::vector<float>& bias, int64_t heads,
              int64_t width)
      : rows_(rows), bias_(bias), width_(width), squares_(static_cast<size_t>(heads)) {}

  void add(Context& ctx, const Tensor& x) {
    const auto count = static_cast<int64_t>(rows_.size()) / width_;
    const Tensor weight = Tensor::of(const_cast<float*>(rows_.data()), {count, width_});
    const Tensor bias =
        bias_.empty() ? Tensor{} : Tensor::of(const_cast<float*>(bias_.data()), {count});
    const Tensor y = matmul(ctx, x, weight, bias);
    const auto heads = static_cast<int64_t>(squares_.size());
    for (int64_t i = 0; i < y.numel(); ++i) {
      const double value = y.ptr<float>()[i];
      squares_[static_cast<size_t>(i % count / (count / heads))] += value * value;
    }
    const int64_t of_a_head = y.numel() / heads;
    numbers_ += static_cast<double>(of_a_head);
  }
  std::vector<float> rms() const {
    std::vector<float> out;
    for (const double s : squares_) {
      out.push_back(static_cast<float>(std::sqrt(s / numbers_)));
    }
    return out;
  }

 private:
  const std::vector<float>& rows_;
  const std::vector<float>& bias_;
  int64_t width_;
  std::vector<double> squares_;
  double numbers_ = 0.0;
};

AttentionStatistics statistics_of(Model& model, HostAttention& attention, const AttentionWeights& a,
                                  const std::vector<Sample>& samples) {
  const AttentionSizes& h = a.shape;
  AttentionRows rows(h.heads);
  SizeOfHeads q_size(a.q, a.q_bias, h.heads, h.width);
  SizeOfHeads k_size(a.k, a.k_bias, h.kv_heads, h.width);
  SizeOfHeads v_size(a.v, a.v_bias, h.kv_heads, h.width);
  std::vector<Tensor> inputs;
  Workspace workspace;
  for (const Sample& s : samples) {
    stop_point();
    const WorkspaceScope scope(workspace);
    Context ctx = workspace.context();
    const Tensor& x = s.input.view;
    const auto [q, k] = attention.scored(
        ctx, x, {&s.group->batch, model.rope_for(ctx, s.group->batch, s.layer), nullptr});
    rows.add(q, k, s.group->batch.segments(), attention.config(), kRows);
    q_size.add(ctx, x);
    k_size.add(ctx, x);
    v_size.add(ctx, x);
    inputs.push_back(x);
  }
  return {.heads = rows.heads(),
          .constant = constant_direction(inputs),
          .q_rms = q_size.rms(),
          .k_rms = k_size.rms(),
          .v_rms = v_size.rms()};
}

LatentScale latent_scale(const HostAttention& attention, const std::vector<Sample>& samples) {
  LatentScales scales(attention.spec(), attention.parameters());
  Workspace workspace;
  for (const Sample& s : samples) {
    stop_point();
    const WorkspaceScope scope(workspace);
    Context ctx = workspace.context();
    scales.add(ctx, s.input.view);
  }
  return scales.mean();
}

/// Scales the columns of out_proj, so that what they add is as near as can be to the attention's.
void scale_output(Model& student, const NewMixer& mixer, Unit& unit, HostAttention& attention,
                  const std::vector<int64_t>& channels, const std::vector<Sample>& samples) {
  constexpr double kLeastCosine = 0.1;
  Parameter& out = mixer.at("out_proj.weight");
  const auto count = static_cast<size_t>(out.shape[1]);
  std::vector<double> yy(count);
  std::vector<double> ya(count);
  std::vector<double> aa(count);
  {
    const Unprojected of_mixer(mixer.parameters(), "out_proj");
    const Unprojected of_attention(attention.parameters(), "o_proj");
    Workspace workspace;
    for (const Sample& s : samples) {
      stop_point();
      const WorkspaceScope scope(workspace);
      Context ctx = workspace.context();
      const UnitInputs inputs{&s.group->batch, student.rope_for(ctx, s.group->batch, s.layer),
                              nullptr};
      const Tensor y = unit.forward(ctx, s.input.view, inputs);
      const Tensor a = attention.unit().forward(ctx, s.input.view, inputs);
      for (int64_t t = 0; t < y.dim(0); ++t) {
        const float* y_row = y.ptr<float>() + t * y.dim(1);
        const float* a_row = a.ptr<float>() + t * a.dim(1);
        for (size_t i = 0; i < count; ++i) {
          const double from = y_row[i];
          const double to = a_row[channels.empty() ? i : static_cast<size_t>(channels[i])];
          yy[i] += from * from;
          ya[i] += from * to;
          aa[i] += to * to;
        }
      }
    }
  }
  for (int64_t i = 0; i < out.numel(); ++i) {
    const auto c = static_cast<size_t>(i) % count;
    if (yy[c] > 0.0 && aa[c] > 0.0) {
      const double cosine = ya[c] / std::sqrt(yy[c] * aa[c]);
      out.tensor.ptr<float>()[i] *=
          static_cast<float>(std::sqrt(aa[c] / yy[c]) * std::max(cosine, kLeastCosine));
    }
  }
}

/// Then the rest of out_proj: what of the errors that are left its inputs explain.
void solve_output(Model& student, const NewMixer& mixer, Unit& unit,
                  const std::vector<Sample>& samples) {
  constexpr double kRidge = 0.1;
  Parameter& out = mixer.at("out_proj.weight");
  const OwnedTensor gram(Dtype::kF32, {out.shape[1], out.shape[1]});
  const OwnedTensor cross(Dtype::kF32, {out.shape[0], out.shape[1]});
  const Tensor weight = out.tensor;
  const auto found = mixer.parameters().find("out_proj.bias");
  const Tensor bias = found == mixer.parameters().end() ? Tensor{} : found->second->tensor;
  const Unprojected of_mixer(mixer.parameters(), "out_proj");
  Workspace workspace;
  for (const Sample& s : samples) {
    stop_point();
    const WorkspaceScope scope(workspace);
    Context ctx = workspace.context();
    const UnitInputs inputs{&s.group->batch, student.rope_for(ctx, s.group->batch, s.layer),
                            nullptr};
    const Tensor y = unit.forward(ctx, s.input.view, inputs);
    const Tensor error = matmul(ctx, y, weight, bias);
    const float* target = s.output.view.ptr<float>();
    for (int64_t i = 0; i < error.numel(); ++i) {
      error.ptr<float>()[i] = target[i] - error.ptr<float>()[i];
    }
    matmul_grad_weight(ctx, gram.view, y, y, true);
    matmul_grad_weight(ctx, cross.view, error, y, true);
  }
  add_ridge_solution(weight, gram.view, cross.view, kRidge);
}

/// Sums of a MixerAgreement.
class AgreementSums {
 public:
  void add(const Tensor& out, const Tensor& target) {
    const int64_t width = target.dim(1);
    mean_.resize(static_cast<size_t>(width));
    for (int64_t t = 0; t < target.dim(0); ++t) {
      const float* o = out.ptr<float>() + t * width;
      const float* a = target.ptr<float>() + t * width;
      double oo = 0.0;
      double aa = 0.0;
      double oa = 0.0;
      double wrong = 0.0;
      for (int64_t c = 0; c < width; ++c) {
        const double x = o[c];
        const double y = a[c];
        oo += x * x;
        aa += y * y;
        oa += x * y;
        wrong += (x - y) * (x - y);
        mean_[static_cast<size_t>(c)] += y;
      }
      squares_ += aa;
      wrong_ += wrong;
      cosine_ += oo > 0.0 && aa > 0.0 ? oa / std::sqrt(oo * aa) : 0.0;
      error_ += std::sqrt(wrong / static_cast<double>(width));
      tokens_ += 1.0;
    }
  }
  MixerAgreement result() const {
    double about_mean = squares_;
    for (const double m : mean_) {
      about_mean -= m * m / tokens_;
    }
    return {about_mean > 0.0 ? 1.0 - wrong_ / about_mean : 0.0, cosine_ / tokens_,
            error_ / tokens_};
  }

 private:
  std::vector<double> mean_;
  double squares_ = 0.0, wrong_ = 0.0, cosine_ = 0.0, error_ = 0.0, tokens_ = 0.0;
};

MixerAgreement agreement(Model& student, Unit& unit, const std::vector<Sample>& samples) {
  AgreementSums sums;
  Workspace workspace;
  for (const Sample& s : samples) {
    stop_point();
    const WorkspaceScope scope(workspace);
    Context ctx = workspace.context();
    const UnitInputs inputs{&s.group->batch, student.rope_for(ctx, s.group->batch, s.layer),
                            nullptr};
    sums.add(unit.forward(ctx, s.input.view, inputs), s.output.view);
  }
  return sums.result();
}

std::vector<size_t> ascending(const std::vector<int64_t>& layers) {
  std::vector<size_t> order(layers.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return layers[a] < layers[b]; });
  return order;
}

int64_t checked_documents(const GraftOptions& options) {
  return std::max<int64_t>(4, options.calibrate / 4);
}

int64_t first_checked(const DocumentSource& valid, bool one_file, const GraftOptions& options) {
  const bool others = valid.size() <= 0 || valid.size() > options.calibrate;
  return one_file && others ? options.calibrate : 0;
}

}  // namespace

CalibrationData::CalibrationData(const DocumentSource& train, const DocumentSource& valid,
                                 bool one_file, const GraftOptions& options)
    : fitted(train, options.calibrate, options.calibrate_tokens),
      checked(valid, checked_documents(options), options.calibrate_tokens,
              first_checked(valid, one_file, options)) {}

std::vector<LayerCalibration> calibrate(Model& student, Model& teacher,
                                        const std::vector<int64_t>& layers,
                                        const GraftOptions& options, const CalibrationData& data) {
  const Graft& graft = find_graft(options.mixer);
  Samples fitted(data.fitted, teacher);
  Samples checked(data.checked, teacher);
  std::vector<LayerCalibration> out(layers.size());
  Progress progress("calibrate", layers.size(), {.unit = "layers"});
  uint64_t done = 0;
  for (const size_t at : ascending(layers)) {
    const int64_t layer = layers[at];
    const UnitSpec& spec = *student.spec().layers[static_cast<size_t>(layer)].mixer();
    Unit& unit = *student.layer(layer).mixer();
    const NewMixer mixer(spec, layer_parameters(student, layer));
    HostAttention attention(teacher, layer);
    const std::vector<Sample> samples = fitted.of(layer);
    const bool latent = attention.spec().kind == "latent_attention";
    const AttentionWeights from =
        read_attention(teacher, layer, graft,
                       latent ? std::optional(latent_scale(attention, samples)) : std::nullopt);
    const std::vector<Sample> others = checked.of(layer);
    LayerCalibration& found = out[at];
    found.layer = layer;
    const AttentionStatistics statistics = statistics_of(teacher, attention, from, samples);
    found.heads = statistics.heads;
    found.start = agreement(student, unit, others);
    if (graft.calibrate != nullptr) {
      if (latent) {
        graft.start(mixer, from, options);  // once more, with what its norms were measured to do
      }
      graft.calibrate(mixer, from, statistics);
      const std::vector<int64_t> channels = graft.output_channels == nullptr
                                                ? std::vector<int64_t>{}
                                                : graft.output_channels(spec, from.shape);
      scale_output(student, mixer, unit, attention, channels, samples);
      solve_output(student, mixer, unit, samples);
      for (const HeadStatistics& head : statistics.heads) {
        found.half_lives.push_back(half_life(head));
      }
    }
    found.calibrated = agreement(student, unit, others);
    progress.update(++done);
  }
  progress.finish();
  return out;
}

std::vector<MixerAgreement> measure_mixers(Model& student, Model& teacher,
                                           const std::vector<int64_t>& layers,
                                           const HeldOut& documents) {
  LayerWalk walk(documents, teacher, nullptr, std::numeric_limits<int64_t>::max());
  walk.load(0, walk.groups());
  std::vector<MixerAgreement> out(layers.size());
  Workspace workspace(student.device());
  for (const size_t at : ascending(layers)) {
    AgreementSums sums;
    walk.advance(layers[at]);
    walk.pass([&](const PackedSequence& group, const MixerTap& tap) {
      const WorkspaceScope scope(workspace);
      Context ctx = context_for(student, workspace);
      const UnitInputs inputs{&group.batch, student.rope_for(ctx, group.batch, layers[at]),
                              nullptr};
      const Tensor y = student.layer(layers[at]).mixer()->forward(ctx, tap.input, inputs);
      sums.add(on_host(y).view, on_host(tap.output).view);
    });
    out[at] = sums.result();
  }
  return out;
}

TrainConfig fit_config(int64_t steps, const std::vector<int64_t>& layers, uint64_t seed) {
  TrainConfig config;
  config.objective = Objective::kAlign;
  config.loss = {};
  config.align.layers = layers;
  config.align.all_tokens = true;
  config.steps = steps;
  config.sequence_length = 1024;
  config.seed = seed;
  config.schedule = {.peak = 2e-3, .warmup_steps = 10, .decay = Decay::kCosine, .final_ratio = 0.1};
  config.checkpoint_every = 50;
  config.label = "fit";
  return config;
}

}  // namespace cambium
