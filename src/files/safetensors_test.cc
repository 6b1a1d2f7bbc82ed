#include "files/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/float16.h"
#include "base/test_folder.h"
#include "files/golden.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

void put(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// A safetensors file around any header, right or wrong.
std::string file_with(std::string_view header, size_t body_bytes) {
  const uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  file += header;
  for (size_t i = 0; i < body_bytes; ++i) {
    file += static_cast<char>(i);
  }
  return file;
}

constexpr const char* kTwo = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                             R"("b":{"dtype":"U8","shape":[1,3],"data_offsets":[8,11]}})";

TEST(SafeTensors, ReadsByHand) {
  const TestFolder folder;
  put(folder.at("m.safetensors"), file_with(kTwo, 11));
  const SafeTensors model = SafeTensors::open(folder.at("m.safetensors"));
  ASSERT_EQ(model.tensors().size(), 2U);
  const TensorEntry& b = model.at("b");
  EXPECT_EQ(b.dtype, StoredType::kU8);
  EXPECT_THAT(b.shape, ElementsAre(1, 3));
  EXPECT_THAT(as_i64(b), ElementsAre(8, 9, 10));
  EXPECT_EQ(model.find("c"), nullptr);
  EXPECT_EQ(model.total_bytes(), 11U);
  EXPECT_THAT([&] { model.at("B"); },
              ThrowsMessage<Error>(AllOf(HasSubstr("m.safetensors"), HasSubstr("no tensor 'B'"),
                                         HasSubstr("did you mean 'b'"))));
  EXPECT_THAT([&] { as_f32(b); }, ThrowsMessage<Error>(HasSubstr("'b' is U8, expected a float")));
  EXPECT_THAT([&] { as_i64(model.at("a")); },
              ThrowsMessage<Error>(HasSubstr("'a' is F32, expected an integer")));
}

TEST(SafeTensors, EmptyAndScalarTensors) {
  const TestFolder folder;
  put(folder.at("m.safetensors"),
      file_with(R"({"e":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},)"
                R"("s":{"dtype":"I32","shape":[],"data_offsets":[0,4]}})",
                4));
  const SafeTensors model = SafeTensors::open(folder.at("m.safetensors"));
  EXPECT_EQ(as_f32(model.at("e")).size(), 0U);
  EXPECT_THAT(as_i64(model.at("s")), ElementsAre(0x03020100));
}

TEST(SafeTensors, DamagedFilesAreNamed) {
  struct Row {
    std::string bytes;
    const char* message;
  };
  const auto entry = [](const char* text, size_t body = 8) { return file_with(text, body); };
  std::string huge_length = file_with(kTwo, 11);
  huge_length[7] = '\x7f';
  const Row rows[] = {
      {"", "empty or cut short"},
      {"1234567", "empty or cut short"},
      {huge_length, "not a safetensors"},
      {file_with(kTwo, 11).substr(0, 40), "cut short"},
      {file_with(kTwo, 10), "tensor 'b': its bytes end at 11, but the file has only 10"},
      {file_with(kTwo, 12), "1 bytes after the last tensor"},
      {entry("nonsense"), "not valid JSON"},
      {entry("[1]"), "not a JSON object"},
      {entry(R"({"a":1})"), "tensor 'a': its header entry is not an object"},
      {entry(R"({"a":{"dtype":"F32","shape":[2]}})"),
       "tensor 'a': its header entry has no \"data_"},
      {entry(R"({"a":{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}})"), "'a': its dtype \"Q9\""},
      {entry(R"({"a":{"dtype":7,"shape":[2],"data_offsets":[0,8]}})"), "'a': its dtype 7"},
      {entry(R"({"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}})"), "'a': its shape is not"},
      {entry(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})"), "has -2, which is no"},
      {entry(R"({"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}})"), "2.5, which is no"},
      {entry(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}})"), "'a': its data_offsets"},
      {entry(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})"), "before they begin"},
      {entry(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})"),
       "tensor 'a': F32 (3) needs 12 bytes, its data_offsets span 8"},
      {entry(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}})"),
       "needs too many bytes"},
      {entry(R"({"a":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,8]}})"),
       "needs too many bytes"},
      {entry(R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},)"
             R"("b":{"dtype":"U8","shape":[5],"data_offsets":[3,8]}})"),
       "tensor 'b' overlaps tensor 'a'"},
      {entry(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
             R"("b":{"dtype":"U8","shape":[5],"data_offsets":[3,8]}})"),
       "1 bytes before tensor 'b'"},
      {entry(R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},)"
             R"("a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})"),
       "'a' stands twice"},
      {entry(R"({"__metadata__":{"x":1},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})"),
       "__metadata__ 'x' is not a string"},
  };
  const TestFolder folder;
  const std::string path = folder.at("model.safetensors");
  for (const Row& row : rows) {
    put(path, row.bytes);
    EXPECT_THAT([&] { SafeTensors::open(path); },
                ThrowsMessage<Error>(AllOf(HasSubstr(path), HasSubstr(row.message))));
  }
}

// Any file cut at any place is an error, never a crash.
TEST(SafeTensors, EveryTruncationIsFound) {
  const TestFolder folder;
  const std::string whole = file_with(kTwo, 11);
  for (size_t size = 0; size < whole.size(); ++size) {
    put(folder.at("m.safetensors"), whole.substr(0, size));
    EXPECT_THROW(SafeTensors::open(folder.at("m.safetensors")), Error) << size;
  }
}

TEST(SafeTensors, ConvertsFloatTypes) {
  const TestFolder folder;
  const double f64[] = {1.5, -2};
  const float f32[] = {1.5F, -2};
  const uint16_t f16[] = {f32_to_f16(1.5F), f32_to_f16(-2)};
  const uint16_t bf16[] = {f32_to_bf16(1.5F), f32_to_bf16(-2)};
  const uint8_t odd = 7;
  write_safetensors(folder.at("m.safetensors"),
                    {TensorSource::from_memory("odd", StoredType::kU8, {1}, &odd),
                     TensorSource::from_memory("f16", StoredType::kF16, {2}, f16),
                     TensorSource::from_memory("bf16", StoredType::kBF16, {2}, bf16),
                     TensorSource::from_memory("f64", StoredType::kF64, {2}, f64),
                     TensorSource::from_memory("f32", StoredType::kF32, {2}, f32)});
  const SafeTensors model = SafeTensors::open(folder.at("m.safetensors"));
  for (const char* name : {"f64", "f32", "f16", "bf16"}) {
    const TensorEntry& entry = model.at(name);
    EXPECT_THAT(as_f32(entry), ElementsAre(1.5F, -2.0F)) << name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(entry.data) % stored_type_size(entry.dtype), 0U);
  }
  EXPECT_EQ(model.metadata().at("format"), "pt");
  model.release(model.at("f64"));
  EXPECT_EQ(as_f32(model.at("f64"))[0], 1.5F);
}

/// Five tensors of 40 bytes.
std::vector<TensorSource> five(const std::vector<float>& values) {
  std::vector<TensorSource> tensors;
  for (const char* name : {"e", "d", "c", "b", "a"}) {
    tensors.push_back(TensorSource::from_memory(name, StoredType::kF32, {2, 5}, values.data()));
  }
  return tensors;
}

TEST(SafeTensors, ShardsAndTheirIndex) {
  const TestFolder folder;
  const std::vector<float> values{0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  uint64_t last = 0;
  const FileChecksums sums =
      write_safetensors(folder.at("model.safetensors"), five(values),
                        {.max_shard_bytes = 100, .progress = [&](uint64_t n) { last = n; }});
  EXPECT_EQ(last, 200U);
  EXPECT_EQ(sums.size(), 4U);  // three shards and the index
  EXPECT_TRUE(fs::exists(folder.at("model-00003-of-00003.safetensors")));
  EXPECT_FALSE(fs::exists(folder.at("model.safetensors")));
  const SafeTensors model = SafeTensors::open(folder.path());
  EXPECT_EQ(model.tensors().size(), 5U);
  for (const TensorEntry& entry : model.tensors()) {
    EXPECT_EQ(as_f32(entry), values);
  }
  EXPECT_EQ(SafeTensors::open(folder.at("model.safetensors.index.json")).tensors().size(), 5U);
}

TEST(SafeTensors, OneFileHasAnIndexWhereItIsAskedFor) {
  const TestFolder folder;
  const std::vector<float> values{0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  EXPECT_EQ(write_safetensors(folder.at("model.safetensors"), five(values)).size(), 1U);
  const std::string index = folder.at("model.safetensors.index.json");
  EXPECT_FALSE(fs::exists(index));
  const FileChecksums sums =
      write_safetensors(folder.at("model.safetensors"), five(values), {.always_index = true});
  EXPECT_TRUE(sums.contains("model.safetensors") && sums.contains("model.safetensors.index.json"));
  write_safetensors(folder.at("other.safetensors"), five(values));
  for (const std::string& path : {folder.path(), index}) {
    EXPECT_EQ(SafeTensors::open(path).tensors().size(), 5U) << path;
  }
}

TEST(SafeTensors, WrongIndexesAreNamed) {
  const std::vector<float> values(10, 1.0F);
  struct Row {
    const char* index;
    const char* message;
  };
  const Row rows[] = {
      {"{", "index is not valid JSON"},
      {R"({"a":1})", "expected an object \"weight_map\""},
      {R"({"weight_map":{"a":"../one.safetensors"}})", "tensor 'a' lies in \"../one.safetensors\""},
      {R"({"weight_map":{"a":3}})", "tensor 'a' lies in 3"},
      {R"({"weight_map":{"a":"absent.safetensors"}})", "absent.safetensors: No such file"},
      {R"({"weight_map":{"a":"one.safetensors","z":"one.safetensors"}})",
       "one.safetensors: tensor 'z' should be in this file"},
      {R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})",
       "two.safetensors: tensor 'a' is also in another file"},
      {R"({"weight_map":{"b":"two.safetensors"}})", "tensor 'a' is in this file, but"},
  };
  const TestFolder folder;
  const auto a = TensorSource::from_memory("a", StoredType::kF32, {10}, values.data());
  const auto b = TensorSource::from_memory("b", StoredType::kF32, {10}, values.data());
  write_safetensors(folder.at("one.safetensors"), {a});
  write_safetensors(folder.at("two.safetensors"), {a, b});
  for (const Row& row : rows) {
    put(folder.at("model.safetensors.index.json"), row.index);
    EXPECT_THAT([&] { SafeTensors::open(folder.path()); },
                ThrowsMessage<Error>(HasSubstr(row.message)));
  }
}

TEST(SafeTensors, FolderWithoutModel) {
  const TestFolder folder;
  EXPECT_THAT([&] { SafeTensors::open(folder.path()); },
              ThrowsMessage<Error>(AllOf(HasSubstr(folder.path()), HasSubstr("found neither"))));
  EXPECT_THAT([&] { SafeTensors::open(folder.at("absent")); },
              ThrowsMessage<Error>(HasSubstr("No such file")));
}

TEST(SafeTensors, WritingIsDeterministicAndAtomic) {
  const TestFolder folder;
  const std::vector<float> values(10, 1.0F);
  write_safetensors(folder.at("1"), five(values));
  write_safetensors(folder.at("2"), five(values));
  EXPECT_EQ(read_text_file(folder.at("1")), read_text_file(folder.at("2")));

  std::vector<TensorSource> tensors = five(values);
  tensors.back().write = [](const PutBytes&) { fail("the source is gone"); };
  EXPECT_THAT([&] { write_safetensors(folder.at("1"), tensors); },
              ThrowsMessage<Error>(HasSubstr("the source is gone")));
  EXPECT_EQ(read_text_file(folder.at("1")), read_text_file(folder.at("2")));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()), 2);
}

class ChecksumsTest : public ::testing::Test {
 protected:
  ChecksumsTest() {
    put(folder_.at("config.json"), "{}\n");
    const auto known = write_safetensors(folder_.at("model.safetensors"), five(values_));
    write_checksums(folder_.path(), known);
  }

  const std::vector<float> values_ = std::vector<float>(10, 1.0F);
  const TestFolder folder_;
};

TEST_F(ChecksumsTest, StreamedAndReadAgree) {
  const auto streamed = read_text_file(folder_.at("checksums.json"));
  write_checksums(folder_.path());
  EXPECT_EQ(read_text_file(folder_.at("checksums.json")), streamed);
  EXPECT_EQ(verify_checksums(folder_.path()), 2U);
  EXPECT_EQ(SafeTensors::open(folder_.path()).tensors().size(), 5U);
}

TEST_F(ChecksumsTest, AFlippedBitIsFound) {
  std::string bytes = read_text_file(folder_.at("model.safetensors"));
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  put(folder_.at("model.safetensors"), bytes);
  const auto damaged = ThrowsMessage<Error>(
      AllOf(HasSubstr(folder_.at("model.safetensors")), HasSubstr("damaged or was changed")));
  EXPECT_THAT([&] { verify_checksums(folder_.path()); }, damaged);
  EXPECT_THAT([&] { SafeTensors::open(folder_.path()); }, damaged);
  EXPECT_NO_THROW(SafeTensors::open(folder_.path(), SafeTensors::Check::kHeader));
}

TEST_F(ChecksumsTest, MissingShortAndMalformed) {
  put(folder_.at("config.json"), "{");
  EXPECT_THAT([&] { verify_checksums(folder_.path()); },
              ThrowsMessage<Error>(AllOf(HasSubstr("config.json has 1 bytes"), HasSubstr("3"))));
  fs::remove(folder_.at("config.json"));
  EXPECT_THAT([&] { verify_checksums(folder_.path()); },
              ThrowsMessage<Error>(HasSubstr("config.json is missing")));
  for (const char* text :
       {"", "[]", R"({"algorithm":"md5","files":{}})", R"({"algorithm":"xxh3-64","files":[]})",
        R"({"algorithm":"xxh3-64","files":{"a":{"bytes":1,"xxh3":"12"}}})",
        R"({"algorithm":"xxh3-64","files":{"a":{"bytes":-1,"xxh3":"0123456789abcdef"}}})",
        R"({"algorithm":"xxh3-64","files":{"../a":{"bytes":1,"xxh3":"0123456789abcdef"}}})"}) {
    put(folder_.at("checksums.json"), text);
    EXPECT_THAT([&] { verify_checksums(folder_.path()); },
                ThrowsMessage<Error>(HasSubstr("checksums.json")))
        << text;
  }
  fs::remove(folder_.at("checksums.json"));
  EXPECT_EQ(verify_checksums(folder_.path()), 0U);
}

TEST(Golden, ComesBack) {
  const TestFolder folder;
  EXPECT_FALSE(read_golden(folder.path()).has_value());
  const Golden golden{{2, 0}, {0.5F, 1, 2, -1, -2, -3}, 3};
  write_golden(folder.path(), golden);
  const auto back = read_golden(folder.path());
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(back->tokens, golden.tokens);
  EXPECT_EQ(back->logits, golden.logits);
  EXPECT_EQ(back->vocabulary, 3);
}

TEST(Golden, WrongFilesAreNamed) {
  const TestFolder folder;
  const int64_t tokens[] = {0, 5};
  const float logits[] = {1, 2, 3, 4, 5, 6};
  const auto t = TensorSource::from_memory("tokens", StoredType::kI64, {2}, tokens);
  struct Row {
    std::vector<TensorSource> tensors;
    const char* message;
  };
  const Row rows[] = {
      {{t}, "no tensor 'logits'"},
      {{TensorSource::from_memory("tokens", StoredType::kI64, {2, 1}, tokens),
        TensorSource::from_memory("logits", StoredType::kF32, {2, 3}, logits)},
       "expected I64 (T), got I64 (2, 1)"},
      {{t, TensorSource::from_memory("logits", StoredType::kF32, {3, 2}, logits)},
       "expected F32 (2, vocabulary), got F32 (3, 2)"},
      {{t, TensorSource::from_memory("logits", StoredType::kF32, {2, 3}, logits)},
       "token 5 is outside the vocabulary of 3"},
  };
  for (const Row& row : rows) {
    write_safetensors(folder.at("golden.safetensors"), row.tensors);
    EXPECT_THAT(
        [&] { read_golden(folder.path()); },
        ThrowsMessage<Error>(AllOf(HasSubstr("golden.safetensors"), HasSubstr(row.message))));
  }
}

}  // namespace
}  // namespace cambium
