// Apriel-H1's "MIL": q, k, v, o -> C, B, x, out (Wang et al. 2024, arXiv 2408.15237). B is as wide
// as x: of wider keys those dims are taken that have no positions (Graft::cuts_keys). The gate of
// an attention's output becomes z, by a sigmoid.
#include <algorithm>
#include <tuple>

#include "hybrid/grafts/graft_table.h"

namespace cambium {
namespace {

constexpr double kStep = 0.1;
constexpr double kSmall = 0.1;

UnitSpec spec(const UnitSpec& attention, const AttentionSizes& h, const GraftOptions& options) {
  check_gate(attention, "mamba", options.faithful ? GatePlace::kNone : GatePlace::kWeightAndBias);
  expect(h.value_dim <= h.dim,
         "mamba cannot take the place of attention whose values ({}) are wider than its keys ({}); "
         "choose gated_delta_net, kimi_delta, mamba2 or lightning",
         h.value_dim, h.dim);
  int64_t state = options.state > 0 ? options.state : 16;
  if (options.state == 0) {
    while (h.value_dim % state != 0) {
      --state;
    }
  }
  expect(h.value_dim % state == 0,
         "mamba: expected the state to divide the attention's head_dim {}, got {}", h.value_dim,
         state);
  UnitSpec unit{"mamba",
                {{"inner", h.heads * h.value_dim},
                 {"xb", h.kv_heads * h.value_dim},
                 {"state", state},
                 {"dt_rank", (h.width + 15) / 16},
                 {"conv", int64_t{4}},
                 {"repeat_before_conv", true},
                 {"conv_bias", true}}};
  if (has_gate(attention)) {
    unit.options.set("out_gate", std::string("sigmoid"));
  }
  // B and C pass no convolution whose bias could hold theirs.
  ask_for_biases(unit, attention, "in_bias");
  return unit;
}

// Scan head j reads group j / share of B and x: slice s of key-value head k. Giving it slice s of
// query head k * share + m pairs the same dimensions that the attention's dot product paired. Its n
// channels and those of C are then so many of the attention's from here on.
int64_t first_channel(int64_t j, int64_t n, const AttentionSizes& h) {
  const int64_t slices = h.dim / n;
  const int64_t group = j / h.share();
  const int64_t query = group / slices * h.share() + j % h.share();
  return query * h.dim + group % slices * n;
}

std::vector<int64_t> output_channels(const UnitSpec& mixer, const AttentionSizes& h) {
  const int64_t n = mixer.options.integer("mamba", "state");
  std::vector<int64_t> channels;
  for (int64_t i = 0; i < h.heads * h.dim; ++i) {
    channels.push_back(first_channel(i / n, n, h) + i % n);
  }
  return channels;
}

void start(const NewMixer& mixer, const AttentionWeights& a, const GraftOptions& options) {
  const AttentionSizes& h = a.shape;
  const int64_t inner = mixer.spec().options.integer("mamba", "inner");
  const int64_t n = mixer.spec().options.integer("mamba", "state");
  const bool biased = !a.q_bias.empty();
  put_output(mixer, a);
  mixer.put("in_proj.weight", "x", a.v);
  mixer.put("in_proj.weight", "B", a.k);
  mixer.put("in_proj.weight", "C", a.q);
  if (biased) {
    mixer.put("in_proj.bias", "x", a.v_bias);
    mixer.put("in_proj.bias", "B", a.k_bias);
    mixer.put("in_proj.bias", "C", a.q_bias);
  }
  if (options.faithful) {
    return;
  }
  float* out = mixer.values("out_proj.weight");
  // C of the attention's queries, z of its gate: the block's row that a channel's is.
  const auto put_row = [&](const char* block, int64_t to, const std::vector<float>& rows,
                           const std::vector<float>& bias, int64_t from) {
    std::copy_n(rows.begin() + from * h.width, h.width, mixer.row("in_proj.weight", block, to));
    if (biased) {
      *mixer.row("in_proj.bias", block, to) = bias[static_cast<size_t>(from)];
    }
  };
  for (int64_t j = 0; j < inner / n; ++j) {
    const int64_t first = first_channel(j, n, h);
    for (int64_t i = 0; i < n; ++i) {
      put_row("C", j * n + i, a.q, a.q_bias, first + i);
      if (!a.gate.empty()) {
        put_row("z", j * n + i, a.gate, a.gate_bias, first + i);
      }
      for (int64_t c = 0; c < h.width; ++c) {
        out[c * inner + j * n + i] = a.o[static_cast<size_t>(c * inner + first + i)];
      }
    }
  }
  pass_through(mixer.at("conv1d.weight"), 1.0F);
  // The bias acts twice: half of it each time gives steps of the range it was drawn for.
  float* bias = mixer.values("dt_proj.bias");
  for (int64_t c = 0; c < inner; ++c) {
    bias[c] *= 0.5F;
  }
}

// Values small, so that the SiLU after the convolution halves them and does little else. A gate
// that the attention has not is open, nothing passes the state by, and the step hardly goes with
// the token.
void calibrate(const NewMixer& mixer, const AttentionWeights& a, const AttentionStatistics& s) {
  const AttentionSizes& h = a.shape;
  const int64_t n = mixer.spec().options.integer("mamba", "state");
  for (const auto& [block, rms, size] :
       {std::tuple{"B", &s.k_rms, 1.0}, std::tuple{"x", &s.v_rms, kSmall}}) {
    resize_heads(mixer, a, "in_proj.bias", block, *rms, size);
  }
  if (a.gate.empty()) {
    mixer.put_multiples("in_proj.weight", "z", {kOpenGate}, s.constant);
  }
  float* bias = mixer.values("dt_proj.bias");
  float* rates = mixer.values("A_log");
  const std::vector<float> of_heads = calibrated_log_rates(s, kStep);
  for (int64_t i = 0; i < h.heads * h.dim; ++i) {
    bias[i] = 0.5F * inverse_softplus(kStep);  // it acts twice
    const int64_t head = (first_channel(i / n, n, h) + i % n) / h.dim;
    std::fill_n(rates + i * n, n, of_heads[static_cast<size_t>(head)]);
  }
  Parameter& low_rank = mixer.at("dt_proj.weight");
  for (int64_t i = 0; i < low_rank.numel(); ++i) {
    low_rank.tensor.ptr<float>()[i] *= 0.1F;
  }
  std::fill_n(mixer.values("D"), h.heads * h.dim, 0.0F);
}

}  // namespace

Graft mamba_graft() {
  return {.mixer = "mamba",
          .options = {"state", "faithful"},
          .released_as = "apriel_h",
          .spec = spec,
          .start = start,
          .cuts_keys = true,
          .calibrate = calibrate,
          .output_channels = output_channels};
}

}  // namespace cambium
