// A block takes a row. It reads the row for the largest logit, again for the sums of exponentials,
// and where a token is drawn for the cuts and the draw; all but the first reading come from the L2.
// A long row is first read by many blocks, a part each, which leave its largest logit and the sum
// of exponentials below it: few rows would leave most of the device idle, and where nothing is
// drawn that is all there is to read. Whether a row is long depends on the vocabulary alone.
//
// Weights are whole numbers of 2^-44 (the likeliest token weighs 2^44): their sums are exact in any
// order, so that counting by atomics and by parts gives the same bits in every run.
//
// Cuts keep a beginning of the order (larger logit, then lower index) and are found as its last
// token. The m-th largest of the threads' own largest logits is at most the m-th largest of the
// row, so that what is not below it holds the m likeliest tokens and few more: these are sorted in
// shared memory. Where they are too many (equal logits) or too few (a wide nucleus), the last token
// is found by its bits, eight at a time, from histograms over the row.
#include <cfloat>

#include "ops/sampling/sampling_cuda.cuh"

namespace cambium::cuda {
namespace {

constexpr int kListed = 2048;  // tokens that can be sorted
constexpr int kNucleus = 512;  // of the threads' largest logits, where only the nucleus is cut
constexpr int kFew = 512;      // tokens left that are drawn from by comparing each with each
constexpr float kLeastLog = -745.13F;  // below, e^x is 0 in double precision

/// What was read of a row, or of a part of it.
struct RowPart {
  uint64_t best;  // its largest logit above -infinity, as listed_token(); 0: there is none
  double sum;     // of e^(x - largest), or of e^x where there is none
};

/// Of the row in hand.
struct Shared {
  uint64_t list[kListed];  // tokens as order() and ~index
  Units sums[kListed];     // of weights, up to and with each token of the list
  Units histogram[256];
  Units part[kWarps];
  double part_double[kWarps];
  float temperature, top_p, min_p;
  int64_t top_k;
  double uniform;
  RowPart read;  // of the whole row
  int32_t listed;
  int32_t found;
};

/// The sum over this thread and those before it.
__device__ __forceinline__ Units block_scan(Units x, Units* part) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const Units before = __shfl_up_sync(kAll, x, lanes);
    x += lane >= lanes ? before : 0;
  }
  __syncthreads();
  if (lane == 31) {
    part[warp] = x;
  }
  __syncthreads();
  return x + warp_total(lane < warp ? part[lane] : Units{0});
}

/// Sorts `count` (a power of two) numbers in shared memory, the largest first.
__device__ void sort_descending(uint64_t* list, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int i = static_cast<int>(threadIdx.x); i < count / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1));
        const uint64_t a = list[low];
        const uint64_t b = list[low + stride];
        if ((a < b) == ((low & size) == 0)) {
          list[low] = b;
          list[low + stride] = a;
        }
      }
      __syncthreads();
    }
  }
}

/// A row of logits and the weights of its tokens. All members that are not of one thread are called
/// by the whole block.
template <class T, int V>
struct Row {
  const T* logits;
  int64_t n;
  Shared& shared;
  float largest = 0.0F;
  float inverse = 0.0F;  // of the temperature
  double exact_inverse = 0.0;
  float min_p = 0.0F;
  // The last token that the cuts leave; at first the end of all.
  uint32_t last_key = 0;
  int64_t last_index = INT64_MAX;

  template <class F>
  __device__ __forceinline__ void visit(int64_t begin, int64_t end, int thread, int threads,
                                        const F& f) const {
    visit_row<V>(logits, begin, end, thread, threads, f);
  }
  template <class F>
  __device__ __forceinline__ void visit(const F& f) const {
    visit(0, n, static_cast<int>(threadIdx.x), kThreads, f);
  }

  /// Of one thread: e^((x - largest) / temperature).
  __device__ __forceinline__ float weight(float x) const { return expf((x - largest) * inverse); }
  __device__ __forceinline__ static Units units(float weight) {
    return __float2ull_rn(weight * 0x1p44F);
  }
  /// Of one thread: whether a token can be drawn where nothing is cut.
  __device__ __forceinline__ bool candidate(float x, float weight) const {
    if (!((x - largest) * inverse > kLeastLog)) {
      return false;
    }
    if (min_p == 0.0F) {
      return true;
    }
    if (fabsf(weight - min_p) > 1e-5F * min_p) {
      return weight > min_p;
    }
    return exp((static_cast<double>(x) - static_cast<double>(largest)) * exact_inverse) >=
           static_cast<double>(min_p);
  }
  /// Of one thread: whether the cuts leave a token.
  __device__ __forceinline__ bool left(float x, int64_t i) const {
    const uint32_t key = order(x);
    return (key > last_key || (key == last_key && i <= last_index)) && candidate(x, weight(x));
  }

  /// The first token in the order of the vocabulary with which the sum of count(x, i) passes
  /// `target`.
  template <class Count>
  __device__ int32_t find(Units target, const Count& count) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    int64_t begin = 0;
    int64_t end = n;
    while (end - begin > kThreads) {
      const int64_t size = ceil_div(ceil_div(end - begin, kWarps), V) * V;
      Units sum = 0;
      visit(min(begin + warp * size, end), min(begin + (warp + 1) * size, end), lane, 32,
            [&](float x, int64_t i) { sum += count(x, i); });
      sum = warp_total(sum);
      __syncthreads();
      if (lane == 0) {
        shared.part[warp] = sum;
      }
      __syncthreads();
      int at = 0;
      while (at + 1 < kWarps && shared.part[at] <= target) {
        target -= shared.part[at];
        ++at;
      }
      begin = min(begin + at * size, end);
      end = min(begin + size, end);
    }
    const int64_t i = begin + threadIdx.x;
    const Units own = i < end ? count(load(logits + i), i) : 0;
    const Units sum = block_scan(own, shared.part);
    if (threadIdx.x == 0) {
      shared.found = 0;
    }
    __syncthreads();
    if (sum > target && sum - own <= target) {
      shared.found = static_cast<int32_t>(i);
    }
    __syncthreads();
    return shared.found;
  }

  /// The key with which the sum of count(x, i) from the largest logit on reaches `wanted`, and the
  /// sum above it.
  template <class Count>
  __device__ uint32_t reach(Units wanted, Units& above, const Count& count) const {
    uint32_t key = 0;
    uint32_t known = 0;
    above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < 256; i += kThreads) {
        shared.histogram[i] = 0;
      }
      __syncthreads();
      visit([&](float x, int64_t i) {
        const uint32_t own = order(x);
        if ((own & known) == key) {
          const Units units = count(x, i);
          if (units > 0) {
            atomicAdd(&shared.histogram[own >> shift & 255U], units);
          }
        }
      });
      __syncthreads();
      uint32_t bin = 255;
      while (bin > 0 && above + shared.histogram[bin] < wanted) {
        above += shared.histogram[bin];
        --bin;
      }
      key |= bin << shift;
      known |= 255U << shift;
    }
    return key;
  }

  /// How much of the weight `total` the nucleus must hold.
  __device__ __forceinline__ static Units wanted(Units total, float top_p) {
    const double share = ceil(static_cast<double>(total) * static_cast<double>(top_p));
    return min(max(static_cast<Units>(share), Units{1}), total);
  }

  /// Cuts by the bits of the last token; `candidates` weigh `total`. Returns the weight left.
  __device__ Units cut_by_bits(int64_t top_k, float top_p, int64_t candidates, Units total) {
    Units above = 0;
    if (top_k > 0 && top_k < candidates) {
      const auto k = static_cast<Units>(top_k);
      const uint32_t key = reach(
          k, above, [&](float x, int64_t) -> Units { return candidate(x, weight(x)) ? 1 : 0; });
      last_index =
          find(k - above - 1, [&](float x, int64_t) -> Units { return order(x) == key ? 1 : 0; });
      last_key = key;
      Units sum = 0;
      visit([&](float x, int64_t i) { sum += left(x, i) ? units(weight(x)) : 0; });
      total = block_total(sum, shared.part);
    }
    if (top_p < 1.0F) {
      const Units enough = wanted(total, top_p);
      const uint32_t key = reach(enough, above, [&](float x, int64_t i) -> Units {
        return left(x, i) ? units(weight(x)) : 0;
      });
      const Units each = max(units(weight(from_order(key))), Units{1});
      const Units equals = (enough - above + each - 1) / each;
      const int32_t index = find(equals - 1, [&](float x, int64_t i) -> Units {
        return order(x) == key && left(x, i) ? 1 : 0;
      });
      last_index = index;
      last_key = key;
      total = above + equals * each;
    }
    return total;
  }

  /// Cuts by sorting the likeliest tokens; `own` is this thread's largest logit. Returns how many
  /// tokens are left, all in the list; 0 where the list does not hold them. `total` becomes the
  /// weight left.
  __device__ int32_t cut_by_sorting(int64_t top_k, float top_p, int64_t candidates, float own,
                                    Units& total) {
    if (top_k > kThreads) {
      return 0;
    }
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    shared.list[thread] = order(own);
    shared.list[thread + kThreads] = 0;
    if (thread == 0) {
      shared.listed = 0;
    }
    __syncthreads();
    sort_descending(shared.list, kThreads);
    const auto pivot =
        static_cast<uint32_t>(shared.list[(top_k > 0 ? top_k : int64_t{kNucleus}) - 1]);
    __syncthreads();
    shared.list[thread] = 0;
    __syncthreads();
    visit([&](float x, int64_t i) {
      if (order(x) >= pivot && candidate(x, weight(x))) {
        const int32_t at = atomicAdd(&shared.listed, 1);
        if (at < kListed) {
          shared.list[at] = listed_token(x, i);
        }
      }
    });
    __syncthreads();
    const int32_t listed = shared.listed;
    if (listed > kListed) {
      return 0;
    }
    int size = 2;
    while (size < listed) {
      size *= 2;
    }
    sort_descending(shared.list, size);
    const auto unit_at = [&](int i) {
      return i < listed ? units(weight(from_order(key_of(shared.list[i])))) : Units{0};
    };
    const Units first = unit_at(2 * thread);
    const Units second = unit_at(2 * thread + 1);
    const Units sum = block_scan(first + second, shared.part);
    shared.sums[2 * thread] = sum - second;
    shared.sums[2 * thread + 1] = sum;
    if (thread == 0) {
      shared.found = 0;
    }
    __syncthreads();
    int32_t count = listed;
    if (top_k > 0) {
      // No more than all candidates: where the list is shorter than top_k it has them all.
      count = static_cast<int32_t>(min(static_cast<int64_t>(listed), top_k));
      total = shared.sums[count - 1];
    }
    if (top_p < 1.0F) {
      const Units enough = wanted(total, top_p);
      for (int i = 2 * thread; i < 2 * thread + 2; ++i) {
        const Units up_to = shared.sums[i];
        if (i < count && up_to >= enough && up_to - unit_at(i) < enough) {
          shared.found = i + 1;
        }
      }
      __syncthreads();
      count = shared.found;
      if (count == 0) {
        return 0;
      }
      total = shared.sums[count - 1];
    }
    last_key = key_of(shared.list[count - 1]);
    last_index = index_of(shared.list[count - 1]);
    return count;
  }

  /// draw() for a few tokens at the beginning of the list.
  __device__ int32_t draw_of_list(int32_t count, bool first, Units target) const {
    const int thread = static_cast<int>(threadIdx.x);
    const auto unit_at = [&](int i) {
      return first ? Units{1} : shared.sums[i] - (i == 0 ? Units{0} : shared.sums[i - 1]);
    };
    __syncthreads();
    if (thread < count) {
      const int32_t index = index_of(shared.list[thread]);
      Units sum = 0;
      for (int i = 0; i < count; ++i) {
        sum += index_of(shared.list[i]) <= index ? unit_at(i) : Units{0};
      }
      if (sum > target && sum - unit_at(thread) <= target) {
        shared.found = index;
      }
    }
    __syncthreads();
    return shared.found;
  }
};

constexpr int kParts = 16;
constexpr int64_t kLongRow = 16384;

/// A block for each part of each row: parts (rows, kParts).
template <class T, int V>
__global__ void __launch_bounds__(kThreads) read_parts(SampleRows<T> a, RowPart* parts) {
  __shared__ Units largest_of[kWarps];
  __shared__ double sum_of[kWarps];
  await_inputs();
  const int64_t r = blockIdx.x / kParts;
  const int part = static_cast<int>(blockIdx.x) % kParts;
  const int64_t n = a.logits.channels;
  const int64_t size = ceil_div(ceil_div(n, kParts), V) * V;
  const int64_t begin = min(part * size, n);
  const int64_t end = min(begin + size, n);
  const auto visit = [&](const auto& f) {
    visit_row<V>(a.logits.row(r), begin, end, static_cast<int>(threadIdx.x), kThreads, f);
  };
  float own = -INFINITY;
  int64_t where = -1;
  visit([&](float x, int64_t i) {
    if (x > own) {
      own = x;
      where = i;
    }
  });
  const uint64_t best = block_largest(where < 0 ? 0 : listed_token(own, where), largest_of);
  const float largest = best == 0 ? 0.0F : from_order(key_of(best));
  ExpSum exps;
  visit([&](float x, int64_t) { exps.add(expf(x - largest)); });
  const double sum = block_total(exps.total(), sum_of);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = {best, sum};
  }
}

/// The largest of the parts' and their sum below it, in the parts' order. A warp calls.
__device__ __forceinline__ RowPart add_up(const RowPart* parts) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const RowPart own = lane < kParts ? parts[lane] : RowPart{};
  RowPart all{own.best, 0.0};
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    all.best = max(all.best, __shfl_xor_sync(kAll, all.best, lanes));
  }
  const auto largest = [](const RowPart& part) {
    return part.best == 0 ? 0.0 : static_cast<double>(from_order(key_of(part.best)));
  };
  // A part of nothing but -infinity adds nothing, however small the largest is.
  const double share = own.sum == 0.0 ? 0.0 : own.sum * exp(largest(own) - largest(all));
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    all.sum += __shfl_sync(kAll, share, p);
  }
  return all;
}

/// parts: of read_parts(), or null.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) sample(SampleRows<T> a, const RowPart* parts) {
  __shared__ Shared shared;
  await_inputs();
  const int64_t r = blockIdx.x;
  Row<T, V> row{.logits = a.logits.row(r), .n = a.logits.channels, .shared = shared};
  if (threadIdx.x == 0) {
    const SamplingConfig config = a.config[r];
    shared.temperature = config.temperature;
    shared.top_k = config.top_k;
    shared.top_p = config.top_p;
    shared.min_p = config.min_p;
    shared.uniform = a.uniform[r];
  }
  if (parts != nullptr && threadIdx.x < 32) {
    const RowPart read = add_up(parts + r * kParts);
    if (threadIdx.x == 0) {
      shared.read = read;
    }
  }
  __syncthreads();
  const bool known = parts != nullptr && shared.read.best != 0;
  const float temperature = shared.temperature;
  // What cuts sort by: this thread's largest logit.
  float own = -INFINITY;
  int64_t where = -1;
  if (!known || temperature != 0.0F) {
    row.visit([&](float x, int64_t i) {
      if (x > own) {
        own = x;
        where = i;
      }
    });
  }
  uint64_t best = known ? shared.read.best
                        : block_largest(where < 0 ? 0 : listed_token(own, where), shared.part);
  if (best == 0) {
    // Nothing above -infinity: the first that is not NaN.
    where = -1;
    row.visit([&](float x, int64_t i) { where = where < 0 && !isnan(x) ? i : where; });
    best = block_largest(where < 0 ? 0 : listed_token(-INFINITY, where), shared.part);
  }
  int32_t token = best == 0 ? -1 : index_of(best);
  row.largest = best == 0 ? NAN : from_order(key_of(best));
  const float top_p = shared.top_p;
  const double uniform = shared.uniform;
  const bool draws = temperature != 0.0F && isfinite(row.largest);
  if (draws) {
    row.exact_inverse = 1.0 / static_cast<double>(temperature);
    row.inverse = static_cast<float>(fmin(row.exact_inverse, static_cast<double>(FLT_MAX)));
    row.min_p = shared.min_p;
  }

  Units total = 0;
  Units candidates = 0;
  double sum = known ? shared.read.sum : 0.0;
  if (!known || draws) {
    ExpSum exps;
    row.visit([&](float x, int64_t) {
      const float plain = expf(x - row.largest);
      exps.add(plain);
      if (draws) {
        const float weight = row.inverse == 1.0F ? plain : row.weight(x);
        if (row.candidate(x, weight)) {
          total += Row<T, V>::units(weight);
          ++candidates;
        }
      }
    });
    sum = block_total(exps.total(), shared.part_double);
  }

  if (draws) {
    total = block_total(total, shared.part);
    const auto count = static_cast<int64_t>(block_total(candidates, shared.part));
    const int64_t top_k = shared.top_k < count ? shared.top_k : 0;
    int32_t listed = 0;
    if (top_k > 0 || top_p < 1.0F) {
      listed = row.cut_by_sorting(top_k, top_p, count, own, total);
      if (listed == 0) {
        total = row.cut_by_bits(top_k, top_p, count, total);
      }
    }
    // A uniform of 0 draws the first token that can be drawn, however little it weighs.
    const bool first = uniform == 0.0;
    const Units target =
        first ? Units{0} : min(static_cast<Units>(uniform * static_cast<double>(total)), total - 1);
    if (listed > 0 && listed <= kFew) {
      token = row.draw_of_list(listed, first, target);
    } else {
      token = row.find(target, [&](float x, int64_t i) -> Units {
        return !row.left(x, i) ? 0 : first ? 1 : Row<T, V>::units(row.weight(x));
      });
    }
  }
  if (threadIdx.x == 0) {
    const int64_t place = a.place(r);
    a.token[place] = token;
    a.log_probability[place] =
        token < 0 ? NAN
                  : static_cast<float>(static_cast<double>(load(row.logits + token)) -
                                       static_cast<double>(row.largest) - log(sum));
  }
}

template <class T>
void run_sample(const SampleRows<T>& a, const Launch& on) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto rows = static_cast<unsigned>(a.logits.count());
  RowPart* parts =
      a.logits.channels >= kLongRow ? scratch<RowPart>(on, int64_t{rows} * kParts) : nullptr;
  const auto run = [&]<int V>() {
    if (parts != nullptr) {
      launch_ahead(on, "sample_rows", read_parts<T, V>, rows * kParts, kThreads, 0, a, parts);
    }
    launch_ahead(on, "sample_rows", sample<T, V>, rows, kThreads, 0, a, parts);
  };
  if (rows_are_packs(a.logits)) {
    run.template operator()<kWidth>();
  } else {
    run.template operator()<1>();
  }
}

}  // namespace

void sample_rows(const SampleRows<float>& a, const Launch& on) {
  run_sample(a, on);
}
void sample_rows(const SampleRows<bf16>& a, const Launch& on) {
  run_sample(a, on);
}

}  // namespace cambium::cuda
