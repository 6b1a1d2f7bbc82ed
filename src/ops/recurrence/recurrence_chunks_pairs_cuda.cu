// What the delta rule's walk over chunks takes beside q, k and v, for all chunks and heads at once:
// P, T - I, what becomes of the decays and keys as the walk takes them, in the notation of
// recurrence_chunks_delta_cuda.cu.
#include "ops/recurrence/recurrence_chunks_delta_prepare.cuh"

namespace cambium::cuda {
namespace {

template <int kKey>
__global__ void __launch_bounds__(128)
    prepare_kernel(Recurrence<bf16> a, const ChunkSpan* spans, const int32_t* first, int head_walks,
                   DeltaParts parts) {
  await_inputs();
  extern __shared__ float4 shared[];
  auto& s = *reinterpret_cast<PrepareShared<kKey, 1>*>(shared);
  const int64_t chunk = last_first(a.heads);
  const int64_t h = blockIdx.x % a.heads;
  const ChunkSpan span = spans[chunk];
  const int thread = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0 && thread == 0) {
    *parts.turn = 0;
  }
  if (!in_chunks(a.segments, span.segment)) {
    return;
  }
  if (chunk == first[span.segment] && thread < head_walks) {
    parts.walked[(span.segment * a.heads + h) * head_walks + thread] = 0;
  }
  prepare(a, span, chunk, h, 1, parts, 0, s);
}

template <int kKey>
void run(const Recurrence<bf16>& a, const DeviceChunks& chunks, int64_t head_walks,
         const DeltaParts& parts, const Launch& on) {
  launch_ahead(on, "recurrence", prepare_kernel<kKey>,
               static_cast<unsigned>(chunks.count * a.heads), 128, sizeof(PrepareShared<kKey, 1>),
               a, chunks.span, chunks.first, static_cast<int>(head_walks), parts);
}

}  // namespace

void prepare_delta(const Recurrence<bf16>& a, const DeviceChunks& chunks, int64_t head_walks,
                   const DeltaParts& parts, const Launch& on) {
  a.key_dim == 64 ? run<64>(a, chunks, head_walks, parts, on)
                  : run<128>(a, chunks, head_walks, parts, on);
}

}  // namespace cambium::cuda
