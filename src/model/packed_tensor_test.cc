#include "model/packed_tensor.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/testing.h"

namespace cambium {
namespace {

/// A file of these tensors, each of its bytes.
struct Stored {
  const char* name;
  StoredType type;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};

class PackedTensors : public ::testing::Test {
 protected:
  SafeTensors file_of(const std::vector<Stored>& tensors) {
    std::vector<TensorSource> sources;
    for (const Stored& t : tensors) {
      sources.push_back(TensorSource::from_memory(t.name, t.type, t.shape, t.bytes.data()));
    }
    write_safetensors(path_, std::move(sources));
    return SafeTensors::open(path_);
  }
  std::vector<float> numbers_of(const std::vector<Stored>& tensors, const char* name) {
    const SafeTensors file = file_of(tensors);
    const PackedTensor packed = find_packed(file, name).value();
    int64_t count = 1;
    for (const int64_t size : packed.shape) {
      count *= size;
    }
    std::vector<float> numbers(static_cast<size_t>(count));
    packed.unpack(0, numbers);
    // From the middle it gives the same.
    std::vector<float> half(numbers.begin() + count / 2, numbers.end());
    std::vector<float> again(half.size());
    packed.unpack(count / 2, again);
    EXPECT_EQ(again, half);
    return numbers;
  }

  const std::string path_ =
      (std::filesystem::path(::testing::TempDir()) /
       (std::string("packed_") + ::testing::UnitTest::GetInstance()->current_test_info()->name() +
        ".safetensors"))
          .string();
};

TEST_F(PackedTensors, Fp8HasAScaleForEachBlock) {
  // 2 x 130: the second scale holds from column 128 on. 0x38 is 1, 0xc0 is -2.
  std::vector<uint8_t> bytes(260, 0x38);
  bytes[129] = 0xc0;
  const std::vector<uint8_t> scales = {0x00, 0x40, 0x00, 0x3f};  // bf16 2 and 0.5
  const std::vector<Stored> tensors = {{"w.weight", StoredType::kF8E4M3, {2, 130}, bytes},
                                       {"w.weight_scale_inv", StoredType::kBF16, {1, 2}, scales}};
  const std::vector<float> numbers = numbers_of(tensors, "w.weight");
  EXPECT_EQ(numbers[0], 2.0F);
  EXPECT_EQ(numbers[128], 0.5F);
  EXPECT_EQ(numbers[129], -1.0F);
  EXPECT_EQ(numbers[259], 0.5F);
}

TEST_F(PackedTensors, MxFp4HasAnExponentForThirtyTwo) {
  std::vector<uint8_t> bytes(32, 0x00);
  bytes[0] = 0xf2;   // 1, then -6
  bytes[16] = 0x07;  // 6
  const std::vector<Stored> tensors = {
      {"gate_up_proj_blocks", StoredType::kU8, {1, 2, 1, 16}, bytes},
      {"gate_up_proj_scales", StoredType::kU8, {1, 2, 1}, {128, 126}}};
  const std::vector<float> numbers = numbers_of(tensors, "gate_up_proj_blocks");
  ASSERT_EQ(numbers.size(), 64U);
  EXPECT_EQ(numbers[0], 2.0F);
  EXPECT_EQ(numbers[1], -12.0F);
  EXPECT_EQ(numbers[32], 3.0F);
}

TEST_F(PackedTensors, NvFp4HasAScaleForSixteenAndOneForAll) {
  std::vector<uint8_t> bytes(16, 0x22);                       // ones
  const std::vector<uint8_t> two = {0x00, 0x00, 0x00, 0x40};  // f32 2
  const Stored scales = {"w.weight_scale", StoredType::kF8E4M3, {1, 2}, {0x38, 0x40}};
  const std::vector<float> numbers = numbers_of({{"w.weight", StoredType::kU8, {1, 16}, bytes},
                                                 scales,
                                                 {"w.weight_scale_2", StoredType::kF32, {}, two}},
                                                "w.weight");
  EXPECT_EQ(numbers[0], 2.0F);
  EXPECT_EQ(numbers[16], 4.0F);
  const std::vector<float> divided =
      numbers_of({{"w.weight_packed", StoredType::kU8, {1, 16}, bytes},
                  scales,
                  {"w.weight_global_scale", StoredType::kF32, {1}, two}},
                 "w.weight");
  EXPECT_EQ(divided[0], 0.5F);
  EXPECT_EQ(divided[16], 1.0F);
}

TEST_F(PackedTensors, WhatLacksItsScalesIsNamed) {
  const std::vector<uint8_t> bytes(4, 0x38);
  const auto error = [&](const std::vector<Stored>& tensors) {
    const SafeTensors file = file_of(tensors);
    return testing::error_of([&] { find_packed(file, tensors.front().name); });
  };
  const Stored weight = {"w.weight", StoredType::kF8E4M3, {2, 2}, bytes};
  EXPECT_EQ(error({weight}),
            path_ + ": tensor w.weight is F8_E4M3, whose scales w.weight_scale_inv are missing");
  EXPECT_EQ(error({weight, {"w.weight_scale_inv", StoredType::kF32, {1}, bytes}}),
            path_ + ": tensor w.weight has scales w.weight_scale_inv F32 (1), expected F32 (1, 1)");
  EXPECT_EQ(error({{"w_blocks", StoredType::kU8, {1, 1, 4}, bytes}}),
            path_ + ": tensor w_blocks is U8 (1, 1, 4), expected MXFP4 in blocks of 16 bytes");
}

}  // namespace
}  // namespace cambium
