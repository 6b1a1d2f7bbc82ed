// Channels are the lanes: a block of up to kLanes channels that share their B and C runs through
// all segments with its state (N, kLanes) in cache. Every sum over tokens is taken by one thread in
// order.
#include "base/parallel.h"
#include "base/simd.h"
#include "ops/selective_scan/scan_blocks.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2 = 0.693147180559945309F;

// 2^x for x <= 0, by the parts of x: no overflow to guard against, and nothing below 2^-100, which
// beside 1 is nothing and is far from the subnormal numbers.
vf exp2_negative(vf x) {
  x = vmax(x, vset(-100.0F));
  const vf magic = vset(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);
  // The series of e^(r ln 2): |r| <= 1/2 makes the rest below 1.3e-7.
  vf p = vset(1.5403530393381606e-4F);
  p = p * r + 1.3333558146428441e-3F;
  p = p * r + 9.618129107628477e-3F;
  p = p * r + 5.550410866482158e-2F;
  p = p * r + 2.402265069591007e-1F;
  p = p * r + 6.931471805599453e-1F;
  p = p * r + 1.0F;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
}

int64_t next_block(int64_t begin, int64_t channels, int64_t b_groups, int64_t c_groups) {
  const int64_t b_size = channels / b_groups;
  const int64_t c_size = channels / c_groups;
  int64_t end = begin + kLanes;
  const int64_t b_end = (begin / b_size + 1) * b_size;
  const int64_t c_end = (begin / c_size + 1) * c_size;
  end = end < b_end ? end : b_end;
  return end < c_end ? end : c_end;
}

// One block of channels.
struct Block {
  int64_t index;
  int64_t first;  // channel
  int64_t lanes;  // channels
  int64_t states;
  vf d;
  vf bias;
  float* rate;  // (N, kLanes) A / ln 2
  float* h;     // (N, kLanes)

  vf load(const float* row) const { return vload_upto(row + first, lanes); }
  void store(float* row, vf x) const { vstore_upto(row + first, x, lanes); }
  void add(float* row, vf x) const {
    if (row != nullptr) {
      store(row, load(row) + x);
    }
  }
};

// (channels, N) from `first` on into (N, kLanes), or back.
void load_state(const Block& b, const float* from, float* to) {
  if (b.lanes == kLanes && b.states % kLanes == 0) {
    for (int64_t n = 0; n < b.states; n += kLanes) {
      vf square[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        square[l] = vload(from + (b.first + l) * b.states + n);
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        vstore(to + (n + l) * kLanes, square[l]);
      }
    }
    return;
  }
  for (int64_t n = 0; n < b.states; ++n) {
    for (int64_t l = 0; l < kLanes; ++l) {
      to[n * kLanes + l] = l < b.lanes ? from[(b.first + l) * b.states + n] : 0.0F;
    }
  }
}
void store_state(const Block& b, const float* from, float* to) {
  if (b.lanes == kLanes && b.states % kLanes == 0) {
    for (int64_t n = 0; n < b.states; n += kLanes) {
      vf square[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        square[l] = vload(from + (n + l) * kLanes);
      }
      transpose_square(square);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) {
        vstore(to + (b.first + l) * b.states + n, square[l]);
      }
    }
    return;
  }
  for (int64_t n = 0; n < b.states; ++n) {
    for (int64_t l = 0; l < b.lanes; ++l) {
      to[(b.first + l) * b.states + n] = from[n * kLanes + l];
    }
  }
}

class Scratch {
 public:
  explicit Scratch(float* p) : p_(p) {}
  float* take(int64_t rows) {
    float* p = p_;
    p_ += rows * kScanLanes;
    return p;
  }

 private:
  float* p_;
};

Block make_block(const ScanKernel& a, int64_t index, Scratch& memory) {
  Block b{};
  b.index = index;
  b.first = a.block_start[index];
  b.lanes = a.block_start[index + 1] - b.first;
  b.states = a.op.states;
  b.d = b.load(a.op.d.data);
  b.bias = b.load(a.op.dt_bias.data);
  b.rate = memory.take(b.states);
  b.h = memory.take(b.states);
  load_state(b, a.op.a_log.data, b.rate);
  for (int64_t n = 0; n < b.states; ++n) {
    vstore(b.rate + n * kLanes, vexp(vload(b.rate + n * kLanes)) * -kLog2E);
  }
  return b;
}

void clear(float* p, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    vstore(p + i * kLanes, vf{});
  }
}

// Calls work(block, rest of the scratch memory) for every block of channels, in parallel.
template <class Work>
void for_blocks(const ScanKernel& a, Work work) {
  parallel_for(a.pieces, 1, [&](int64_t piece, int64_t) {
    for (int64_t index = piece; index < a.blocks; index += a.pieces) {
      Scratch memory(a.scratch + piece * scan_scratch(a.op.states));
      const Block b = make_block(a, index, memory);
      work(b, memory);
    }
  });
}

// The step of one token: reads h `before`, writes h `after` (may be the same) and, if kept, the
// decays. Returns sum_n C h.
template <bool kKeep>
inline vf scan_token(const Block& b, vf step, vf written, const float* bt, const float* ct,
                     const float* before, float* after, float* decays) {
  vf y = {};
  vf y2 = {};
  int64_t n = 0;
  const auto one = [&](int64_t i, vf& sum) {
    const vf decay = exp2_negative(step * vload(b.rate + i * kLanes));
    if constexpr (kKeep) {
      vstore(decays + i * kLanes, decay);
    }
    const vf h = decay * vload(before + i * kLanes) + written * bt[i];
    vstore(after + i * kLanes, h);
    sum += h * ct[i];
  };
  for (; n + 4 <= b.states; n += 4) {
    one(n, y);
    one(n + 1, y2);
    one(n + 2, y);
    one(n + 3, y2);
  }
  for (; n < b.states; ++n) {
    one(n, y);
  }
  return y + y2;
}

void forward_block(const ScanKernel& a, const Block& b) {
  const SelectiveScan<float>& op = a.op;
  for (int64_t s = 0; s < op.segments.count; ++s) {
    if (op.segments.continues(s)) {
      load_state(b, op.state_of(s), b.h);
    } else {
      clear(b.h, b.states);
    }
    for (int64_t i = 0; i < op.segments.length(s); ++i) {
      const int64_t t = op.segments.begin(s) + i;
      if (a.chunk_states != nullptr && i % kScanChunk == 0) {
        float* keep = a.chunk_states + (a.first_chunk[s] + i / kScanChunk) * b.states * op.channels;
        for (int64_t n = 0; n < b.states; ++n) {
          b.store(keep + n * op.channels, vload(b.h + n * kLanes));
        }
      }
      const vf u = b.load(op.u.at(t, 0));
      const vf step = vsoftplus(b.load(op.dt.at(t, 0)) + b.bias);
      const vf y = b.d * u + scan_token<false>(b, step, step * u, op.b.at(t, op.b_offset(b.first)),
                                               op.c.at(t, op.c_offset(b.first)), b.h, b.h, nullptr);
      const vf z = b.load(op.z.at(t, 0));
      b.store(op.y.at(t, 0), y * (op.sigmoid ? vsigmoid(z) : vsilu(z)));
    }
    if (op.state != nullptr) {
      store_state(b, b.h, op.state_of(s));
    }
  }
}

// Sums of neighbouring lanes of two vectors: those of x in the lower half, of y in the upper.
vf pair_sums(vf x, vf y) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(x, y, 0, 2, 4, 6) + __builtin_shufflevector(x, y, 1, 3, 5, 7);
#endif
}

// to[n] = the sum of the lanes of row n, for `rows` rows (a multiple of kLanes).
void sum_lanes(const float* from, int64_t rows, float* to) {
  for (int64_t n = 0; n < rows; n += kLanes) {
    vf v[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      v[l] = vload(from + (n + l) * kLanes);
    }
#pragma GCC unroll 4
    for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
      for (int l = 0; l < width; ++l) {
        v[l] = pair_sums(v[2 * l], v[2 * l + 1]);
      }
    }
    vstore(to + n, v[0]);
  }
}

// What backward keeps of a chunk's tokens and of the whole block.
struct Backward {
  float* states;  // (kScanChunk + 1, N, kLanes) before each token, and after the last
  float* decays;  // (kScanChunk, N, kLanes)
  float* dh;      // (N, kLanes)
  float* da;      // (N, kLanes) sum of gh * step
  float* db;      // (N padded, kLanes)
  float* dc;      // (N padded, kLanes)
  float* step;    // (kScanChunk, kLanes)
  float* slope;   // (kScanChunk, kLanes) d step / d raw
  float* y;       // (kScanChunk, kLanes) before the gate
  vf dd = {};
  vf dbias = {};
};

// The states of tokens [t, t + n) again, from the one before them in bw.states.
void recompute(const ScanKernel& a, const Block& b, Backward& bw, int64_t t, int64_t n) {
  const SelectiveScan<float>& op = a.op;
  const int64_t size = b.states * kLanes;
  for (int64_t i = 0; i < n; ++i) {
    const vf u = b.load(op.u.at(t + i, 0));
    const vf raw = b.load(op.dt.at(t + i, 0)) + b.bias;
    const vf step = vsoftplus(raw);
    const vf y =
        b.d * u + scan_token<true>(b, step, step * u, op.b.at(t + i, op.b_offset(b.first)),
                                   op.c.at(t + i, op.c_offset(b.first)), bw.states + i * size,
                                   bw.states + (i + 1) * size, bw.decays + i * size);
    vstore(bw.step + i * kLanes, step);
    vstore(bw.slope + i * kLanes, raw > vset(20.0F) ? vset(1.0F) : vsigmoid(raw));
    vstore(bw.y + i * kLanes, y);
  }
}

// Token t, the i-th of its chunk.
void backward_token(const ScanKernel& a, const Block& b, Backward& bw, int64_t t, int64_t i) {
  const SelectiveScan<float>& op = a.op;
  const int64_t size = b.states * kLanes;
  const float* bt = op.b.at(t, op.b_offset(b.first));
  const float* ct = op.c.at(t, op.c_offset(b.first));
  const float* before = bw.states + i * size;
  const float* after = before + size;
  const float* decays = bw.decays + i * size;
  const vf dout = b.load(op.y.grad_at(t, 0));
  const vf z = b.load(op.z.at(t, 0));
  const vf sigmoid = vsigmoid(z);
  const vf slope = op.sigmoid ? 1.0F - sigmoid : 1.0F + z * (1.0F - sigmoid);
  b.add(op.z.grad_at(t, 0), dout * vload(bw.y + i * kLanes) * sigmoid * slope);
  const vf dy = dout * (op.sigmoid ? sigmoid : z * sigmoid);
  const vf u = b.load(op.u.at(t, 0));
  const vf step = vload(bw.step + i * kLanes);
  const vf written = step * u;
  vf read = {};   // sum_n dh B
  vf drate = {};  // sum_n dh decay h_{t-1} A / ln 2
#pragma GCC unroll 2
  for (int64_t n = 0; n < b.states; ++n) {
    const int64_t at = n * kLanes;
    vstore(bw.dc + at, dy * vload(after + at));
    const vf dh = vload(bw.dh + at) + dy * ct[n];
    vstore(bw.db + at, dh * written);
    read += dh * bt[n];
    const vf passed = dh * vload(decays + at);
    const vf change = passed * vload(before + at);
    drate += change * vload(b.rate + at);
    vstore(bw.da + at, vload(bw.da + at) + change * step);
    vstore(bw.dh + at, passed);
  }
  b.add(op.u.grad_at(t, 0), b.d * dy + step * read);
  const vf draw = (u * read + drate * kLn2) * vload(bw.slope + i * kLanes);
  b.add(op.dt.grad_at(t, 0), draw);
  bw.dbias += draw;
  bw.dd += dy * u;
  const int64_t padded = scan_padded(b.states);
  const int64_t rows = (b.states + kLanes - 1) / kLanes * kLanes;
  const int64_t offset = (t * a.blocks + b.index) * padded;
  if (a.db_blocks != nullptr) {
    sum_lanes(bw.db, rows, a.db_blocks + offset);
  }
  if (a.dc_blocks != nullptr) {
    sum_lanes(bw.dc, rows, a.dc_blocks + offset);
  }
}

void backward_block(const ScanKernel& a, const Block& b, Scratch memory) {
  const SelectiveScan<float>& op = a.op;
  Backward bw{};
  bw.states = memory.take((kScanChunk + 1) * b.states);
  bw.decays = memory.take(kScanChunk * b.states);
  bw.dh = b.h;
  bw.da = memory.take(b.states);
  bw.db = memory.take(scan_padded(b.states));
  bw.dc = memory.take(scan_padded(b.states));
  bw.step = memory.take(kScanChunk);
  bw.slope = memory.take(kScanChunk);
  bw.y = memory.take(kScanChunk);
  clear(bw.da, b.states);
  clear(bw.db, scan_padded(b.states));
  clear(bw.dc, scan_padded(b.states));
  for (int64_t s = 0; s < op.segments.count; ++s) {
    clear(bw.dh, b.states);
    const int64_t length = op.segments.length(s);
    for (int64_t chunk = (length - 1 + kScanChunk) / kScanChunk - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * kScanChunk;
      const int64_t n = begin + kScanChunk < length ? kScanChunk : length - begin;
      const float* kept = a.chunk_states + (a.first_chunk[s] + chunk) * b.states * op.channels;
      for (int64_t i = 0; i < b.states; ++i) {
        vstore(bw.states + i * kLanes, b.load(kept + i * op.channels));
      }
      const int64_t t = op.segments.begin(s) + begin;
      recompute(a, b, bw, t, n);
      for (int64_t i = n - 1; i >= 0; --i) {
        backward_token(a, b, bw, t + i, i);
      }
    }
  }
  b.add(op.d.grad, bw.dd);
  b.add(op.dt_bias.grad, bw.dbias);
  for (int64_t n = 0; op.a_log.grad != nullptr && n < b.states; ++n) {
    float values[kLanes];
    vstore(values, vload(bw.da + n * kLanes) * vload(b.rate + n * kLanes) * kLn2);
    for (int64_t l = 0; l < b.lanes; ++l) {
      op.a_log.grad[(b.first + l) * b.states + n] += values[l];
    }
  }
}

// Adds the parts of all blocks of a group, in order.
template <class Offset>
void sum_blocks(const ScanKernel& a, const float* parts, const View<float>& to, Offset offset) {
  if (parts == nullptr) {
    return;
  }
  const int64_t tokens = a.op.segments.tokens();
  const int64_t padded = scan_padded(a.op.states);
  parallel_for(tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t block = 0; block < a.blocks; ++block) {
        float* grad = to.grad_at(t, offset(a.block_start[block]));
        const float* part = parts + (t * a.blocks + block) * padded;
        for (int64_t n = 0; n < a.op.states; n += kLanes) {
          const int64_t left = a.op.states - n;
          vstore_upto(grad + n, vload_upto(grad + n, left) + vload_upto(part + n, left), left);
        }
      }
    }
  });
}

}  // namespace

void scan_blocks(const ScanBlocks& a) {
  int64_t count = 0;
  a.start[0] = 0;
  while (a.start[count] < a.channels) {
    a.start[count + 1] = next_block(a.start[count], a.channels, a.b_groups, a.c_groups);
    ++count;
  }
  *a.count = count;
}

void scan_blocks_forward(const ScanKernel& a) {
  for_blocks(a, [&](const Block& b, Scratch&) { forward_block(a, b); });
}

void scan_blocks_backward(const ScanKernel& a) {
  for_blocks(a, [&](const Block& b, Scratch& memory) { backward_block(a, b, memory); });
  sum_blocks(a, a.db_blocks, a.op.b, [&](int64_t c) { return a.op.b_offset(c); });
  sum_blocks(a, a.dc_blocks, a.op.c, [&](int64_t c) { return a.op.c_offset(c); });
}

}  // namespace cambium::CAMBIUM_ISA
