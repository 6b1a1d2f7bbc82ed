// Private to copy.h: what a CUDA device does of it. The callers have checked shapes, types and
// devices. Pointers and numbers only, so that .cu files include it.
#pragma once

#include <cstdint>

#include "tensor/dtype.h"

struct CUstream_st;

namespace cambium::cuda {

/// to[i] = from[i] for types among f32 and bf16.
void convert_elements(void* to, Dtype to_type, const void* from, Dtype from_type, int64_t count,
                      CUstream_st* stream);
/// Elements of f32 or bf16.
void fill_elements(void* to, Dtype type, int64_t count, float value, CUstream_st* stream);
/// Row i of `out` is row rows[i] of `x`: `bytes` each, those of x `stride` bytes apart. rows is an
/// array of the host.
void gather_row_bytes(void* out, const void* x, int64_t stride, int64_t bytes, const int64_t* rows,
                      int64_t count, CUstream_st* stream);
/// Row rows[i] of y += row i of x, f32 or bf16; y's rows `stride` elements apart. The rows differ.
void add_row_elements(void* y, int64_t stride, const void* x, int64_t channels, Dtype type,
                      const int64_t* rows, int64_t count, CUstream_st* stream);

}  // namespace cambium::cuda
