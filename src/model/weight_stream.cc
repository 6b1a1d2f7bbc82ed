#include "model/weight_stream.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <filesystem>
#include <mutex>
#include <optional>
#include <thread>

#include "base/checksum.h"
#include "base/float16.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "base/signals.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

constexpr int kMostReaders = 8;
constexpr int64_t kProgressFrom = int64_t{1} << 30;  // bytes; less is there before it is read

/// Some elements of a tensor inside a piece.
struct Part {
  size_t offset = 0;  // in the piece
  size_t bytes = 0;   // there
  StoredType stored = StoredType::kF32;
  Dtype dtype = Dtype::kF32;
  char* to = nullptr;
  int64_t converted = -1;  // offset in the slot's converted elements; -1 = copied as they are
  size_t to_bytes = 0;
};

/// Consecutive bytes of a file.
struct Piece {
  size_t file = 0;
  size_t begin = 0;
  size_t bytes = 0;
  std::vector<Part> parts;
  int64_t converted_bytes = 0;
};

bool as_stored(StoredType stored, Dtype dtype) {
  return dtype == Dtype::kBF16 ? stored == StoredType::kBF16 : stored == StoredType::kF32;
}

/// Cuts the files into pieces. Bytes that nobody wants are part of them only where the checksum
/// needs them.
class Cutter {
 public:
  Cutter(size_t file, size_t most, std::vector<Piece>& pieces)
      : file_(file), most_(most), pieces_(pieces) {}

  void skip(size_t begin, size_t end) {
    for (size_t at = begin; at < end;) {
      Piece& piece = with_room(at, 1);
      const size_t bytes = std::min(end - at, most_ - piece.bytes);
      piece.bytes += bytes;
      at += bytes;
    }
  }
  void take(size_t begin, const WeightTarget& target) {
    const size_t element = stored_type_size(target.entry.dtype);
    const auto to_element = static_cast<size_t>(dtype_size(target.to.dtype));
    auto* to = static_cast<char*>(target.to.data);
    for (size_t done = 0; done < target.entry.size;) {
      Piece& piece = with_room(begin + done, element);
      const size_t bytes =
          std::min(target.entry.size - done, (most_ - piece.bytes) / element * element);
      Part part{piece.bytes,
                bytes,
                target.entry.dtype,
                target.to.dtype,
                to + done / element * to_element,
                -1,
                bytes / element * to_element};
      if (!as_stored(part.stored, part.dtype)) {
        part.converted = piece.converted_bytes;
        piece.converted_bytes += static_cast<int64_t>((part.to_bytes + 63) / 64 * 64);
      }
      piece.parts.push_back(part);
      piece.bytes += bytes;
      done += bytes;
    }
  }

 private:
  // The piece that goes on at `at` and has room for `bytes`.
  Piece& with_room(size_t at, size_t bytes) {
    const bool goes_on = !pieces_.empty() && pieces_.back().file == file_ &&
                         pieces_.back().begin + pieces_.back().bytes == at &&
                         pieces_.back().bytes + bytes <= most_;
    if (!goes_on) {
      pieces_.push_back({file_, at, 0, {}, 0});
    }
    return pieces_.back();
  }

  size_t file_;
  size_t most_;
  std::vector<Piece>& pieces_;
};

void cut_file(size_t index, const MappedFile& file, std::span<const WeightTarget> targets,
              bool all_bytes, size_t most, std::vector<Piece>& pieces) {
  const std::byte* start = file.bytes().data();
  Cutter cutter(index, most, pieces);
  size_t at = 0;
  for (const WeightTarget& target : targets) {
    const auto begin = static_cast<size_t>(target.entry.data - start);
    CAMBIUM_CHECK(begin >= at, "{} overlaps another", target.entry.name);
    if (all_bytes) {
      cutter.skip(at, begin);
    }
    cutter.take(begin, target);
    at = begin + target.entry.size;
  }
  if (all_bytes) {
    cutter.skip(at, file.bytes().size());
  }
}

// A constant count: the compiler then takes vectors.
template <size_t kCount>
void round_all(const float* from, bf16* to) {
  for (size_t i = 0; i < kCount; ++i) {
    to[i].bits = f32_to_bf16(from[i]);
  }
}

void convert(const Part& part, const std::byte* from, std::byte* to) {
  TensorEntry entry;
  entry.dtype = part.stored;
  entry.data = from;
  entry.size = part.bytes;
  const auto count = static_cast<size_t>(entry.count());
  if (part.dtype == Dtype::kF32) {
    copy_as_f32(entry, {reinterpret_cast<float*>(to), count});
    return;
  }
  auto* out = reinterpret_cast<bf16*>(to);
  constexpr size_t kStep = 4096;
  float values[kStep];
  for (size_t i = 0; i < count; i += kStep) {
    const size_t n = std::min(kStep, count - i);
    TensorEntry some = entry;
    some.size = n * stored_type_size(part.stored);
    some.data = from + i * stored_type_size(part.stored);
    copy_as_f32(some, {values, n});
    if (n == kStep) {
      round_all<kStep>(values, out + i);
    } else {
      std::transform(values, values + n, out + i, round_to_bf16);
    }
  }
}

/// The threads that read. Piece i comes into slot i modulo the slots, when what was there is no
/// longer needed.
class Readers {
 public:
  Readers(const std::vector<Piece>& pieces, const std::vector<FileReader>& files, int threads,
          size_t slots, Device device)
      : pieces_(pieces), files_(files), states_(pieces.size()) {
    size_t raw = 0;
    int64_t converted = 0;
    for (const Piece& piece : pieces) {
      raw = std::max(raw, piece.bytes);
      converted = std::max(converted, piece.converted_bytes);
    }
    for (size_t i = 0; i < slots; ++i) {
      raw_.push_back(Buffer::pinned(static_cast<int64_t>(raw), device));
      converted_.push_back(converted > 0 ? Buffer::pinned(converted, device) : Buffer());
    }
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this] { work(); });
    }
  }
  Readers(const Readers&) = delete;
  Readers& operator=(const Readers&) = delete;
  ~Readers() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }

  /// Waits until piece i is there; throws what kept it from coming.
  void wait(size_t i) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return states_[i].ready || states_[i].error != nullptr; });
    if (states_[i].error != nullptr) {
      std::rethrow_exception(states_[i].error);
    }
  }
  const std::byte* raw(size_t i) const { return bytes_of(raw_, i); }
  const std::byte* converted(size_t i) const { return bytes_of(converted_, i); }
  /// The first `count` pieces are no longer needed.
  void release(size_t count) {
    {
      const std::lock_guard lock(mutex_);
      released_ = count;
    }
    changed_.notify_all();
  }

 private:
  struct State {
    bool ready = false;
    std::exception_ptr error;
  };

  std::byte* bytes_of(const std::vector<Buffer>& slots, size_t i) const {
    return static_cast<std::byte*>(slots[i % slots.size()].data());
  }

  void work() {
    for (;;) {
      size_t i = 0;
      {
        std::unique_lock lock(mutex_);
        i = next_++;
        if (i >= pieces_.size()) {
          return;
        }
        changed_.wait(lock, [&] { return ended_ || i < released_ + raw_.size(); });
        if (ended_) {
          return;
        }
      }
      State state;
      try {
        read(i);
        state.ready = true;
      } catch (...) {
        state.error = std::current_exception();
      }
      {
        const std::lock_guard lock(mutex_);
        states_[i] = state;
      }
      changed_.notify_all();
    }
  }

  void read(size_t i) {
    const Piece& piece = pieces_[i];
    std::byte* raw = bytes_of(raw_, i);
    files_[piece.file].read(piece.begin, {raw, piece.bytes});
    for (const Part& part : piece.parts) {
      if (part.converted >= 0) {
        convert(part, raw + part.offset, bytes_of(converted_, i) + part.converted);
      }
    }
  }

  const std::vector<Piece>& pieces_;
  const std::vector<FileReader>& files_;
  std::vector<Buffer> raw_, converted_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<State> states_;
  size_t next_ = 0;
  size_t released_ = 0;
  bool ended_ = false;
  std::vector<std::thread> threads_;
};

/// What checksums.json says of each file; nothing where it does not list it.
std::vector<std::optional<FileChecksum>> expected_sums(const SafeTensors& file, bool verify) {
  std::vector<std::optional<FileChecksum>> sums(file.files().size());
  const std::string folder = std::filesystem::path(file.path()).parent_path().string();
  const auto all = verify ? read_checksums(folder.empty() ? "." : folder) : std::nullopt;
  if (!all) {
    return sums;
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    const MappedFile& each = file.files()[i];
    const auto found = all->find(std::filesystem::path(each.path()).filename().string());
    if (found != all->end()) {
      expect_bytes(found->second, each.path(), each.bytes().size());
      sums[i] = found->second;
    }
  }
  return sums;
}

std::vector<Piece> cut(const SafeTensors& file, std::vector<WeightTarget>& targets,
                       const std::vector<std::optional<FileChecksum>>& sums, size_t most) {
  std::sort(targets.begin(), targets.end(), [](const WeightTarget& a, const WeightTarget& b) {
    return a.entry.data < b.entry.data;
  });
  std::vector<Piece> pieces;
  size_t taken = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const MappedFile& each = file.files()[i];
    const std::byte* begin = each.bytes().data();
    const auto inside = [&](const WeightTarget& t) {
      return t.entry.data >= begin && t.entry.data < begin + each.bytes().size();
    };
    const auto first = std::find_if(targets.begin(), targets.end(), inside);
    const auto last = std::find_if_not(first, targets.end(), inside);
    cut_file(i, each, std::span(first, last), sums[i].has_value(), most, pieces);
    taken += static_cast<size_t>(last - first);
  }
  CAMBIUM_CHECK(taken == targets.size(), "{} of {} tensors are of the file", taken, targets.size());
  return pieces;
}

}  // namespace

void stream_weights(const SafeTensors& file, std::vector<WeightTarget> targets, Device device,
                    const WeightStreamOptions& options) {
  std::erase_if(targets, [](const WeightTarget& t) { return t.entry.size == 0; });
  for (const WeightTarget& target : targets) {
    CAMBIUM_CHECK(target.to.contiguous() && target.to.numel() == target.entry.count() &&
                      target.to.device == device &&
                      (target.to.dtype == Dtype::kF32 || target.to.dtype == Dtype::kBF16),
                  "{} into {}", target.entry.name, target.to);
  }
  CAMBIUM_CHECK(options.piece_bytes >= 8);
  const auto sums = expected_sums(file, options.verify);
  const std::vector<Piece> pieces =
      cut(file, targets, sums, static_cast<size_t>(options.piece_bytes));
  std::vector<FileReader> files;
  uint64_t total = 0;
  for (const MappedFile& each : file.files()) {
    files.emplace_back(each.path());
    expect(files.back().size() == each.bytes().size(), "{}: it was changed while it was read",
           each.path());
  }
  for (const Piece& piece : pieces) {
    total += piece.bytes;
  }
  const int wanted = options.readers > 0 ? options.readers : std::min(kMostReaders, num_threads());
  const int threads = std::min(wanted, static_cast<int>(std::min<size_t>(pieces.size(), 64)));
  // What the threads read, what is summed up and what is copied, at once.
  const size_t slots = std::min(pieces.size(), static_cast<size_t>(threads) + 2);
  Progress progress(
      options.label, total,
      {.bytes = true,
       .mode = static_cast<int64_t>(total) < kProgressFrom ? Progress::Mode::kSilent
                                                           : Progress::default_mode()});
  Readers readers(pieces, files, threads, slots, device);
  const std::unique_ptr<CopyQueue> queue = CopyQueue::on(device);
  std::vector<Checksum> digests(files.size());
  uint64_t done = 0;
  int64_t before = -1;  // the mark of the piece before
  for (size_t i = 0; i < pieces.size(); ++i) {
    stop_point();
    const Piece& piece = pieces[i];
    readers.wait(i);
    for (const Part& part : piece.parts) {
      const std::byte* from = part.converted >= 0 ? readers.converted(i) + part.converted
                                                  : readers.raw(i) + part.offset;
      queue->copy(part.to, from, static_cast<int64_t>(part.to_bytes));
    }
    const int64_t mark = queue->mark();
    if (sums[piece.file]) {
      digests[piece.file].update({readers.raw(i), piece.bytes});
    }
    queue->wait(before);
    readers.release(i);
    before = mark;
    done += piece.bytes;
    progress.update(done);
  }
  queue->wait(before);
  for (size_t i = 0; i < files.size(); ++i) {
    if (sums[i]) {
      expect_digest(*sums[i], files[i].path(), digests[i].digest());
    }
  }
  progress.finish();
}

}  // namespace cambium
