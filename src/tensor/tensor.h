// Tensor: a typed, strided view of memory on a device. It owns nothing (Buffer and Arena do) and is
// copied like a number. A tensor that takes part in training carries a second pointer, `grad`, to
// memory of the same layout in which backward passes accumulate; every view (slice, reshape) of the
// tensor is a view of its gradient too. The gradient of an activation has the activation's type,
// that of a weight the type of sums (Sum<T> of dtype.h: f32 beside a bf16 weight).
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "base/error.h"
#include "tensor/device.h"
#include "tensor/dtype.h"
#include "tensor/rows.h"
#include "tensor/view.h"

namespace cambium {

inline constexpr int kMaxRank = 4;

/// The memory of a whole gradient. A fresh one holds nothing yet: whoever writes it first either
/// sets all of it or makes it zero and adds.
struct GradientMemory {
  Device device;
  void* data = nullptr;
  int64_t bytes = 0;
  bool fresh = false;

  /// Makes it zero if it is fresh.
  void settle();
};

struct Tensor {
  Dtype dtype = Dtype::kF32;
  Dtype grad_dtype = Dtype::kF32;
  Device device;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> stride{};  // in elements
  void* data = nullptr;
  void* grad = nullptr;                   // same layout as data, or null when no gradient is wanted
  GradientMemory* grad_memory = nullptr;  // what grad points into, or null if it is never fresh
  // The same elements rounded to bf16, same layout, or null where nobody keeps them. Whoever keeps
  // them sees to it that they follow `data` (train/rounded_weights.h).
  void* rounded = nullptr;

  /// A contiguous view of `data`.
  static Tensor of(Dtype dtype, Device device, std::span<const int64_t> shape, void* data,
                   void* grad = nullptr);
  template <class T>
  static Tensor of(T* data, std::initializer_list<int64_t> shape, T* grad = nullptr) {
    return of(DtypeOf<T>::value, Device::kCpu, std::span(shape.begin(), shape.size()), data, grad);
  }

  bool defined() const { return rank > 0; }
  bool has_grad() const { return grad != nullptr; }
  /// Size of an axis; negative axes count from the last.
  int64_t dim(int axis) const { return shape[static_cast<size_t>(axis < 0 ? rank + axis : axis)]; }
  int64_t numel() const;
  int64_t bytes() const { return numel() * dtype_size(dtype); }
  /// Product of all axes but the last.
  int64_t rows() const { return rank == 0 || dim(-1) == 0 ? 0 : numel() / dim(-1); }
  /// Elements from one row to the next of a tensor whose leading axes can be walked as one.
  int64_t row_stride() const;
  bool contiguous() const;
  /// Last axis contiguous and the leading axes evenly spaced: what most operations ask for.
  bool row_contiguous() const;

  /// Last axis contiguous, and the axes between the first and the last evenly spaced.
  bool has_rows() const;
  /// The walk over the rows of a tensor that has_rows().
  Rows row_walk() const;

  template <class T>
  T* ptr() const {
    CAMBIUM_CHECK(DtypeOf<T>::value == dtype, "tensor holds {}", dtype_name(dtype));
    return static_cast<T*>(data);
  }
  /// The gradient's elements; zero if it was fresh.
  template <class T>
  T* grad_ptr() const {
    return grad_tensor().ptr<T>();
  }

  /// Same elements, other shape; the tensor must be contiguous.
  Tensor reshape(std::initializer_list<int64_t> new_shape) const;
  /// (..., A*B) -> (..., A, B); works on any stride of the leading axes.
  Tensor split_last(int64_t a, int64_t b) const;
  /// (..., A, B) -> (..., A*B); the last two axes must be contiguous together.
  Tensor merge_last() const;
  /// Elements [begin, begin + length) of `axis`.
  Tensor slice(int axis, int64_t begin, int64_t length) const;
  /// The gradient as a tensor of its own (which has no gradient); zero if it was fresh.
  Tensor grad_tensor() const;
  /// Makes a fresh gradient zero, with the parts of it that this view does not show.
  void settle_grad() const;
  /// Whether the caller is to set the gradient rather than add to it: it is fresh, and this view is
  /// all of it. It counts as written from here on.
  bool takes_grad() const;
  /// From here on the gradient holds nothing: it is fresh again, or zero where it never is.
  void forget_grad() const;
  /// The same data without its gradient.
  Tensor detached() const;
  /// The elements rounded to bf16 as a tensor of their own, without a gradient; undefined where
  /// nobody keeps them.
  Tensor rounded_tensor() const;

  bool same_shape(const Tensor& other) const;
  /// "f32 (3, 64)".
  std::string describe() const;
};

/// What kernels see of a tensor that has_rows(); nothing of an undefined one. The gradient is as it
/// is: backward steps name those they touch (Tape), and what works outside a tape settles them.
template <class T, class G = T>
View<T, G> view(const Tensor& t) {
  if (!t.defined()) {
    return {};
  }
  CAMBIUM_CHECK(!t.has_grad() || DtypeOf<G>::value == t.grad_dtype, "the gradient holds {}",
                dtype_name(t.grad_dtype));
  return {t.ptr<T>(), static_cast<G*>(t.grad), t.row_walk(), t.dim(-1)};
}

/// The elements of a contiguous tensor, or null of an undefined one.
template <class T>
T* data_of(const Tensor& t) {
  return t.defined() ? t.ptr<T>() : nullptr;
}

}  // namespace cambium

/// As describe() says, made only where a message is needed.
template <>
struct fmt::formatter<cambium::Tensor> : fmt::formatter<std::string> {
  template <class Context>
  auto format(const cambium::Tensor& t, Context& ctx) const {
    return fmt::formatter<std::string>::format(t.describe(), ctx);
  }
};
