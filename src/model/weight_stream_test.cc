// Weights streamed into the memory of a device, which here is the CPU: what is read, cut, converted
// and summed up does not depend on whose memory it goes to.
#include "model/weight_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>

#include "base/float16.h"
#include "base/random.h"
#include "base/signals.h"
#include "base/test_folder.h"
#include "files/checksums.h"
#include "tensor/arena.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

struct Stored {
  const char* name;
  StoredType type;
  int64_t rows, columns;
};
// Odd sizes, so that pieces end inside tensors and tensors begin inside pieces; one is longer than
// the blocks that are rounded at once.
constexpr Stored kStored[] = {
    {"wide", StoredType::kF64, 3, 5},  {"a", StoredType::kF32, 7, 33},
    {"none", StoredType::kF32, 0, 4},  {"large", StoredType::kF32, 90, 101},
    {"left", StoredType::kF32, 2, 9},  {"b", StoredType::kBF16, 40, 13},
    {"half", StoredType::kF16, 5, 11}, {"c", StoredType::kBF16, 1, 1}};

// Writes the tensors, several files of them where `shard` says so, with checksums.json.
std::string write_model(const TestFolder& folder, uint64_t shard = 0) {
  std::vector<std::vector<std::byte>> bytes;
  std::vector<TensorSource> sources;
  Rng rng(7, 0);
  for (const Stored& s : kStored) {
    auto& values = bytes.emplace_back();
    for (int64_t i = 0; i < s.rows * s.columns; ++i) {
      const double x = 4 * rng.uniform() - 2;
      const auto put = [&](auto value) {
        const auto* at = reinterpret_cast<const std::byte*>(&value);
        values.insert(values.end(), at, at + sizeof value);
      };
      switch (s.type) {
        case StoredType::kF64:
          put(x);
          break;
        case StoredType::kF32:
          put(static_cast<float>(x));
          break;
        case StoredType::kF16:
          put(f32_to_f16(static_cast<float>(x)));
          break;
        default:
          put(f32_to_bf16(static_cast<float>(x)));
      }
    }
  }
  for (size_t i = 0; i < std::size(kStored); ++i) {
    sources.push_back(TensorSource::from_memory(
        kStored[i].name, kStored[i].type, {kStored[i].rows, kStored[i].columns}, bytes[i].data()));
  }
  write_checksums(folder.path(), write_safetensors(folder.at("model.safetensors"), sources,
                                                   {.max_shard_bytes = shard}));
  return folder.path();
}

TEST(WeightStream, FillsEveryTargetWhateverThePiecesAre) {
  for (const uint64_t shard : {uint64_t{0}, uint64_t{1000}}) {
    const TestFolder folder;
    const SafeTensors file =
        SafeTensors::open(write_model(folder, shard), SafeTensors::Check::kHeader);
    EXPECT_EQ(file.files().size() > 1, shard > 0);
    for (const int64_t piece : {8, 24, 100, 1000, 1 << 20}) {
      for (const int readers : {1, 3}) {
        for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
          std::vector<OwnedTensor> owned;
          std::vector<WeightTarget> targets;
          for (const Stored& s : kStored) {
            owned.emplace_back(dtype, std::initializer_list<int64_t>{s.rows, s.columns});
            if (std::strcmp(s.name, "left") != 0) {  // of the file, and wanted by nobody
              targets.push_back({file.at(s.name), owned.back().view});
            }
          }
          std::reverse(targets.begin(), targets.end());
          stream_weights(file, targets, Device::kCpu, {.piece_bytes = piece, .readers = readers});
          for (const WeightTarget& target : targets) {
            std::vector<float> expected = as_f32(target.entry);
            if (dtype == Dtype::kBF16) {
              for (float& x : expected) {
                x = bf16_to_f32(f32_to_bf16(x));
              }
            }
            EXPECT_EQ(elements_of(target.to), expected)
                << target.entry.name << ", pieces of " << piece << ", " << readers << " readers";
          }
        }
      }
    }
  }
}

// Blocks of rows of one stored tensor, as fused projections are.
TEST(WeightStream, FillsPartsOfATensor) {
  const TestFolder folder;
  const SafeTensors file = SafeTensors::open(write_model(folder));
  const TensorEntry& whole = file.at("b");
  const OwnedTensor low(Dtype::kBF16, {20, 13});
  const OwnedTensor high(Dtype::kF32, {20, 13});
  TensorEntry first = whole;
  first.shape[0] = 20;
  first.size = whole.size / 2;
  TensorEntry second = first;
  second.data += first.size;
  stream_weights(file, {{second, high.view}, {first, low.view}}, Device::kCpu, {.piece_bytes = 50});
  std::vector<float> got = elements_of(low.view);
  const std::vector<float> rest = elements_of(high.view);
  got.insert(got.end(), rest.begin(), rest.end());
  EXPECT_EQ(got, as_f32(whole));
}

TEST(WeightStream, ComparesEveryByteWithTheChecksum) {
  const TestFolder folder;
  write_model(folder);
  const std::string path = folder.at("model.safetensors");
  const std::string good = read_text_file(path);
  const auto load = [&](bool verify) {
    const SafeTensors file = SafeTensors::open(folder.path(), SafeTensors::Check::kHeader);
    const OwnedTensor a(Dtype::kF32, {7, 33});
    stream_weights(file, {{file.at("a"), a.view}}, Device::kCpu,
                   {.piece_bytes = 64, .verify = verify});
  };
  load(true);
  // In the last tensor, that nobody asks for, and in the header's spaces.
  const size_t spaces = good.rfind("}", 8 + 1000) + 1;
  ASSERT_EQ(good[spaces], ' ');
  for (const size_t place : {good.size() - 1, good.size() / 2, spaces}) {
    std::string bad = good;
    bad[place] = bad[place] == ' ' ? '\n' : static_cast<char>(bad[place] ^ 1);
    write_file_atomically(path, bad);
    EXPECT_THAT([&] { load(true); }, ThrowsMessage<Error>(HasSubstr("damaged or was changed")))
        << place;
    load(false);
  }
}

TEST(WeightStream, AFileThatBecameShorterIsNamed) {
  const TestFolder folder;
  write_model(folder);
  const SafeTensors file = SafeTensors::open(folder.path(), SafeTensors::Check::kHeader);
  const OwnedTensor c(Dtype::kBF16, {1, 1});
  std::filesystem::resize_file(folder.at("model.safetensors"), 900);
  EXPECT_THAT(
      [&] {
        stream_weights(file, {{file.at("c"), c.view}}, Device::kCpu);
      },
      ThrowsMessage<Error>(HasSubstr("model.safetensors")));
}

TEST(WeightStream, EndsBetweenPiecesWhenItIsAskedTo) {
  const TestFolder folder;
  const SafeTensors file = SafeTensors::open(write_model(folder));
  const OwnedTensor a(Dtype::kF32, {7, 33});
  const StopAnywhere stop("nothing was loaded");
  std::raise(SIGINT);
  EXPECT_THROW(stream_weights(file, {{file.at("a"), a.view}}, Device::kCpu, {.piece_bytes = 8}),
               Interrupted);
}

}  // namespace
}  // namespace cambium
