// One token of a recurrent mixer: a block for each segment and head, with the head's state in
// registers, 16 rows of 4 columns a thread. The state, the convolution's inputs and all weights are
// on their way before the kernel that makes x is done, so that what is left after it is one look at
// x, three barriers of the block and the writes.
//
// Heads that share a head of q, k or v convolve it each for themselves, and one of them leaves its
// inputs in the state, when all have read it: they are a cluster, whose barrier says so.
#include <numeric>

#include "ops/conv/conv_token.cuh"
#include "ops/cuda_bulk.cuh"
#include "ops/recurrent_step/recurrent_step_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kRows = 16;  // of the state, a thread
constexpr int kMostDim = kMostStepDim;
constexpr int kMostParts = kMostDim / kRows;
constexpr int kMostThreads = kMostDim / kRows * (kMostDim / 4);
constexpr int kKeyWarps = kMostDim / 32;

struct Cut {
  int sharing;  // heads of a cluster that compute
  int blocks;   // of a cluster: a power of two
  int early;    // whether states may be read before the kernel before is done
  int taps;
  int q_sharing, k_sharing, v_sharing;  // heads that share one of q, k, v
};

__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 2) step_kernel(RecurrentStep<T> a, Cut cut) {
  __shared__ __align__(16) float raw[2][kMostDim];  // q, k before their lengths are known
  __shared__ __align__(16) float q[kMostDim];
  __shared__ __align__(16) float k[kMostDim];
  __shared__ __align__(16) float v[kMostDim];
  __shared__ __align__(16) float decay[kMostDim];
  __shared__ __align__(16) float reads[kMostParts][kMostDim];
  __shared__ __align__(16) float results[kMostParts][kMostDim];
  __shared__ float products[kMostParts];
  __shared__ float squares[2][kKeyWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int key_dim = static_cast<int>(a.key_dim);
  const int dim = static_cast<int>(a.dim);
  const int lanes = dim / 4;  // that share 16 rows
  const int parts = key_dim / kRows;
  const int part = thread / lanes;
  const int column = thread % lanes * 4;
  const bool holds = part < parts;
  const bool has_key = thread < key_dim;
  const bool has_value = thread < dim;
  const int rank = static_cast<int>(blockIdx.x) % cut.blocks;
  const int cluster = static_cast<int>(blockIdx.x) / cut.blocks;
  const int clusters = static_cast<int>(a.heads) / cut.sharing;  // of a segment
  if (rank >= cut.sharing) {
    arrive_at_cluster();
    await_cluster();
    return;
  }
  const int64_t t = cluster / clusters;  // the segment and its token
  const int h = cluster % clusters * cut.sharing + rank;
  const uint64_t policy = first_to_leave();
  if (cut.early == 0) {
    await_inputs();
  }
  const bool continues = a.segments.position[t] > 0;
  float* state = a.state_of(t, h) + part * kRows * dim + column;
  float* conv = a.conv_of(t);
  float s[kRows][4] = {};
  if (holds && continues) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      load_once(state + r * dim, policy, s[r]);
    }
  }
  const int64_t q_at = a.q_from + h / cut.q_sharing * key_dim + thread;
  const int64_t k_at = a.k_from + h / cut.k_sharing * key_dim + thread;
  const int64_t v_at = a.v_from + h / cut.v_sharing * dim + thread;
  ConvChannel of_q{};
  ConvChannel of_k{};
  ConvChannel of_v{};
  const auto load_channel = [&](ConvChannel& channel, int64_t c) {
    channel.load_weights(a.conv_weight.data, a.conv_bias.data, cut.taps, c);
    channel.load_past(conv, cut.taps, c, continues);
  };
  if (has_key) {
    load_channel(of_q, q_at);
    load_channel(of_k, k_at);
  }
  if (has_value) {
    load_channel(of_v, v_at);
  }
  if (cut.blocks > 1) {
    arrive_at_cluster();
  }
  const int half = static_cast<int>(a.half);
  float cos = 1.0F;
  float sin = 0.0F;
  const bool turns = thread < 2 * half;
  if (turns) {
    const int64_t pair = t * half + pair_of(thread, half, a.interleaved);
    cos = a.cos[pair];
    sin = a.sin[pair];
  }
  const float rate = expf(a.a_log.data[h]);
  const int64_t decay_at = a.decay_at(h, has_key ? thread : 0);
  const float dt_bias = a.dt_bias.data[decay_at];
  const float skip = a.skip.defined() ? a.skip.data[h] : 0.0F;
  float norm[4] = {1.0F, 1.0F, 1.0F, 1.0F};
  if (a.norm.defined() && thread < lanes) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      norm[c] = a.norm.data[h * a.norm_step + column + c];
    }
  }
  if (cut.early != 0) {
    await_inputs();
  }

  const float x_q = has_key ? load(a.x.at(t, q_at)) : 0.0F;
  const float x_k = has_key ? load(a.x.at(t, k_at)) : 0.0F;
  const float x_v = has_value ? load(a.x.at(t, v_at)) : 0.0F;
  const float raw_decay = load(a.decay.at(t, decay_at)) + dt_bias;
  const float raw_weight = a.weight.defined() ? load(a.weight.at(t, h)) : 0.0F;
  float z[4] = {};
  if (thread < lanes) {
    // One by one: rows of a projection need not begin at multiples of four.
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      z[c] = load(a.z.at(t, h * dim + column + c));
    }
  }
  const float own_q = has_key ? of_q.activated<T>(x_q) : 0.0F;
  const float own_k = has_key ? of_k.activated<T>(x_k) : 0.0F;
  if (has_value) {
    v[thread] = of_v.activated<T>(x_v);
  }
  if (has_key) {
    raw[0][thread] = own_q;
    raw[1][thread] = own_k;
    decay[thread] = expf(log_decay_of(a, rate, raw_decay));
  }
  const float weight =
      a.weight.defined() ? a.strongest * sigmoid_of<T>(raw_weight) : softplus(raw_decay);
  const float square_q = warp_sum(own_q * own_q);
  const float square_k = warp_sum(own_k * own_k);
  if (thread % 32 == 0 && thread < kMostDim) {
    squares[0][thread / 32] = square_q;
    squares[1][thread / 32] = square_k;
  }
  __syncthreads();
  if (has_key) {
    float of_length[2] = {};
    for (int w = 0; w * 32 < key_dim; ++w) {
      of_length[0] += squares[0][w];
      of_length[1] += squares[1][w];
    }
    const bool unit = a.unit_eps > 0.0F;
    const float q_factor = unit ? a.q_scale * rsqrtf(of_length[0] + a.unit_eps) : 1.0F;
    const float k_factor = unit ? rsqrtf(of_length[1] + a.unit_eps) : 1.0F;
    q[thread] = q_factor * (turns ? turned(raw[0], thread, half, a.interleaved, cos, sin) : own_q);
    k[thread] = k_factor * (turns ? turned(raw[1], thread, half, a.interleaved, cos, sin) : own_k);
  }
  __syncthreads();

  // Every part takes S' k, S' q and k q of its rows from the decayed state; from their sums, in the
  // parts' order, each knows what is written, and the first y = S' q + (k q) written.
  const int first_row = part * kRows;
  if (holds) {
    float read[4] = {};
    float y[4] = {};
    float product = 0.0F;
#pragma unroll
    for (int r = 0; r < kRows; r += 4) {
      float query[4];
      float key[4];
      float d[4];
      load_n<4>(q + first_row + r, query);
      load_n<4>(k + first_row + r, key);
      load_n<4>(decay + first_row + r, d);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        product = fmaf(query[i], key[i], product);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          s[r + i][c] *= d[i];
          read[c] = fmaf(s[r + i][c], key[i], read[c]);
          y[c] = fmaf(s[r + i][c], query[i], y[c]);
        }
      }
    }
    store_n<4>(reads[part] + column, read);
    store_n<4>(results[part] + column, y);
    if (column == 0) {
      products[part] = product;
    }
  }
  __syncthreads();
  float value[4] = {};
  float written[4] = {};
  if (holds) {
    load_n<4>(v + column, value);
    float all[4] = {};
    for (int p = 0; a.delta && p < parts; ++p) {
      float read[4];
      load_n<4>(reads[p] + column, read);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        all[c] += read[c];
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      written[c] = weight * (value[c] - all[c]);
    }
  }
  if (thread < 32) {
    float y[4] = {};
    float gate[4] = {};
    float square = 0.0F;
    if (thread < lanes) {
      float kq = 0.0F;
      for (int p = 0; p < parts; ++p) {
        float result[4];
        load_n<4>(results[p] + column, result);
        kq += products[p];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          y[c] += result[c];
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        y[c] = fmaf(skip, value[c], fmaf(kq, written[c], y[c]));
        gate[c] = sigmoid_of<T>(z[c]) * (a.sigmoid ? 1.0F : z[c]);
        const float normed = a.gate_first ? y[c] * gate[c] : y[c];
        square = fmaf(normed, normed, square);
      }
    }
    square = warp_sum(square);
    const float factor =
        a.norm.defined() ? rsqrtf(square / static_cast<float>(dim) + a.norm_eps) : 1.0F;
    if (thread < lanes) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        y[c] *= gate[c] * factor * norm[c];
      }
      store_n<4>(a.y.at(t, h * dim + column), y);
    }
  }
  if (holds) {
#pragma unroll
    for (int r = 0; r < kRows; r += 4) {
      float key[4];
      load_n<4>(k + first_row + r, key);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          s[r + i][c] = fmaf(key[i], written[c], s[r + i][c]);
        }
        store_once(state + (r + i) * dim, policy, s[r + i]);
      }
    }
  }
  if (cut.blocks > 1) {
    await_cluster();
  }
  // The first of the heads that share one leaves it.
  if (has_key && h % cut.q_sharing == 0) {
    of_q.leave_past(conv, cut.taps, q_at, x_q);
  }
  if (has_key && h % cut.k_sharing == 0) {
    of_k.leave_past(conv, cut.taps, k_at, x_k);
  }
  if (has_value && h % cut.v_sharing == 0) {
    of_v.leave_past(conv, cut.taps, v_at, x_v);
  }
}

/// As launch_ahead(), in clusters of neighbouring blocks.
template <class... Params>
void launch_clusters_ahead(const Launch& on, const char* operation, void (*kernel)(Params...),
                           unsigned blocks, unsigned threads, unsigned cluster,
                           const Params&... args) {
  if (only_compared<Params...>(on, kernel, blocks, threads, cluster, args...)) {
    return;
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = on.stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  check_launch(operation, {blocks}, {threads}, 0, cudaLaunchKernelEx(&config, kernel, args...));
}

template <class T>
void run_step(const RecurrentStep<T>& args, const Launch& on) {
  if (args.segments.count == 0) {
    return;
  }
  if (has_many_heads(args)) {
    return run_many_heads(args, on);
  }
  const DeviceSegments segments = on_device(args.segments, on);
  RecurrentStep<T> a = args;
  a.segments = segments.walk;
  Cut cut{};
  cut.taps = static_cast<int>(a.taps());
  cut.q_sharing = static_cast<int>(a.heads / a.q_heads);
  cut.k_sharing = static_cast<int>(a.heads / a.k_heads);
  cut.v_sharing = static_cast<int>(a.heads / a.v_heads);
  cut.sharing = std::lcm(std::lcm(cut.q_sharing, cut.k_sharing), cut.v_sharing);
  for (cut.blocks = 1; cut.blocks < cut.sharing;) {
    cut.blocks *= 2;
  }
  cut.early = on.recorder != nullptr ? 1 : 0;
  const int64_t holding = a.dim / 4 * (a.key_dim / kRows);
  const int64_t widest = a.key_dim > a.dim ? a.key_dim : a.dim;
  const auto threads =
      static_cast<unsigned>(ceil_div(holding > widest ? holding : widest, 32) * 32);
  const auto blocks =
      static_cast<unsigned>(a.segments.count * (a.heads / cut.sharing) * cut.blocks);
  launch_clusters_ahead<RecurrentStep<T>, Cut>(on, "recurrent_step", step_kernel<T>, blocks,
                                               threads, static_cast<unsigned>(cut.blocks), a, cut);
}

}  // namespace

bool has_recurrent_step() {
  return launches_ahead();
}

void recurrent_step_forward(const RecurrentStep<float>& a, const Launch& on) {
  run_step(a, on);
}
void recurrent_step_forward(const RecurrentStep<bf16>& a, const Launch& on) {
  run_step(a, on);
}

}  // namespace cambium::cuda
