#include "ops/rope/rope.h"

#include <algorithm>
#include <cmath>

#include "ops/checks.h"
#include "ops/rope/rope_kernels.h"
#include "ops/rope/rope_ref.h"
#include "ops/run.h"

namespace cambium {
namespace {

/// Positions of a chunk of the table.
constexpr int64_t kChunk = 256;

void check(const RopeConfig& c) {
  expect(c.dim >= 2 && c.dim % 2 == 0 && c.theta > 0 && std::isfinite(c.theta),
         "[rope] expected an even number of rotated dims and theta > 0, got {} and {}", c.dim,
         c.theta);
  expect(c.query_beta == 0.0 || (std::isfinite(c.query_beta) && c.original_length > 0),
         "[rope] expected an original length above 0 beside query_beta, got {} and {}",
         c.original_length, c.query_beta);
  if (c.scaling == RopeScaling::kNone) {
    return;
  }
  expect(c.factor > 0 && std::isfinite(c.factor) && c.original_length > 0 &&
             c.attention_factor > 0 && std::isfinite(c.attention_factor),
         "[rope] expected factor, original length and attention factor above 0, got {}, {} and {}",
         c.factor, c.original_length, c.attention_factor);
  expect(c.scaling != RopeScaling::kLlama3 || c.low_freq_factor < c.high_freq_factor,
         "[rope] expected factor > 0 and low_freq_factor < high_freq_factor, got {}, {} and {}",
         c.factor, c.low_freq_factor, c.high_freq_factor);
  expect(c.scaling != RopeScaling::kYarn || (c.beta_slow > 0 && c.beta_fast > 0 && c.theta > 1),
         "[rope] expected beta_fast and beta_slow above 0 and theta above 1, got {}, {} and {}",
         c.beta_fast, c.beta_slow, c.theta);
  expect(c.scaling != RopeScaling::kDynamic || (c.dim > 2 && c.factor >= 1),
         "[rope] expected more than 2 rotated dims and a factor of at least 1 for dynamic scaling, "
         "got {} and {}",
         c.dim, c.factor);
  if (c.scaling == RopeScaling::kLongRope) {
    for (const std::vector<double>* list : {&c.short_factors, &c.long_factors}) {
      expect(static_cast<int64_t>(list->size()) == c.dim / 2 &&
                 std::all_of(list->begin(), list->end(),
                             [](double x) { return x > 0 && std::isfinite(x); }),
             "[rope] expected {} short and long factors above 0 (one a rotated pair), got {}",
             c.dim / 2, list->size());
    }
  }
}

}  // namespace

RopeTable::RopeTable(const RopeConfig& config) : config_(config) {
  check(config);
  short_.frequency = rope_frequencies(config, 0);
  if (config.scaling == RopeScaling::kLongRope) {
    long_.frequency = rope_frequencies(config, config.original_length + 1);
  }
}

void RopeTable::write_row(const float* frequency, int64_t position, float* cos, float* sin) const {
  for (int64_t i = 0; i < config_.dim / 2; ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(frequency[i]);
    cos[i] = static_cast<float>(std::cos(angle) * config_.attention_factor);
    sin[i] = static_cast<float>(std::sin(angle) * config_.attention_factor);
  }
}

void RopeTable::fill(Rows& rows) const {
  const int64_t half = config_.dim / 2;
  while (static_cast<int64_t>(rows.chunks.size()) * kChunk < positions_) {
    const auto first = static_cast<int64_t>(rows.chunks.size()) * kChunk;
    std::vector<float>& chunk = rows.chunks.emplace_back(static_cast<size_t>(kChunk * 2 * half));
    for (int64_t i = 0; i < kChunk; ++i) {
      float* row = chunk.data() + i * 2 * half;
      write_row(rows.frequency.data(), first + i, row, row + half);
    }
  }
}

void RopeTable::ensure(int64_t positions) {
  if (positions <= positions_) {
    return;
  }
  positions_ = positions;
  fill(short_);
  if (!long_.frequency.empty()) {
    fill(long_);
  }
}

const float* RopeTable::row(const Rows& rows, int64_t position) const {
  return rows.chunks[static_cast<size_t>(position / kChunk)].data() +
         position % kChunk * config_.dim;
}

Turns RopeTable::turns(const Context& ctx, const Segments& segments,
                       std::span<const int32_t> lengths) const {
  CAMBIUM_CHECK(lengths.empty() || static_cast<int64_t>(lengths.size()) == segments.count());
  const int64_t tokens = segments.tokens();
  const int64_t half = config_.dim / 2;
  float* cos = ctx.shared_scratch<float>(tokens * half);
  float* sin = ctx.shared_scratch<float>(tokens * half);
  auto* position = ctx.shared_scratch<int32_t>(tokens);
  auto* frequency = ctx.shared_scratch<const float*>(tokens);
  const bool scales = config_.query_beta != 0.0;
  float* query_scale = scales ? ctx.shared_scratch<float>(tokens) : nullptr;
  int64_t t = 0;
  for (int64_t s = 0; s < segments.count(); ++s) {
    const int64_t first = segments.position[static_cast<size_t>(s)];
    const int64_t end = first + segments.length(s);
    expect(first >= 0 && end <= positions_,
           "[rope] expected positions in [0, {}) (the table), got [{}, {}) in segment {}",
           positions_, first, end, s);
    const int64_t length =
        lengths.empty() ? end : static_cast<int64_t>(lengths[static_cast<size_t>(s)]);
    const bool beyond = length > config_.original_length;
    const Rows& rows = beyond && !long_.frequency.empty() ? long_ : short_;
    const float* turned = rows.frequency.data();
    const bool grown = beyond && config_.scaling == RopeScaling::kDynamic;
    if (grown) {
      const std::vector<float> own = rope_frequencies(config_, length);
      turned = std::copy(own.begin(), own.end(), ctx.shared_scratch<float>(half)) - half;
    }
    for (int64_t p = first; p < end; ++p, ++t) {
      position[t] = static_cast<int32_t>(p);
      frequency[t] = turned;
      if (scales) {
        const int64_t past = p / config_.original_length;
        query_scale[t] =
            static_cast<float>(1.0 + config_.query_beta * std::log1p(static_cast<double>(past)));
      }
      if (grown) {
        write_row(turned, p, cos + t * half, sin + t * half);
      } else {
        const float* from = row(rows, p);
        std::copy(from, from + half, cos + t * half);
        std::copy(from + half, from + 2 * half, sin + t * half);
      }
    }
  }
  const auto count = static_cast<size_t>(tokens * half);
  return {ctx.to_device(std::span<const float>(cos, count)),
          ctx.to_device(std::span<const float>(sin, count)),
          position,
          frequency,
          tokens,
          config_.dim,
          static_cast<float>(config_.attention_factor),
          config_.interleaved,
          scales ? ctx.to_device(std::span<const float>(query_scale, static_cast<size_t>(tokens)))
                 : nullptr,
          config_.query_beta,
          config_.original_length};
}

namespace {

// y[i] = x[i] turned.
void turn_all(Context& ctx, std::span<const Tensor> x, std::span<Tensor> y, const Turns& turns) {
  Tensor in[2];
  Tensor out[2];
  bool recorded = false;
  for (size_t i = 0; i < x.size(); ++i) {
    expect(is_computed(x[i]) && x[i].dtype == x[0].dtype && x[i].rank == 3 && x[i].has_rows(),
           "[rope] expected x (T, H, D) f32 or f64 with contiguous heads, got {}", x[i]);
    expect(turns.dim <= x[i].dim(2),
           "[rope] expected heads of at least {} dims (the rotated ones), got {}", turns.dim, x[i]);
    expect(turns.tokens == x[i].dim(0), "[rope] expected {} tokens (those of the segments), got {}",
           turns.tokens, x[i]);
    y[i] = ctx.result_like(x[i], ctx.differentiate(x[i]));
    recorded = recorded || y[i].has_grad();
    in[i] = x[i];
    out[i] = y[i];
  }
  const auto args = [count = x.size(), a = in[0], b = in[1], to_a = out[0], to_b = out[1],
                     turns]<class T>() {
    const auto of = [&](const Tensor& from, const Tensor& to) {
      return Rope<T>{view<T>(from),  view<T>(to),     turns.dim / 2,   turns.cos,        turns.sin,
                     turns.position, turns.frequency, turns.amplitude, turns.interleaved};
    };
    Ropes<T> all{static_cast<int64_t>(count), {of(a, to_a), {}}};
    if (count > 1) {
      all.each[1] = of(b, to_b);
      all.each[0].scale = turns.query_scale;
      all.each[0].beta = turns.query_beta;
      all.each[0].length = turns.query_length;
    }
    return all;
  };
  run<rope_forward>(ctx, in[0], args);
  if (recorded) {
    const Tensor like = in[0];
    ctx.record({out[0], out[1]}, [=, a = in[0], b = in[1]](const Context& c) {
      const bool set_a = sets_grad(a);
      const bool set_b = sets_grad(b);
      run<rope_backward>(c, like, [=]<class T>() {
        Ropes<T> all = args.template operator()<T>();
        all.each[0].set = set_a;
        all.each[1].set = set_b;
        return all;
      });
    });
  }
}

}  // namespace

Tensor rope(Context& ctx, const Tensor& x, const Turns& turns) {
  Tensor y;
  turn_all(ctx, {&x, 1}, {&y, 1}, turns);
  return y;
}

std::array<Tensor, 2> rope(Context& ctx, const Tensor& q, const Tensor& k, const Turns& turns) {
  const Tensor x[] = {q, k};
  std::array<Tensor, 2> y;
  turn_all(ctx, x, y, turns);
  return y;
}

}  // namespace cambium
