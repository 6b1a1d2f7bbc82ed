#include "ops/rope/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "ops/rope/rope_kernels.h"
#include "ops/rope/rope_ref.h"

namespace cambium {
namespace {

// The angle per position of each pair, in fp32 as models were trained with, so that both precisions
// turn by the same angles.
std::vector<float> inverse_frequencies(const RopeConfig& config) {
  std::vector<float> result(static_cast<size_t>(config.dim / 2));
  for (size_t i = 0; i < result.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(config.dim);
    double frequency = static_cast<float>(1.0 / std::pow(config.theta, exponent));
    if (config.factor > 0) {
      // Waves longer than the original context are stretched by the factor, waves much shorter
      // are left, those between are mixed.
      const double turns =
          static_cast<double>(config.original_length) * frequency / (2 * std::numbers::pi);
      const double keep = std::clamp(
          (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor),
          0.0, 1.0);
      frequency = (1 - keep) * frequency / config.factor + keep * frequency;
    }
    result[i] = static_cast<float>(frequency);
  }
  return result;
}

template <class Real>
void rotate_reference(const Tensor& x, const Tensor& y, const int32_t* position,
                      const RopeTable& table, bool inverse, bool accumulate) {
  reference::rotate<Real>(x.row_walk(), y.row_walk(), x.dim(-1), table.config().dim / 2, position,
                          table.cos(x.dtype).ptr<Real>(), table.sin(x.dtype).ptr<Real>(), inverse,
                          accumulate, x.ptr<Real>(), y.ptr<Real>());
}

void turn(bool naive, const Tensor& x, const Tensor& y, const int32_t* position,
          const RopeTable& table, bool inverse, bool accumulate) {
  if (x.dtype == Dtype::kF64) {
    rotate_reference<double>(x, y, position, table, inverse, accumulate);
  } else if (naive) {
    rotate_reference<float>(x, y, position, table, inverse, accumulate);
  } else {
    rotate({x.row_walk(), y.row_walk(), x.dim(-1), table.config().dim / 2, position,
            table.cos(x.dtype).ptr<float>(), table.sin(x.dtype).ptr<float>(), inverse, accumulate,
            x.ptr<float>(), y.ptr<float>()});
  }
}

}  // namespace

RopeTable::RopeTable(const RopeConfig& config) : config_(config) {
  expect(config.dim >= 2 && config.dim % 2 == 0 && config.theta > 0,
         "[rope] expected an even number of rotated dims and theta > 0, got {} and {}", config.dim,
         config.theta);
  expect(config.factor == 0 || (config.factor > 0 && config.original_length > 0 &&
                                config.low_freq_factor < config.high_freq_factor),
         "[rope] expected factor > 0 and low_freq_factor < high_freq_factor, got {}, {} and {}",
         config.factor, config.low_freq_factor, config.high_freq_factor);
}

void RopeTable::ensure(int64_t positions) {
  if (positions <= this->positions()) {
    return;
  }
  const int64_t rows = std::max<int64_t>({positions, 2 * this->positions(), 64});
  const int64_t half = config_.dim / 2;
  const std::vector<float> frequency = inverse_frequencies(config_);
  cos32_ = OwnedTensor(Dtype::kF32, {rows, half});
  sin32_ = OwnedTensor(Dtype::kF32, {rows, half});
  cos64_ = OwnedTensor(Dtype::kF64, {rows, half});
  sin64_ = OwnedTensor(Dtype::kF64, {rows, half});
  int64_t at = 0;
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t i = 0; i < half; ++i, ++at) {
      const double angle =
          static_cast<double>(p) * static_cast<double>(frequency[static_cast<size_t>(i)]);
      cos64_.view.ptr<double>()[at] = std::cos(angle);
      sin64_.view.ptr<double>()[at] = std::sin(angle);
      cos32_.view.ptr<float>()[at] = static_cast<float>(std::cos(angle));
      sin32_.view.ptr<float>()[at] = static_cast<float>(std::sin(angle));
    }
  }
}

Tensor rope(Context& ctx, const Tensor& x, const Segments& segments, const RopeTable& table) {
  require_cpu("rope", x);
  expect((x.dtype == Dtype::kF32 || x.dtype == Dtype::kF64) && x.rank == 3 && x.has_rows(),
         "[rope] expected x (T, H, D) f32 or f64 with contiguous heads, got {}", x.describe());
  expect(table.config().dim <= x.dim(2),
         "[rope] expected heads of at least {} dims (the rotated ones), got {}", table.config().dim,
         x.describe());
  expect(segments.tokens() == x.dim(0), "[rope] expected {} tokens (those of the segments), got {}",
         segments.tokens(), x.describe());
  auto* position =
      static_cast<int32_t*>(ctx.arena->allocate(x.dim(0) * static_cast<int64_t>(sizeof(int32_t))));
  for (int64_t s = 0; s < segments.count(); ++s) {
    const int64_t first = segments.position[static_cast<size_t>(s)];
    const int64_t end = first + segments.length(s);
    expect(first >= 0 && end <= table.positions(),
           "[rope] expected positions in [0, {}) (the table), got [{}, {}) in segment {}",
           table.positions(), first, end, s);
    int32_t* out = position + segments.start[static_cast<size_t>(s)];
    for (int64_t p = first; p < end; ++p) {
      *out++ = static_cast<int32_t>(p);
    }
  }
  const bool differentiate = ctx.differentiate(x);
  const Tensor y = ctx.result_like(x, differentiate);
  turn(ctx.reference, x, y, position, table, false, false);
  if (differentiate) {
    ctx.tape->record([naive = ctx.reference, x, y, position, &table] {
      turn(naive, y.grad_tensor(), x.grad_tensor(), position, table, true, true);
    });
  }
  return y;
}

}  // namespace cambium
