#include "tensor/tensor.h"

#include <algorithm>

#include "tensor/copy.h"

namespace cambium {
namespace {

void* advance(void* base, int64_t elements, Dtype dtype) {
  return base == nullptr ? nullptr : static_cast<char*>(base) + elements * dtype_size(dtype);
}

}  // namespace

int64_t dtype_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
    case Dtype::kI64:
      return 8;
    case Dtype::kF32:
    case Dtype::kI32:
      return 4;
    case Dtype::kBF16:
    case Dtype::kF16:
      return 2;
    case Dtype::kU8:
    case Dtype::kF8E4M3:
      return 1;
  }
  return 0;
}

const char* dtype_name(Dtype dtype) {
  constexpr const char* kNames[] = {"f32", "bf16", "f64", "f16", "i32", "i64", "u8", "f8"};
  return kNames[static_cast<int>(dtype)];
}

std::string Device::describe() const {
  return kind == kCpu ? "cpu" : kind == kMeta ? "meta" : "cuda:" + std::to_string(index);
}

Tensor Tensor::of(Dtype dtype, Device device, std::span<const int64_t> shape, void* data,
                  void* grad) {
  CAMBIUM_CHECK(!shape.empty() && shape.size() <= kMaxRank, "rank {}", shape.size());
  Tensor t;
  t.dtype = dtype;
  t.grad_dtype = dtype;
  t.device = device;
  t.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    t.shape[i] = shape[i];
    t.stride[i] = stride;
    stride *= shape[i];
  }
  t.data = data;
  t.grad = grad;
  return t;
}

int64_t Tensor::numel() const {
  int64_t n = rank == 0 ? 0 : 1;
  for (int i = 0; i < rank; ++i) {
    n *= shape[static_cast<size_t>(i)];
  }
  return n;
}

int64_t Tensor::row_stride() const {
  CAMBIUM_CHECK(row_contiguous(), "{}", describe());
  return rank == 1 ? dim(0) : stride[static_cast<size_t>(rank - 2)];
}

bool Tensor::contiguous() const {
  int64_t expected = 1;
  for (int i = rank; i-- > 0;) {
    const auto axis = static_cast<size_t>(i);
    if (shape[axis] != 1 && stride[axis] != expected) {
      return false;
    }
    expected *= shape[axis];
  }
  return true;
}

bool Tensor::row_contiguous() const {
  if (rank == 0 || (dim(-1) != 1 && stride[static_cast<size_t>(rank - 1)] != 1)) {
    return false;
  }
  for (int i = rank - 2; i-- > 0;) {
    const auto axis = static_cast<size_t>(i);
    if (shape[axis] != 1 && stride[axis] != stride[axis + 1] * shape[axis + 1]) {
      return false;
    }
  }
  return true;
}

bool Tensor::has_rows() const {
  if (rank <= 2 || shape[0] == 0) {
    return row_contiguous();
  }
  // As row_contiguous() of one token.
  if (dim(-1) != 1 && stride[static_cast<size_t>(rank - 1)] != 1) {
    return false;
  }
  for (int i = rank - 2; i-- > 1;) {
    const auto axis = static_cast<size_t>(i);
    if (shape[axis] != 1 && stride[axis] != stride[axis + 1] * shape[axis + 1]) {
      return false;
    }
  }
  return true;
}

Rows Tensor::row_walk() const {
  CAMBIUM_CHECK(has_rows(), "{}", describe());
  if (rank == 1) {
    return {1, 1, dim(0), dim(0)};
  }
  const auto last = static_cast<size_t>(rank - 1);
  int64_t inner = dim(0) == 0 || dim(-1) == 0 ? 0 : 1;
  for (size_t i = 1; i < last; ++i) {
    inner *= shape[i];
  }
  return {shape[0], inner, stride[0], rank == 2 ? stride[0] : stride[last - 1]};
}

Tensor Tensor::reshape(std::initializer_list<int64_t> new_shape) const {
  CAMBIUM_CHECK(contiguous(), "{}", describe());
  Tensor t = of(dtype, device, std::span(new_shape.begin(), new_shape.size()), data, grad);
  t.grad_dtype = grad_dtype;
  t.grad_memory = grad_memory;
  t.rounded = rounded;
  CAMBIUM_CHECK(t.numel() == numel(), "{} as {}", describe(), t.describe());
  return t;
}

Tensor Tensor::split_last(int64_t a, int64_t b) const {
  CAMBIUM_CHECK(rank < kMaxRank && a * b == dim(-1), "{} into {} x {}", describe(), a, b);
  Tensor t = *this;
  const auto last = static_cast<size_t>(rank - 1);
  t.rank = rank + 1;
  t.shape[last] = a;
  t.shape[last + 1] = b;
  t.stride[last + 1] = stride[last];
  t.stride[last] = b * stride[last];
  return t;
}

Tensor Tensor::merge_last() const {
  CAMBIUM_CHECK(rank >= 2, "{}", describe());
  Tensor t = *this;
  const auto last = static_cast<size_t>(rank - 1);
  CAMBIUM_CHECK(shape[last - 1] == 1 || stride[last - 1] == shape[last] * stride[last], "{}",
                describe());
  t.rank = rank - 1;
  t.shape[last - 1] = shape[last - 1] * shape[last];
  t.stride[last - 1] = stride[last];
  t.shape[last] = 0;
  t.stride[last] = 0;
  return t;
}

Tensor Tensor::slice(int axis, int64_t begin, int64_t length) const {
  const auto i = static_cast<size_t>(axis < 0 ? rank + axis : axis);
  CAMBIUM_CHECK(begin >= 0 && length >= 0 && begin + length <= shape[i], "[{}, {}) of {}", begin,
                begin + length, describe());
  Tensor t = *this;
  t.shape[i] = length;
  t.data = advance(data, begin * stride[i], dtype);
  t.grad = advance(grad, begin * stride[i], grad_dtype);
  t.rounded = advance(rounded, begin * stride[i], Dtype::kBF16);
  return t;
}

Tensor Tensor::grad_tensor() const {
  CAMBIUM_CHECK(grad != nullptr, "{}", describe());
  settle_grad();
  Tensor t = detached();
  t.dtype = grad_dtype;
  t.data = grad;
  t.rounded = nullptr;
  return t;
}

void GradientMemory::settle() {
  if (fresh) {
    fresh = false;
    fill(Tensor::of(Dtype::kU8, device, std::array{bytes}, data), 0);
  }
}

void Tensor::settle_grad() const {
  if (grad_memory != nullptr) {
    grad_memory->settle();
  }
}

void Tensor::forget_grad() const {
  if (grad_memory != nullptr) {
    grad_memory->fresh = true;
  } else {
    fill(grad_tensor(), 0);
  }
}

bool Tensor::takes_grad() const {
  if (grad_memory == nullptr || !grad_memory->fresh) {
    return false;
  }
  const bool whole = contiguous() && numel() * dtype_size(grad_dtype) == grad_memory->bytes;
  if (!whole) {
    grad_memory->settle();
  }
  grad_memory->fresh = false;
  return whole;
}

Tensor Tensor::detached() const {
  Tensor t = *this;
  t.grad = nullptr;
  t.grad_memory = nullptr;
  return t;
}

Tensor Tensor::rounded_tensor() const {
  if (rounded == nullptr) {
    return {};
  }
  Tensor t = detached();
  t.dtype = Dtype::kBF16;
  t.data = rounded;
  t.rounded = nullptr;
  return t;
}

bool Tensor::same_shape(const Tensor& other) const {
  return rank == other.rank && std::equal(shape.begin(), shape.begin() + rank, other.shape.begin());
}

std::string Tensor::describe() const {
  std::string text = std::string(dtype_name(dtype)) + " (";
  for (int i = 0; i < rank; ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[static_cast<size_t>(i)]);
  }
  return text + ")";
}

}  // namespace cambium
