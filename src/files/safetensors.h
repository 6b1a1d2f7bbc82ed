// The safetensors format: named tensors in one file (8 bytes of header length, a JSON header, the
// bytes), or in several with `model.safetensors.index.json` beside them. The format's definition:
// https://github.com/huggingface/safetensors#format
//
// Reading maps the files and checks everything a header can get wrong; a damaged file is an Error
// that names file and tensor. Writing streams and is atomic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/file.h"
#include "files/checksums.h"

namespace cambium {

/// Element types as files store them.
enum class StoredType { kF64, kF32, kF16, kBF16, kF8E4M3, kI64, kI32, kI16, kI8, kU8, kBool };

std::string_view stored_type_name(StoredType type);  ///< as in the file: "BF16"
size_t stored_type_size(StoredType type);            ///< bytes

/// A tensor inside a mapped file, valid as long as the SafeTensors it came from. `data` may lie at
/// any address: read it by memcpy or by the functions below unless you checked.
struct TensorEntry {
  std::string name;
  StoredType dtype = StoredType::kF32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  size_t size = 0;  ///< bytes

  int64_t count() const;  ///< elements
  std::span<const std::byte> bytes() const { return {data, size}; }
};

/// "(2, 3)", for messages.
std::string shape_text(std::span<const int64_t> shape);

/// Any float type to fp32 (from F64: rounded). `out` has entry.count() elements.
void copy_as_f32(const TensorEntry& entry, std::span<float> out);
std::vector<float> as_f32(const TensorEntry& entry);
/// Any integer type.
std::vector<int64_t> as_i64(const TensorEntry& entry);

class SafeTensors {
 public:
  enum class Check {
    kHeader,    ///< structure only: reads no tensor byte
    kContents,  ///< also the checksums, where checksums.json beside the files lists them
  };
  /// `path`: a .safetensors file, an .index.json file, or a folder that has model.safetensors or
  /// model.safetensors.index.json.
  static SafeTensors open(const std::string& path, Check check = Check::kContents);

  const std::string& path() const { return path_; }
  /// In the order of the files' bytes.
  const std::vector<TensorEntry>& tensors() const { return tensors_; }
  /// nullptr when there is none of that name.
  const TensorEntry* find(std::string_view name) const;
  /// Error with the nearest name when there is none.
  const TensorEntry& at(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  uint64_t total_bytes() const;
  /// The files, in the order of tensors(): an entry's data lies in the bytes of one of them.
  const std::vector<MappedFile>& files() const { return files_; }
  /// Gives the tensor's resident pages back to the system (it can still be read).
  void release(const TensorEntry& entry) const;

 private:
  SafeTensors() = default;
  void add_file(const std::string& path);
  void add_index(const std::string& index_path);

  std::string path_;
  std::vector<MappedFile> files_;
  std::vector<TensorEntry> tensors_;
  std::unordered_map<std::string, size_t> places_;  // name -> index in tensors_
  std::map<std::string, std::string> metadata_;
};

/// Receives the next bytes of a tensor that is being written.
using PutBytes = std::function<void(std::span<const std::byte>)>;

/// A tensor to write: `write` is called once and hands over all its bytes, in pieces of any size.
struct TensorSource {
  std::string name;
  StoredType dtype = StoredType::kF32;
  std::vector<int64_t> shape;
  std::function<void(const PutBytes&)> write;

  /// Bytes that lie at `data` until the file is written.
  static TensorSource from_memory(std::string name, StoredType dtype, std::vector<int64_t> shape,
                                  const void* data);
};

struct SafeTensorsOptions {
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  /// Above this many bytes of tensors the model is cut into several files; 0: never.
  uint64_t max_shard_bytes = 0;
  /// The index is written for one file too: programs that take every .safetensors file of a folder
  /// without one (vLLM) then know which are the model's.
  bool always_index = false;
  /// Called with the number of tensor bytes written so far.
  std::function<void(uint64_t)> progress = {};
};

/// Writes `path` (".../model.safetensors") or, when it must be cut,
/// ".../model-00001-of-00003.safetensors" and so on with ".../model.safetensors.index.json". The
/// same sources give the same bytes. Within a file wider types come first, so that every tensor is
/// aligned to its element; otherwise the order is the caller's. Returns the checksums of the files.
FileChecksums write_safetensors(const std::string& path, std::vector<TensorSource> tensors,
                                const SafeTensorsOptions& options = {});

}  // namespace cambium
