// What tests of units and layers share: memory for their parameters and their state.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "base/checked.h"
#include "base/random.h"
#include "nn/layer.h"
#include "ops/rope/rope.h"
#include "tensor/arena.h"

namespace cambium::testing {

/// Parameters of anything that has visit(), at their initial rules; those that start all alike are
/// stirred, so that each of them matters. F64 holds the same values.
class Memory {
 public:
  template <class Visited>
  Memory(Visited& visited, Dtype dtype, uint64_t seed = 1) {
    visited.visit([&](const std::string& name, Parameter& p) {
      OwnedTensor start(Dtype::kF32, p.shape);
      p.tensor = start.view;
      initialise(p, name, seed);
      if (p.group == ParameterGroup::kNorm) {
        Rng random(seed, p.shape.size() + name.size());
        for (int64_t i = 0; i < p.numel(); ++i) {
          start.view.ptr<float>()[i] += 0.1F * random.normal();
        }
      }
      OwnedTensor& own = tensors_.emplace(name, OwnedTensor(dtype, p.shape)).first->second;
      for (int64_t i = 0; i < p.numel(); ++i) {
        const float value = start.view.ptr<float>()[i];
        if (dtype == Dtype::kF64) {
          own.view.ptr<double>()[i] = value;
        } else {
          own.view.ptr<float>()[i] = value;
        }
      }
      p.tensor = own.view;
    });
  }
  const std::map<std::string, OwnedTensor>& tensors() const { return tensors_; }

 private:
  std::map<std::string, OwnedTensor> tensors_;
};

/// (rows, channels) of normal numbers.
inline OwnedTensor random_rows(int64_t rows, int64_t channels, Dtype dtype, uint64_t seed = 5) {
  OwnedTensor x(dtype, {rows, channels});
  Rng random(seed, 0);
  for (int64_t i = 0; i < rows * channels; ++i) {
    const float value = random.normal();
    if (dtype == Dtype::kF64) {
      x.view.ptr<double>()[i] = value;
    } else {
      x.view.ptr<float>()[i] = value;
    }
  }
  return x;
}

inline std::vector<double> values_of(const Tensor& t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = t.dtype == Dtype::kF64 ? t.ptr<double>()[i] : t.ptr<float>()[i];
  }
  return values;
}

inline double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = a.size() == b.size() ? 0.0 : std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    worst = larger_error(worst, std::abs(a[i] - b[i]));
  }
  return worst;
}

/// The state of one unit for one sequence in slot 1 of 2, or for several of which each has that
/// many tokens; pages of 4 tokens; NaN where nothing was written.
class State {
 public:
  State(const StateLayout& layout, int64_t tokens, int64_t sequences = 1)
      : pages_per_segment_((tokens + kPage - 1) / kPage) {
    const int64_t pages = sequences * pages_per_segment_;
    for (int64_t i = pages; i > 0; --i) {
      table_.push_back(static_cast<int32_t>(i - 1));
    }
    for (const Part& part : layout.pages) {
      pages_.push_back(filled({pages, kPage}, part));
      state_.pages_views.push_back(pages_.back().view);
    }
    for (const Part& part : layout.slots) {
      slots_.push_back(filled({2}, part));
      state_.slot_views.push_back(slots_.back().view);
    }
  }
  UnitState view() const {
    return {state_.pages_views, state_.slot_views, table_, pages_per_segment_};
  }
  /// Of one of the sequences.
  UnitState view(int64_t sequence) const {
    UnitState one = view();
    const auto pages = static_cast<size_t>(pages_per_segment_);
    one.table = one.table.subspan(static_cast<size_t>(sequence) * pages, pages);
    return one;
  }

 private:
  static constexpr int64_t kPage = 4;
  static OwnedTensor filled(std::vector<int64_t> shape, const Part& part) {
    shape.insert(shape.end(), part.shape.begin(), part.shape.end());
    OwnedTensor t(Dtype::kF32, shape);
    std::fill_n(t.view.ptr<float>(), t.view.numel(), std::numeric_limits<float>::quiet_NaN());
    return t;
  }

  struct {
    std::vector<Tensor> pages_views, slot_views;
  } state_;
  std::vector<OwnedTensor> pages_, slots_;
  std::vector<int32_t> table_;
  int64_t pages_per_segment_;
};

/// `tokens` tokens of one sequence from `position` on.
inline Batch piece(int64_t tokens, int64_t position = 0, int64_t slot = -1) {
  Batch batch;
  batch.add(std::vector<int32_t>(static_cast<size_t>(tokens), 0), position, slot);
  return batch;
}

/// What a unit gives for the tokens of a batch.
inline Tensor run(Context& ctx, Unit& unit, const Tensor& x, const Batch& batch, RopeTable& rope,
                  const UnitState* state = nullptr) {
  rope.ensure(batch.positions_end());
  const Turns turns = rope.turns(ctx, batch.segments(), batch.lengths());
  return unit.forward(ctx, x, {&batch, &turns, state});
}

}  // namespace cambium::testing
