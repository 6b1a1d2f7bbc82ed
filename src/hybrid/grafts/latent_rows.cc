// Latent attention as rows of queries, keys and values (graft_table.h says what of it is exact).
#include <cmath>

#include "hybrid/grafts/graft_table.h"
#include "ops/matmul/matmul.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

/// The sizes of a unit's options.
struct LatentShape {
  explicit LatentShape(const UnitSpec& attention)
      : heads(size(attention, "heads")),
        q_rank(attention.options.integer(attention.kind, "q_rank", 0)),
        rank(size(attention, "kv_rank")),
        nope(size(attention, "nope_dim")),
        rope(size(attention, "rope_dim")),
        value(size(attention, "value_dim")),
        eps(attention.options.real(attention.kind, "norm_eps", 1e-6)) {}

  static int64_t size(const UnitSpec& attention, const char* key) {
    return attention.options.integer(attention.kind, key);
  }

  int64_t heads, q_rank, rank, nope, rope, value;
  double eps;
};

std::vector<float> values_of(const MixerParameters& parameters, const std::string& name) {
  const Parameter& p = *parameters.at(name);
  std::vector<float> out(static_cast<size_t>(p.numel()));
  copy(Tensor::of(Dtype::kF32, Device::kCpu, p.shape, out.data()), p.tensor);
  return out;
}

/// second (N, R) times scale diag(weight) first, the first R rows of `first` (.., C) -> (N, C).
std::vector<float> product(std::vector<float> second, const std::vector<float>& weight,
                           const std::vector<float>& first, double scale, int64_t width) {
  const auto rank = static_cast<int64_t>(weight.size());
  const int64_t rows = static_cast<int64_t>(second.size()) / rank;
  std::vector<float> columns(static_cast<size_t>(width * rank));  // (C, R)
  for (int64_t r = 0; r < rank; ++r) {
    const auto factor = static_cast<float>(scale) * weight[static_cast<size_t>(r)];
    for (int64_t c = 0; c < width; ++c) {
      columns[static_cast<size_t>(c * rank + r)] =
          factor * first[static_cast<size_t>(r * width + c)];
    }
  }
  Workspace workspace;
  const WorkspaceScope scope(workspace);
  Context ctx = workspace.context();
  const Tensor y = matmul(ctx, Tensor::of(second.data(), {rows, rank}),
                          Tensor::of(columns.data(), {width, rank}), {});
  return {y.ptr<float>(), y.ptr<float>() + y.numel()};
}

/// One over the root mean square of a latent whose inputs' channels are independent.
double white(const std::vector<float>& first, int64_t rank, const std::vector<float>& channels,
             double eps) {
  double sum = 0.0;
  for (int64_t i = 0; i < rank * std::ssize(channels); ++i) {
    const double x = static_cast<double>(first[static_cast<size_t>(i)]) *
                     channels[static_cast<size_t>(i) % channels.size()];
    sum += x * x;
  }
  return 1.0 / std::sqrt(sum / static_cast<double>(rank) + eps);
}

void append(std::vector<float>& to, const std::vector<float>& from, int64_t first, int64_t count) {
  to.insert(to.end(), from.begin() + first, from.begin() + first + count);
}

}  // namespace

AttentionWeights read_latent_attention(const UnitSpec& attention, const MixerParameters& parameters,
                                       int64_t width, const LatentScale& scale) {
  const LatentShape s(attention);
  const std::vector<float> shared = values_of(parameters, "kv_a_proj.weight");
  const std::vector<float> q =
      s.q_rank == 0 ? values_of(parameters, "q_proj.weight")
                    : product(values_of(parameters, "q_b_proj.weight"),
                              values_of(parameters, "q_a_norm.weight"),
                              values_of(parameters, "q_a_proj.weight"), scale.q, width);
  const std::vector<float> kv =
      product(values_of(parameters, "kv_b_proj.weight"), values_of(parameters, "kv_a_norm.weight"),
              shared, scale.kv, width);
  AttentionWeights a;
  a.shape = attention_shape(attention, width);
  a.o = values_of(parameters, "o_proj.weight");
  const bool gated = has_gate(attention);
  const std::vector<float> gates =
      gated ? values_of(parameters, "gate_proj.weight") : std::vector<float>{};
  for (int64_t h = 0; h < s.heads; ++h) {
    const int64_t query = h * (s.nope + s.rope) * width;
    append(a.q, q, query + s.nope * width, s.rope * width);
    append(a.q, q, query, s.nope * width);
    const int64_t key = h * (s.nope + s.value) * width;
    append(a.k, shared, s.rank * width, s.rope * width);
    append(a.k, kv, key, s.nope * width);
    append(a.v, kv, key + s.nope * width, s.value * width);
    for (int64_t i = 0; gated && i < s.value; ++i) {
      append(a.gate, gates, h * width, width);
    }
  }
  return a;
}

LatentScale white_latents(const UnitSpec& attention, const MixerParameters& parameters,
                          const std::vector<float>& channels) {
  const LatentShape s(attention);
  const double kv = white(values_of(parameters, "kv_a_proj.weight"), s.rank, channels, s.eps);
  if (s.q_rank == 0) {
    return {.kv = kv};
  }
  return {.q = white(values_of(parameters, "q_a_proj.weight"), s.q_rank, channels, s.eps),
          .kv = kv};
}

LatentScales::LatentScales(const UnitSpec& attention, const MixerParameters& parameters)
    : attention_(attention), parameters_(parameters) {}

double LatentScales::sum_of(Context& ctx, const Tensor& x, const char* projection,
                            int64_t rank) const {
  const Tensor y = matmul(ctx, x, parameters_.at(projection)->tensor, {});
  const double eps = LatentShape(attention_).eps;
  double sum = 0.0;
  for (int64_t t = 0; t < y.dim(0); ++t) {
    double squares = 0.0;
    for (int64_t r = 0; r < rank; ++r) {
      const double value = y.ptr<float>()[t * y.dim(1) + r];
      squares += value * value;
    }
    sum += 1.0 / std::sqrt(squares / static_cast<double>(rank) + eps);
  }
  return sum;
}

void LatentScales::add(Context& ctx, const Tensor& x) {
  const LatentShape s(attention_);
  sums_.kv += sum_of(ctx, x, "kv_a_proj.weight", s.rank);
  if (s.q_rank > 0) {
    sums_.q += sum_of(ctx, x, "q_a_proj.weight", s.q_rank);
  }
  tokens_ += static_cast<double>(x.dim(0));
}

LatentScale LatentScales::mean() const {
  CAMBIUM_CHECK(tokens_ > 0.0);
  return {sums_.q / tokens_, sums_.kv / tokens_};
}

}  // namespace cambium
