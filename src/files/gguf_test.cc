#include "files/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <fstream>

#include "base/error.h"
#include "base/float16.h"
#include "base/test_folder.h"
#include "files/gguf_builder.h"

namespace cambium {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

class GgufTest : public ::testing::Test {
 protected:
  Gguf open(const std::string& bytes) {
    std::remove(path_.c_str());  // a new file is much cheaper than one cut to nothing
    std::ofstream(path_, std::ios::binary) << bytes;
    return Gguf(path_);
  }
  void expect_error(const std::string& bytes, const std::string& message) {
    EXPECT_THAT([&] { open(bytes); },
                ThrowsMessage<Error>(AllOf(HasSubstr(path_), HasSubstr(message))));
  }

  const TestFolder folder_;
  const std::string path_ = folder_.at("model.gguf");
};

/// One file with a key of every type.
GgufBuilder every_type() {
  GgufBuilder b;
  b.raw("u8", 0, GgufBuilder::bytes_of<uint8_t>(200));
  b.raw("i8", 1, GgufBuilder::bytes_of<int8_t>(-100));
  b.raw("u16", 2, GgufBuilder::bytes_of<uint16_t>(60000));
  b.raw("i16", 3, GgufBuilder::bytes_of<int16_t>(-30000));
  b.u32("u32", 4000000000U);
  b.raw("i32", 5, GgufBuilder::bytes_of<int32_t>(-2000000000));
  b.f32("f32", 0.5F);
  b.flag("yes", true);
  b.flag("no", false);
  b.text("text", "hello");
  b.texts("texts", {"a", "", "c"});
  b.i32s("i32s", {1, -2});
  b.raw("u64", 10, GgufBuilder::bytes_of<uint64_t>(~0ULL));
  b.raw("i64", 11, GgufBuilder::bytes_of<int64_t>(-5));
  b.raw("f64", 12, GgufBuilder::bytes_of<double>(0.25));
  b.tensor_f32("t", {2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6});
  b.tensor_f32("s", {}, std::vector<float>{7});
  return b;
}

TEST_F(GgufTest, ReadsEveryType) {
  for (const uint32_t version : {2U, 3U}) {
    GgufBuilder b = every_type();
    b.version = version;
    const Gguf gguf = open(b.file());
    EXPECT_EQ(gguf.integer("u8"), 200);
    EXPECT_EQ(gguf.integer("i8"), -100);
    EXPECT_EQ(gguf.integer("u16"), 60000);
    EXPECT_EQ(gguf.integer("i16"), -30000);
    EXPECT_EQ(gguf.integer("u32"), 4000000000);
    EXPECT_EQ(gguf.integer("i32"), -2000000000);
    EXPECT_EQ(gguf.integer("i64"), -5);
    EXPECT_EQ(gguf.number("f32"), 0.5);
    EXPECT_EQ(gguf.number("f64"), 0.25);
    EXPECT_EQ(gguf.flag("yes"), true);
    EXPECT_EQ(gguf.flag("no"), false);
    EXPECT_EQ(gguf.text("text"), "hello");
    EXPECT_THAT(*gguf.texts("texts"), ElementsAre("a", "", "c"));
    EXPECT_THAT(*gguf.integers("i32s"), ElementsAre(1, -2));
    EXPECT_EQ(gguf.integer("absent"), std::nullopt);

    EXPECT_THAT([&] { (void)gguf.integer("u64"); },
                ThrowsMessage<Error>(HasSubstr("'u64' should be an integer")));
    EXPECT_THAT([&] { (void)gguf.integer("text"); },
                ThrowsMessage<Error>(HasSubstr("'text' should be an integer, but is a text")));
    EXPECT_THAT([&] { (void)gguf.texts("i32s"); },
                ThrowsMessage<Error>(HasSubstr("'i32s' should be a list of texts")));

    const GgufTensor* t = gguf.find("t");
    ASSERT_NE(t, nullptr);
    EXPECT_THAT(t->shape, ElementsAre(2, 3));
    std::vector<float> row(3);
    dequantise_rows(*t, 1, 1, row);
    EXPECT_THAT(row, ElementsAre(4, 5, 6));
    gguf.release(*t);
    std::vector<float> one(1);
    dequantise_rows(*gguf.find("s"), 0, 1, one);
    EXPECT_EQ(one[0], 7);
    EXPECT_EQ(gguf.find("u"), nullptr);
  }
}

// A file cut anywhere before its last tensor byte is an error that names the file.
TEST_F(GgufTest, EveryTruncationIsFound) {
  const std::string whole = every_type().file();
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(open(whole.substr(0, size)), Error) << size;
  }
  EXPECT_NO_THROW(open(whole));
}

// Whatever one byte becomes, the file is read or refused; nothing is read outside it (the
// sanitizers watch).
TEST_F(GgufTest, EveryDamagedByteIsHarmless) {
  const std::string whole = every_type().file();
  for (size_t i = 0; i < whole.size(); ++i) {
    for (const char flip : {'\x01', '\x80', '\xff'}) {
      std::string damaged = whole;
      damaged[i] = static_cast<char>(damaged[i] ^ flip);
      try {
        const Gguf gguf = open(damaged);
        for (const GgufTensor& tensor : gguf.tensors()) {
          std::vector<float> values(static_cast<size_t>(tensor.rows() * tensor.columns()));
          dequantise_rows(tensor, 0, tensor.rows(), values);
        }
      } catch (const Error&) {
      }
    }
  }
}

TEST_F(GgufTest, WrongHeads) {
  expect_error("", "the file ends within its first bytes");
  expect_error("GGML1234567890", "does not begin with 'GGUF'");
  GgufBuilder b;
  b.version = 1;
  expect_error(b.file(), "version 1 cannot be read");
  b.version = 0x03000000U;
  expect_error(b.file(), "big-endian");
  b.version = 3;
  b.extra_keys = int64_t{1} << 60;
  expect_error(b.file(), "the key count claims");
  b.extra_keys = 0;
  b.extra_tensors = -1;
  expect_error(b.file(), "the tensor count claims");
}

TEST_F(GgufTest, WrongKeysAreNamed) {
  using B = GgufBuilder;
  struct Row {
    uint32_t type;
    std::string value;
    const char* message;
  };
  std::string nested = B::bytes_of<uint32_t>(9) + B::bytes_of<uint64_t>(1);
  for (int depth = 0; depth < 3; ++depth) {
    nested += nested.substr(0, 12);
  }
  const Row rows[] = {
      {13, "12345678", "'bad' has a value of unknown type 13"},
      {9, B::bytes_of<uint32_t>(77) + B::bytes_of<uint64_t>(1),
       "'bad' is a list of unknown type 77"},
      {9, B::bytes_of<uint32_t>(4) + B::bytes_of<uint64_t>(~0ULL), "bad claims"},
      {9, nested + nested, "'bad' nests lists"},
      {8, B::bytes_of<uint64_t>(1ULL << 63), "the file ends within bad"},
  };
  for (const Row& row : rows) {
    B b;
    b.raw("bad", row.type, row.value);
    expect_error(b.file(), row.message);
  }
  B twice;
  twice.u32("key", 1);
  twice.u32("key", 2);
  expect_error(twice.file(), "'key' stands twice");
  for (const uint32_t alignment : {0U, 24U}) {
    B b;
    b.u32("general.alignment", alignment);
    expect_error(b.file(), "'general.alignment'");
  }
}

TEST_F(GgufTest, OtherAlignment) {
  GgufBuilder b;
  b.alignment = 64;
  b.u32("general.alignment", 64);
  b.tensor_f32("a", {1}, std::vector<float>{1});
  b.tensor_f32("b", {1}, std::vector<float>{2});
  const Gguf gguf = open(b.file());
  float value = 0;
  dequantise_rows(*gguf.find("b"), 0, 1, {&value, 1});
  EXPECT_EQ(value, 2);
}

TEST_F(GgufTest, WrongTensorsAreNamed) {
  struct Row {
    uint32_t type;
    std::vector<uint64_t> shape;
    int64_t offset;
    const char* message;
  };
  const std::string data(256, '\0');
  const Row rows[] = {
      {0, {1, 1, 1, 1, 1}, -1, "tensor 'bad' has 5 axes"},
      {0, {1ULL << 40, 1ULL << 40}, -1, "tensor 'bad' claims more elements"},
      {0, {~0ULL}, -1, "tensor 'bad' claims more elements"},
      {0, {~0ULL, ~0ULL, 0}, -1, "tensor 'bad' has an axis of size 0"},
      {16, {256}, -1, "tensor 'bad' is stored as IQ2_XXS, which cannot be read"},
      {99, {256}, -1, "tensor 'bad' is stored as number 99"},
      {2, {2, 40}, -1, "tensor 'bad': rows of 40 elements cannot be cut into Q4_0 blocks of 32"},
      {0, {1}, 33, "tensor 'bad' begins at 33"},
      {0, {1}, 320, "tensor 'bad' needs 4 bytes"},
      {0, {1}, int64_t{1} << 62, "tensor 'bad' needs 4 bytes"},
      {0, {65}, -1, "tensor 'bad' needs 260 bytes"},
      {0, {9}, 0, "overlaps tensor"},
  };
  for (const Row& row : rows) {
    GgufBuilder b;
    b.tensor_f32("good", {1}, std::vector<float>{1});
    b.tensor("bad", row.type, row.shape, data, row.offset);
    expect_error(b.file(), row.message);
  }
  GgufBuilder twice;
  twice.tensor_f32("t", {1}, std::vector<float>{1});
  twice.tensor_f32("t", {1}, std::vector<float>{1});
  expect_error(twice.file(), "'t' stands twice");
}

// One block of every type with bytes 37 i + 11 and scales 0.5 (and 0.25): its first and last
// element and sum x[i] (i mod 97 + 1), computed with the `gguf` Python package 0.19.
TEST_F(GgufTest, DequantisesEveryType) {
  struct Row {
    GgufType type;
    std::vector<size_t> scales;  // where the fp16 scales stand in the block
    double first, last, sum;
  };
  const Row rows[] = {
      {GgufType::kF16, {}, -2.625, -2.625, -2.625},
      {GgufType::kBF16, {}, -12.0, -12.0, -12.0},
      {GgufType::kQ8_0, {0}, 42.5, -24.0, -4040.0},
      {GgufType::kQ4_0, {0}, -1.5, 0.0, -259.0},
      {GgufType::kQ4_1, {0, 2}, 7.75, 6.25, 2123.5},
      {GgufType::kQ5_0, {0}, 4.5, 0.5, 56.0},
      {GgufType::kQ5_1, {0, 2}, 9.75, 2.75, 4082.5},
      {GgufType::kQ4_K, {0, 2}, 157.75, 24.25, 1358267.5},
      {GgufType::kQ5_K, {0, 2}, 405.75, 54.25, 2926801.5},
      {GgufType::kQ6_K, {208}, -715.5, -30.0, 280660.0},
      {GgufType::kQ2_K, {80, 82}, 16.5, 2.25, 40958.0},
      {GgufType::kQ3_K, {108}, 40.5, 21.0, 31003.0},
      {GgufType::kIQ4_NL, {0}, -17.5, 0.5, -3459.5},
      {GgufType::kIQ4_XS, {0}, 32.5, -8.0, -308173.0},
      {GgufType::kQ8_K, {}, -48.5, 61.0, 28249.0},  // d is fp32
  };
  for (const Row& row : rows) {
    const GgufBlock& block = gguf_block(row.type);
    std::string bytes;
    for (size_t i = 0; i < block.bytes; ++i) {
      bytes += static_cast<char>(i * 37 + 11);
    }
    if (row.type == GgufType::kQ8_K) {
      bytes.replace(0, 4, GgufBuilder::bytes_of(0.5F));
    } else if (row.scales.empty()) {
      bytes = "\x40\xc1";
    }
    float scale = 0.5F;
    for (const size_t at : row.scales) {
      bytes.replace(at, 2, GgufBuilder::bytes_of(f32_to_f16(scale)));
      scale /= 2;
    }
    const auto columns = static_cast<uint64_t>(block.elements);
    GgufBuilder b;
    b.tensor("t", static_cast<uint32_t>(row.type), {3, columns}, bytes + bytes + bytes);
    const Gguf gguf = open(b.file());
    std::vector<float> x(2 * columns);
    dequantise_rows(*gguf.find("t"), 1, 2, x);
    for (size_t r = 0; r < 2; ++r) {
      double sum = 0;
      for (size_t i = 0; i < columns; ++i) {
        sum += static_cast<double>(x[r * columns + i]) * static_cast<double>(i % 97 + 1);
      }
      EXPECT_EQ(x[r * columns], row.first) << block.name;
      EXPECT_EQ(x[r * columns + columns - 1], row.last) << block.name;
      EXPECT_EQ(sum, row.sum) << block.name;
    }
  }
}

// Four blocks of random bytes, with scales between 1/16 and 1/8: elements 0, the sixth of the third
// block and the last, and sum x[i] (i mod 97 + 1), by the `gguf` Python package 0.19.0.
TEST_F(GgufTest, DequantisesRandomBlocks) {
  struct Row {
    GgufType type;
    std::vector<size_t> scales;  // where the fp16 scales stand in the block
    double first, inside, last, sum;
  };
  const Row rows[] = {
      {GgufType::kQ8_0, {0}, -0.392456055, 6.32958984, 9.0534668, 2899.68909},
      {GgufType::kQ4_0, {0}, 0.0940551758, -0.221557617, -0.219604492, -47.234375},
      {GgufType::kQ4_1, {0, 2}, 0.524414062, 1.12054443, -1.40710449, 3386.06598},
      {GgufType::kQ5_0, {0}, 1.20648193, -0.452880859, -1.56707764, 534.262268},
      {GgufType::kQ5_1, {0, 2}, -2.32507324, 1.44036865, 1.00201416, 1497.29919},
      {GgufType::kQ2_K, {80, 82}, 0.698730469, 0.752319336, -3.67474365, 1371.00751},
      {GgufType::kQ3_K, {108}, -1.27563477, -5.8729248, -8.8515625, -10766.1541},
      {GgufType::kQ4_K, {0, 2}, 37.619751, 31.4938965, -1.2590332, 242687.843},
      {GgufType::kQ5_K, {0, 2}, 29.3756714, -2.78491211, -0.910400391, 1282119.43},
      {GgufType::kQ6_K, {208}, -23.2910156, -407.603027, -101.339539, 285248.822},
      {GgufType::kIQ4_NL, {0}, -3.33514404, 0.84185791, 3.14501953, 1226.08264},
      {GgufType::kIQ4_XS, {0}, 46.5235596, 92.9003906, -18.9794922, 14139.5714},
      {GgufType::kMXFP4, {}, -0.046875, 0.09375, -0.75, -437.429688},
  };
  for (const Row& row : rows) {
    const GgufBlock& block = gguf_block(row.type);
    uint32_t state = 12345 + static_cast<uint32_t>(row.type);
    std::string bytes;
    for (int i = 0; i < 4; ++i) {
      std::string one;
      for (size_t at = 0; at < block.bytes; ++at) {
        state = state * 1664525U + 1013904223U;
        one += static_cast<char>(state >> 24U);
      }
      for (const size_t at : row.scales) {
        one[at + 1] = static_cast<char>(0x2c | (one[at + 1] & 0x83));
      }
      if (row.type == GgufType::kMXFP4) {
        one[0] = static_cast<char>(120 + (one[0] & 7));
      }
      bytes += one;
    }
    const auto columns = static_cast<uint64_t>(4 * block.elements);
    GgufBuilder b;
    b.tensor("t", static_cast<uint32_t>(row.type), {columns}, bytes);
    const Gguf gguf = open(b.file());
    std::vector<float> x(columns);
    dequantise_rows(*gguf.find("t"), 0, 1, x);
    double sum = 0;
    double size = 0;
    for (size_t i = 0; i < columns; ++i) {
      sum += static_cast<double>(x[i]) * static_cast<double>(i % 97 + 1);
      size += std::abs(static_cast<double>(x[i])) * static_cast<double>(i % 97 + 1);
    }
    EXPECT_FLOAT_EQ(x[0], static_cast<float>(row.first)) << block.name;
    EXPECT_FLOAT_EQ(x[columns / 2 + 5], static_cast<float>(row.inside)) << block.name;
    EXPECT_FLOAT_EQ(x[columns - 1], static_cast<float>(row.last)) << block.name;
    EXPECT_NEAR(sum, row.sum, 1e-6 * size) << block.name;
  }
}

}  // namespace
}  // namespace cambium
