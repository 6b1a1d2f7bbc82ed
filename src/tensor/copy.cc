#include "tensor/copy.h"

#include <algorithm>
#include <cstring>

#include "base/parallel.h"
#include "tensor/arena.h"
#include "tensor/copy_kernels.h"

namespace cambium {
namespace {

constexpr int64_t kConverted = int64_t{1} << 16;  // elements a piece of a parallel loop
constexpr int64_t kRead = int64_t{1} << 20;       // elements brought to the host at a time

bool on_cpu(const Tensor& t) {
  return t.device.kind == Device::kCpu;
}
// Nothing is to be done: the meta device has shapes alone.
bool on_meta(const Tensor& t) {
  return t.device.kind == Device::kMeta;
}
// A type that CUDA computes in; builds without CUDA do not ask.
[[maybe_unused]] bool is_on_device(const Tensor& t) {
  return t.dtype == Dtype::kF32 || t.dtype == Dtype::kBF16;
}

// Rows between devices of which one at least is not the CPU.
void copy_rows_on_device(const Tensor& to, const Tensor& from) {
  const Rows out = to.row_walk();
  const Rows in = from.row_walk();
  const int64_t size = dtype_size(to.dtype);
  for (int64_t i = 0; i < out.inner; ++i) {
    copy_memory_2d(static_cast<char*>(to.data) + i * out.inner_stride * size, to.device,
                   out.outer_stride * size,
                   static_cast<const char*>(from.data) + i * in.inner_stride * size, from.device,
                   in.outer_stride * size, to.dim(-1) * size, out.outer);
  }
}

void copy_rows(const Tensor& to, const Tensor& from) {
  if (!on_cpu(to) || !on_cpu(from)) {
    return copy_rows_on_device(to, from);
  }
  const Rows out = to.row_walk();
  const Rows in = from.row_walk();
  const int64_t size = dtype_size(to.dtype);
  const auto bytes = static_cast<size_t>(to.dim(-1) * size);
  for (int64_t r = 0; r < out.count(); ++r) {
    std::memmove(static_cast<char*>(to.data) + out.offset(r) * size,
                 static_cast<const char*>(from.data) + in.offset(r) * size, bytes);
  }
}

std::span<const int64_t> shape_of(const Tensor& t) {
  return {t.shape.data(), static_cast<size_t>(t.rank)};
}

template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<To, bf16>) {
    return round_to_bf16(static_cast<float>(widen(value)));
  } else {
    return static_cast<To>(widen(value));
  }
}

// Calls f with a null pointer of the floating type that `dtype` names.
template <class F>
void with_float(const char* what, Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kF32:
      return f(static_cast<float*>(nullptr));
    case Dtype::kF64:
      return f(static_cast<double*>(nullptr));
    case Dtype::kBF16:
      return f(static_cast<bf16*>(nullptr));
    default:
      fail("[{}] expected f32, f64 or bf16, got {}", what, dtype_name(dtype));
  }
}

template <class T>
void add_rows_of(const Tensor& y, const Tensor& x, std::span<const int64_t> rows) {
  for (size_t i = 0; i < rows.size(); ++i) {
    T* to = y.ptr<T>() + rows[i] * y.row_stride();
    const T* from = x.ptr<T>() + static_cast<int64_t>(i) * x.dim(1);
    for (int64_t c = 0; c < x.dim(1); ++c) {
      to[c] += from[c];
    }
  }
}

void expect_rows_of(const char* what, const Tensor& packed, const Tensor& table,
                    std::span<const int64_t> rows) {
  expect(packed.device == table.device, "[{}] expected both on one device, got {} and {}", what,
         packed.device.describe(), table.device.describe());
  expect(packed.rank == 2 && table.rank == 2 && packed.contiguous() && table.row_contiguous() &&
             packed.dim(0) == static_cast<int64_t>(rows.size()) && packed.dim(1) == table.dim(1) &&
             packed.dtype == table.dtype,
         "[{}] expected {} rows of {}, got {}", what, rows.size(), table, packed);
  for (const int64_t row : rows) {
    expect(row >= 0 && row < table.dim(0), "[{}] expected rows in [0, {}), got {}", what,
           table.dim(0), row);
  }
}

}  // namespace

void copy(const Tensor& to, const Tensor& from) {
  expect(to.same_shape(from), "[copy] expected tensors of one shape, got {} to {}", from, to);
  if (on_meta(to) || on_meta(from)) {
    return;
  }
  if (to.dtype == from.dtype && to.contiguous() && from.contiguous()) {
    if (!on_cpu(to) || !on_cpu(from)) {
      copy_memory(to.data, to.device, from.data, from.device, to.bytes());
    } else if (to.numel() > 0) {
      std::memmove(to.data, from.data, static_cast<size_t>(to.bytes()));
    }
    return;
  }
  if (to.dtype == from.dtype) {
    expect(to.has_rows() && from.has_rows(), "[copy] expected contiguous rows, got {} to {}", from,
           to);
    return copy_rows(to, from);
  }
  expect(to.contiguous() && from.contiguous(),
         "[copy] expected contiguous tensors where the type changes, got {} to {}", from, to);
  if (!on_cpu(to) && !on_cpu(from)) {
    if constexpr (kCudaBuild) {
      expect(is_on_device(to) && is_on_device(from),
             "[copy] cuda converts f32 and bf16, got {} to {}", from, to);
      cuda::convert_elements(to.data, to.dtype, from.data, from.dtype, to.numel(),
                             compute_stream(to.device));
    }
    return;
  }
  if (!on_cpu(to) || !on_cpu(from)) {  // converted on the CPU, in memory beside it
    const OwnedTensor beside(on_cpu(from) ? to.dtype : from.dtype, shape_of(to));
    copy(beside.view, from);
    return copy(to, beside.view);
  }
  with_float("copy", to.dtype, [&]<class To>(To*) {
    with_float("copy", from.dtype, [&]<class From>(From*) {
      const From* in = from.ptr<From>();
      To* out = to.ptr<To>();
      parallel_for(to.numel(), kConverted, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          out[i] = convert<To>(in[i]);
        }
      });
    });
  });
}

std::vector<float> elements_of(const Tensor& t) {
  std::vector<float> values(static_cast<size_t>(t.numel()));
  if (!values.empty()) {
    Tensor here = Tensor::of(Dtype::kF32, Device::kCpu, shape_of(t), values.data());
    copy(here, t);
  }
  return values;
}

namespace {

// Reads elements [begin, begin + count) of a tensor at a time, in memory that is used again.
class PieceReader {
 public:
  PieceReader(const Tensor& t, Dtype as) : flat_(t.detached().reshape({t.numel()})), as_(as) {}
  std::span<const std::byte> read(int64_t begin, int64_t count) {
    const Tensor part = flat_.slice(0, begin, count);
    if (on_cpu(part) && part.dtype == as_) {
      return bytes_of(part);
    }
    const Tensor here = on_cpu(part) ? part : room(raw_, part.dtype, count);
    if (!on_cpu(part)) {
      copy(here, part);
    }
    if (here.dtype == as_) {
      return bytes_of(here);
    }
    const Tensor out = room(converted_, as_, count);
    copy(out, here);
    return bytes_of(out);
  }

 private:
  static std::span<const std::byte> bytes_of(const Tensor& t) {
    return {static_cast<const std::byte*>(t.data), static_cast<size_t>(t.bytes())};
  }
  static Tensor room(OwnedTensor& kept, Dtype dtype, int64_t count) {
    if (kept.view.data == nullptr || kept.view.numel() < count) {
      kept = OwnedTensor(dtype, std::span(&count, 1));
    }
    return kept.view.slice(0, 0, count);
  }

  Tensor flat_;
  Dtype as_;
  OwnedTensor raw_, converted_;
};

}  // namespace

void read_in_pieces(const Tensor& t, Dtype as,
                    const std::function<void(std::span<const std::byte>)>& use) {
  PieceReader reader(t, as);
  for (int64_t at = 0; at < t.numel(); at += kRead) {
    use(reader.read(at, std::min(kRead, t.numel() - at)));
  }
}

bool same_elements(const Tensor& a, const Tensor& b) {
  if (!a.same_shape(b)) {
    return false;
  }
  const Dtype as = a.dtype == b.dtype ? a.dtype : Dtype::kF32;
  PieceReader read_a(a, as);
  PieceReader read_b(b, as);
  for (int64_t at = 0; at < a.numel(); at += kRead) {
    const int64_t count = std::min(kRead, a.numel() - at);
    const auto of_a = read_a.read(at, count);
    if (std::memcmp(of_a.data(), read_b.read(at, count).data(), of_a.size()) != 0) {
      return false;
    }
  }
  return true;
}

void fill(const Tensor& t, double value) {
  expect(t.contiguous(), "[fill] expected a contiguous tensor, got {}", t);
  if (on_meta(t)) {
    return;
  }
  if (value == 0.0) {
    on_cpu(t) ? static_cast<void>(std::memset(t.data, 0, static_cast<size_t>(t.bytes())))
              : fill_memory(t.data, t.device, 0, t.bytes());
    return;
  }
  if (!on_cpu(t)) {
    if constexpr (kCudaBuild) {
      expect(is_on_device(t), "[fill] cuda fills f32 and bf16, got {}", t);
      cuda::fill_elements(t.data, t.dtype, t.numel(), static_cast<float>(value),
                          compute_stream(t.device));
    }
    return;
  }
  with_float("fill", t.dtype,
             [&]<class T>(T*) { std::fill_n(t.ptr<T>(), t.numel(), convert<T>(value)); });
}

void gather_rows(const Tensor& out, const Tensor& x, std::span<const int64_t> rows) {
  expect_rows_of("gather_rows", out, x, rows);
  if (on_meta(x)) {
    return;
  }
  if (!on_cpu(x)) {
    if constexpr (kCudaBuild) {
      const int64_t size = dtype_size(x.dtype);
      cuda::gather_row_bytes(out.data, x.data, x.row_stride() * size, x.dim(1) * size, rows.data(),
                             static_cast<int64_t>(rows.size()), compute_stream(x.device));
    }
    return;
  }
  const int64_t size = dtype_size(x.dtype);
  const auto bytes = static_cast<size_t>(x.dim(1) * size);
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(static_cast<char*>(out.data) + i * bytes,
                static_cast<const char*>(x.data) + rows[i] * x.row_stride() * size, bytes);
  }
}

void add_rows(const Tensor& y, const Tensor& x, std::span<const int64_t> rows) {
  expect_rows_of("add_rows", x, y, rows);
  if (on_meta(y)) {
    return;
  }
  if (!on_cpu(y)) {
    if constexpr (kCudaBuild) {
      expect(is_on_device(y), "[add_rows] cuda adds f32 and bf16, got {}", y);
      cuda::add_row_elements(y.data, y.row_stride(), x.data, x.dim(1), x.dtype, rows.data(),
                             static_cast<int64_t>(rows.size()), compute_stream(y.device));
    }
    return;
  }
  expect(y.dtype == Dtype::kF32 || y.dtype == Dtype::kF64, "[add_rows] expected f32 or f64, got {}",
         y);
  y.dtype == Dtype::kF64 ? add_rows_of<double>(y, x, rows) : add_rows_of<float>(y, x, rows);
}

}  // namespace cambium
