// Elements moved on a CUDA device, a thread for each.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "tensor/copy_kernels.h"
#include "tensor/device_memory.h"

namespace cambium::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

__device__ float load(const float* p) {
  return *p;
}
__device__ float load(const bf16* p) {
  return __uint_as_float(static_cast<uint32_t>(p->bits) << 16);
}
__device__ void store(float* p, float value) {
  *p = value;
}
__device__ void store(bf16* p, float value) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

template <class To, class From>
__global__ void convert(To* to, const From* from, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    store(to + i, load(from + i));
  }
}

template <class T>
__global__ void fill(T* to, int64_t count, float value) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    store(to + i, value);
  }
}

// Unit is as wide as the rows' addresses and sizes allow.
template <class Unit>
__global__ void gather(Unit* out, const Unit* x, int64_t stride, int64_t units, const int64_t* rows,
                       int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count * units) {
    out[i] = x[rows[i / units] * stride + i % units];
  }
}

template <class T>
__global__ void add(T* y, int64_t stride, const T* x, int64_t channels, const int64_t* rows,
                    int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count * channels) {
    T* to = y + rows[i / channels] * stride + i % channels;
    store(to, load(to) + load(x + i));
  }
}

// An array of the host on the device, until the work queued now is done.
class Upload {
 public:
  Upload(const int64_t* rows, int64_t count, CUstream_st* stream) : stream_(stream) {
    const auto bytes = static_cast<size_t>(count) * sizeof(int64_t);
    if (cudaMallocAsync(&memory_, bytes, stream) != cudaSuccess ||
        cudaMemcpyAsync(memory_, rows, bytes, cudaMemcpyHostToDevice, stream) != cudaSuccess) {
      queue_failed("copying row numbers", cudaGetLastError());
    }
  }
  ~Upload() { cudaFreeAsync(memory_, stream_); }
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;
  const int64_t* rows() const { return static_cast<const int64_t*>(memory_); }

 private:
  void* memory_ = nullptr;
  CUstream_st* stream_;
};

void check(const char* what) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    queue_failed(what, status);
  }
}

}  // namespace

void convert_elements(void* to, Dtype to_type, const void* from, Dtype from_type, int64_t count,
                      CUstream_st* stream) {
  if (count == 0) {
    return;
  }
  if (to_type == Dtype::kBF16) {
    convert<<<blocks_for(count), kThreads, 0, stream>>>(static_cast<bf16*>(to),
                                                        static_cast<const float*>(from), count);
  } else {
    convert<<<blocks_for(count), kThreads, 0, stream>>>(static_cast<float*>(to),
                                                        static_cast<const bf16*>(from), count);
  }
  check("converting elements");
}

void fill_elements(void* to, Dtype type, int64_t count, float value, CUstream_st* stream) {
  if (count == 0) {
    return;
  }
  if (type == Dtype::kBF16) {
    fill<<<blocks_for(count), kThreads, 0, stream>>>(static_cast<bf16*>(to), count, value);
  } else {
    fill<<<blocks_for(count), kThreads, 0, stream>>>(static_cast<float*>(to), count, value);
  }
  check("filling elements");
}

void gather_row_bytes(void* out, const void* x, int64_t stride, int64_t bytes, const int64_t* rows,
                      int64_t count, CUstream_st* stream) {
  if (count == 0 || bytes == 0) {
    return;
  }
  const Upload uploaded(rows, count, stream);
  const auto run = [&]<class Unit>(Unit*) {
    const int64_t size = sizeof(Unit);
    gather<<<blocks_for(count * (bytes / size)), kThreads, 0, stream>>>(
        static_cast<Unit*>(out), static_cast<const Unit*>(x), stride / size, bytes / size,
        uploaded.rows(), count);
  };
  const auto all = reinterpret_cast<uintptr_t>(x) | static_cast<uintptr_t>(stride | bytes) |
                   reinterpret_cast<uintptr_t>(out);
  if (all % sizeof(uint4) == 0) {
    run(static_cast<uint4*>(nullptr));
  } else if (all % sizeof(uint32_t) == 0) {
    run(static_cast<uint32_t*>(nullptr));
  } else {
    run(static_cast<uint16_t*>(nullptr));
  }
  check("gathering rows");
}

void add_row_elements(void* y, int64_t stride, const void* x, int64_t channels, Dtype type,
                      const int64_t* rows, int64_t count, CUstream_st* stream) {
  if (count == 0 || channels == 0) {
    return;
  }
  const Upload uploaded(rows, count, stream);
  if (type == Dtype::kBF16) {
    add<<<blocks_for(count * channels), kThreads, 0, stream>>>(static_cast<bf16*>(y), stride,
                                                               static_cast<const bf16*>(x),
                                                               channels, uploaded.rows(), count);
  } else {
    add<<<blocks_for(count * channels), kThreads, 0, stream>>>(static_cast<float*>(y), stride,
                                                               static_cast<const float*>(x),
                                                               channels, uploaded.rows(), count);
  }
  check("adding rows");
}

}  // namespace cambium::cuda
