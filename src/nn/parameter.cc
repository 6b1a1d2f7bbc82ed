#include "nn/parameter.h"

#include <algorithm>
#include <cmath>

#include "base/random.h"

namespace cambium {
namespace {

// FNV-1a: a stream number from a name that does not depend on the platform.
uint64_t stream_of(const std::string& name) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const char c : name) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  }
  return hash;
}

}  // namespace

const char* parameter_group_name(ParameterGroup group) {
  constexpr const char* kNames[] = {"mixer", "feed_forward", "norm", "embedding"};
  return kNames[static_cast<int>(group)];
}

RowRange rows_of(const Parameter& parameter, std::string_view first, std::string_view last) {
  last = last.empty() ? first : last;
  RowRange range{-1, 0};
  int64_t row = 0;
  for (const RowBlock& block : parameter.blocks) {
    if (block.name == first) {
      range.begin = row;
    }
    row += block.rows;
    if (block.name == last && range.begin >= 0) {
      range.count = row - range.begin;
      return range;
    }
  }
  CAMBIUM_CHECK(false, "no rows {} to {}", first, last);
  return range;
}

Tensor part(const Tensor& y, const Parameter& weight, std::string_view first,
            std::string_view last) {
  const RowRange rows = rows_of(weight, first, last);
  return y.slice(y.rank - 1, rows.begin, rows.count);
}

void initialise(Parameter& parameter, const std::string& name, uint64_t seed) {
  float* w = parameter.tensor.ptr<float>();
  const int64_t n = parameter.numel();
  const int64_t last = parameter.shape.back();
  const double scale = parameter.init.scale;
  Rng random(seed, stream_of(name));
  for (int64_t i = 0; i < n; ++i) {
    switch (parameter.init.kind) {
      case InitKind::kZeros:
        w[i] = 0.0F;
        break;
      case InitKind::kOnes:
        w[i] = 1.0F;
        break;
      case InitKind::kConstant:
        w[i] = static_cast<float>(scale);
        break;
      case InitKind::kNormal:
        w[i] = static_cast<float>(scale) * random.normal();
        break;
      case InitKind::kUniform:
        w[i] = static_cast<float>(scale * (2.0 * random.uniform() - 1.0));
        break;
      case InitKind::kLogRange:
        w[i] = static_cast<float>(std::log(static_cast<double>(i % last + 1)));
        break;
      case InitKind::kLogUniform:
        w[i] = static_cast<float>(std::log(1.0 + 15.0 * random.uniform()));
        break;
      case InitKind::kStepBias: {
        const double low = std::log(1e-3);
        const double high = std::log(1e-1);
        const double step = std::max(std::exp(low + (high - low) * random.uniform()), 1e-4);
        w[i] = static_cast<float>(step + std::log(-std::expm1(-step)));
        break;
      }
    }
  }
}

}  // namespace cambium
