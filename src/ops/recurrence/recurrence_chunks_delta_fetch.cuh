// Private to recurrence_chunks_delta_cuda.cu: what a walk has in shared memory, how its chunks come
// there, and who tells how far it is.
#pragma once

#include "ops/cuda_bulk.cuh"
#include "ops/recurrence/recurrence_chunks_delta_walk.cuh"

namespace cambium::cuda {

// Four warps walk: S' (value, key), with a quarter of the keys each, and e of 16 tokens each, in
// fp32 in registers; what the others multiply next they give them, rounded, through shared memory.
// Two more fetch what chunks take, some chunks ahead: one v, the other k and what the first kernel
// left as ranges, which newer devices copy by themselves, so that there is little to work out for a
// chunk. One more tells those who read how far the walk is: that takes a fence of the whole device,
// which lasts as long as a chunk and longer, so that nobody whom the walk waits for may stand at
// it.
inline constexpr int kStages = 5;
inline constexpr int kWalkThreads = 256;  // two halves of those who read

template <class Form>
struct WalkShared {
  static constexpr int kKey = Form::kKey;
  static constexpr int kParts = Form::kParts;
  static constexpr int kRow = kKey + 8;
  static constexpr int kValueRow = 16 * kParts + 8;
  struct Stage {
    DeltaKeys<kKey> k;
    DeltaStep step;
    bf16 v[kC * kValueRow];
  };
  Stage stage[kStages];
  Tile states[kParts][kKey / 16];
  Tile reads[kParts][kRowTiles];    // v - exp(G) k S
  Tile written[kParts][kRowTiles];  // f e
};

/// A block's slice of a piece of a head and segment.
template <class Form>
struct WalkPlace {
  HeadPieces<Form> of;
  int64_t piece, slice;
  int64_t before;  // chunks of the segment before the piece
  int64_t first;   // the first chunk
  int count;       // chunks
  int64_t begin, length, position;

  __device__ WalkPlace(const Recurrence<bf16>& a, const DeltaCall& call, int64_t index)
      : of(a, call, call.walked[index / Form::head_walks(call.pieces) / a.heads],
           index / Form::head_walks(call.pieces) % a.heads) {
    const int64_t walk = index % Form::head_walks(call.pieces);
    const int64_t later = (call.pieces - 1) * Form::kAllSlices;
    piece = walk < later ? 1 + walk / Form::kAllSlices : 0;
    slice = walk < later ? walk % Form::kAllSlices : walk - later;
    before = of.begin(piece);
    first = of.first + before;
    count = static_cast<int>(of.chunks_in(piece));
    begin = a.segments.begin(of.segment);
    length = a.segments.length(of.segment);
    position = a.segments.position[of.segment];
  }
  /// Whether the segment has such a piece.
  __device__ bool exists() const { return piece < of.count; }
  /// Whether its columns are the identity's, which nothing is written to.
  __device__ bool of_identity() const { return Form::kPieces && slice >= Form::kSlices; }
  __device__ int64_t token(int c) const { return begin + chunk_begin(position, before + c); }
  __device__ int tokens(int c) const {
    const int64_t next = before + c + 1;
    const int64_t end = next == of.chunks ? length : chunk_begin(position, next);
    return static_cast<int>(end - chunk_begin(position, before + c));
  }
  /// What the walk says when it is done, and the first piece's with the states that come to others.
  __device__ int marks() const {
    return piece == 0 ? count + static_cast<int>(of.count) - 1 : count;
  }
};

/// Barrier of the warps that walk and those that fetch.
__device__ __forceinline__ void sync_walk() {
  sync_threads(2, 192);
}

/// The thread that tells those who read how far the walk is: `done` of `count`. Where it comes late
/// it leaves numbers out.
__device__ __forceinline__ void tell_walked(int32_t* done, int count, int32_t* walked) {
  for (int32_t told = 0; told < count;) {
    const int32_t found = find_in_block(done);
    if (found > told) {
      told = found;
      publish(walked, told);
    } else {
      __nanosleep(100);
    }
  }
}

/// Copies a range by the warp in the background: with its other copies, or as bytes of the barrier.
template <class T>
__device__ __forceinline__ void copy_range(T* to, const T* from, uint64_t* ready) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    copy_bulk(to, from, sizeof(T), ready);
  }
#else
  for (int x = lane; x < static_cast<int>(sizeof(T)) / 16; x += 32) {
    copy_16(reinterpret_cast<uint4*>(to) + x, reinterpret_cast<const uint4*>(from) + x, true);
  }
#endif
}

/// A warp that fetches, some chunks ahead, with walk()'s barriers: fetch() begins a chunk's copies,
/// await() waits for what a warp's groups of copies do not tell, done(c) comes after c chunks.
template <class Fetch, class Await, class Done>
__device__ __forceinline__ void fetch_ahead(int count, const Fetch& fetch, const Await& await,
                                            const Done& done) {
  int left = count;
  const auto next = [&] {
    if (left > 0) {
      fetch();
      --left;
    }
    commit_copies();
  };
#pragma unroll 1
  for (int c = 0; c < kStages - 1; ++c) {
    next();
  }
  wait_for_copies<kStages - 2>();
  await();
  sync_walk();
  for (int c = 0; c < count; ++c) {
    wait_for_copies<kStages - 3>();
    if (c + 1 < count) {
      await();
    }
    sync_walk();
    done(c);
    next();
  }
}

/// Rows of a walk's chunks as they lie, chunk by chunk, by a warp; those past a chunk's tokens are
/// zero.
template <int kWidth>
struct ChunkRows {
  const bf16* from;
  int64_t stride;
  int tokens;  // of the chunk
  int left;    // of the segment from there on

  template <class Form>
  __device__ ChunkRows(const WalkPlace<Form>& at, const View<bf16>& x, int64_t column)
      : from(x.at(at.token(0), column)),
        stride(x.rows.outer_stride),
        tokens(at.tokens(0)),
        left(static_cast<int>(at.begin + at.length - at.token(0))) {}
  __device__ void copy_next(bf16* to) {
    copy_rows<kWidth, 32>(from, stride, tokens, static_cast<int>(threadIdx.x) % 32, to);
    from += tokens * stride;
    left -= tokens;
    tokens = min(left, kC);
  }
};

/// How far the chunks of a walk are prepared, to the warp that fetches them.
struct PreparedChunks {
  const int32_t* own;   // numbers of the head's item, from the next chunk on
  const int32_t* keys;  // of the item that has its keys
  int left;             // chunks
  int known = 0;        // so many of them are there

  /// Waits for the next chunk. Workers have begun before this block, all of them, and wait for
  /// nobody: so it comes, however few blocks the device holds at once and whatever else it runs.
  __device__ void await_next() {
    if (known == 0) {
      const int at = static_cast<int>(threadIdx.x) % 16;
      const int32_t* numbers = threadIdx.x % 32 < 16 ? own : keys;
      for (;;) {
        const bool there = at < left && find(numbers + at) != 0;
        const uint32_t lanes = __ballot_sync(kWholeWarp, there);
        known = __ffs(static_cast<int>(~(lanes & lanes >> 16 & 0xffffU))) - 1;
        if (known > 0) {
          break;
        }
        __nanosleep(100);
      }
      __syncwarp();
#if __CUDA_ARCH__ >= 900
      // What lanes found does not order copies of ranges, which are of another proxy.
      asm volatile("fence.proxy.async;" ::: "memory");
#endif
      own += known;
      keys += known;
      left -= known;
    }
    --known;
  }
};

/// The warp that fetches what is in ranges, and keys where they are not, and says how many chunks
/// are done; `ready` has a barrier for each stage, `chunks` are the call's.
template <class Form>
__device__ __forceinline__ void fetch_ranges(const Recurrence<bf16>& a, int64_t chunks,
                                             const DeltaParts& parts, const WalkPlace<Form>& at,
                                             int32_t* done, uint64_t* ready, WalkShared<Form>& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  using Keys = DeltaKeys<Form::kKey>;
  const int64_t key_head = a.key_head(at.of.h);
  const auto* keys = static_cast<const Keys*>(parts.keys);
  const bool in_rows = keys == nullptr;
  if (!in_rows) {
    keys += at.first * a.key_heads + key_head;
  }
  ChunkRows<Form::kKey> rows(at, a.k, key_head * Form::kKey);
  const DeltaStep* step = parts.step + at.first * a.heads + at.of.h;
  const PrepareItems items(a);
  const int64_t item = items.item(at.of.h);
  PreparedChunks prepared{parts.prepared + item * chunks + at.first,
                          parts.prepared + items.of_keys(item) * chunks + at.first, at.count};
  int to = 0;
  int from = 0;
  uint32_t parity = 0;
  fetch_ahead(
      at.count,
      [&] {
        if constexpr (Form::kPrepares) {
          prepared.await_next();
        }
        auto& stage = s.stage[to];
        if (lane == 0) {
          arrive_expecting(ready + to, sizeof(stage.step) + (in_rows ? 0 : sizeof(stage.k)));
        }
        copy_range(&stage.step, step, ready + to);
        if (in_rows) {
          rows.copy_next(stage.k.row);
        } else {
          copy_range(&stage.k, keys, ready + to);
          keys += a.key_heads;
        }
        step += a.heads;
        to = to + 1 == kStages ? 0 : to + 1;
      },
      [&] {
        await_phase(ready + from, parity);
        const bool last = from + 1 == kStages;
        from = last ? 0 : from + 1;
        parity ^= last ? 1 : 0;
      },
      [&](int c) {
        if (lane == 0) {  // not by who walks: the order it asks for waits for what was written
          publish_in_block(done, c);
        }
      });
}

/// The warp that fetches rows of v.
template <class Form>
__device__ __forceinline__ void fetch_values(const Recurrence<bf16>& a, const WalkPlace<Form>& at,
                                             WalkShared<Form>& s) {
  constexpr int kWidth = 16 * Form::kParts;
  ChunkRows<kWidth> rows(at, a.v, at.of.h * a.dim + (at.of_identity() ? 0 : at.slice * kWidth));
  if (at.of_identity()) {
    rows.tokens = 0;
    rows.left = 0;
  }
  int to = 0;
  fetch_ahead(
      at.count,
      [&] {
        rows.copy_next(s.stage[to].v);
        to = to + 1 == kStages ? 0 : to + 1;
      },
      [] {}, [](int) {});
}

}  // namespace cambium::cuda
