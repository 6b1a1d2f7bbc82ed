// Attention past every boundary of its CUDA kernels, as ops/cuda_shapes_test.cc has it of the other
// operations, which also gives CudaHeadDims its dims.
#include "ops/attention/attention.h"
#include "ops/cuda_shapes_testing.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Shape {
  std::vector<int64_t> lengths;
  int64_t heads, kv_heads, dim;
  int64_t window = 0;
  int64_t sinks = 0;
};

std::vector<Input> attention_inputs(const Shape& s) {
  const int64_t t = sum(s.lengths);
  return {{{t, s.heads, s.dim}}, {{t, s.kv_heads, s.dim}}, {{t, s.kv_heads, s.dim}}};
}

AttentionConfig attention_config(const Shape& s) {
  return {
      .scale = 1.0F / std::sqrt(static_cast<float>(s.dim)), .window = s.window, .sinks = s.sinks};
}

void expect_attention_matches_cpu(const Shape& s) {
  SCOPED_TRACE("window " + std::to_string(s.window) + " sinks " + std::to_string(s.sinks));
  const OwnedSegments segments = packed_segments(s.lengths);
  expect_cuda_matches_cpu(
      [&](Context& ctx, const In& in) {
        return attention(ctx, in[0], in[1], in[2], segments.view(), attention_config(s));
      },
      attention_inputs(s), true);
}

/// Fills pages in f8 with the codes of these numbers times 300.
void put_codes(const Tensor& pages, const std::vector<double>& values) {
  const OwnedTensor here(pages.dtype,
                         std::span(pages.shape.data(), static_cast<size_t>(pages.rank)));
  std::transform(values.begin(), values.end(), here.view.ptr<f8e4m3>(),
                 [](double x) { return to_scaled(static_cast<float>(x), 300.0F); });
  copy(pages, here.view);
}

/// The call's tokens follow `before` cached ones in each segment, in pages of `page_size` that
/// stand in another order, with one page more that nobody needs.
void expect_pages_match_cpu(const Shape& s, int64_t before, int64_t page_size) {
  OwnedSegments segments = packed_segments(s.lengths);
  const auto count = static_cast<int64_t>(s.lengths.size());
  const int64_t longest = *std::max_element(s.lengths.begin(), s.lengths.end());
  const int64_t of_segment = (before + longest + page_size - 1) / page_size;
  const int64_t pages = count * of_segment + 1;
  std::fill(segments.position.begin(), segments.position.end(), static_cast<int32_t>(before));
  std::vector<int32_t> table(static_cast<size_t>(count * of_segment));
  for (size_t i = 0; i < table.size(); ++i) {
    table[i] = static_cast<int32_t>(pages - 1) - static_cast<int32_t>(i);
  }
  const std::vector<int64_t> cache{pages, page_size, s.kv_heads, s.dim};
  const auto run = [&](Device device, Dtype type, Dtype stored,
                       const std::vector<std::vector<double>>& values) {
    Workspace workspace(device);
    const WorkspaceScope scope(workspace);
    Context ctx = workspace.context(type);
    const auto inputs = attention_inputs(s);
    std::vector<OwnedTensor> owned;
    const bool scaled = stored == Dtype::kF8E4M3;
    for (size_t i = 0; i < values.size(); ++i) {
      owned.emplace_back(i < 3 ? type : stored,
                         std::span<const int64_t>(i < 3 ? inputs[i].shape : cache), false, device);
      if (i >= 3 && scaled) {
        put_codes(owned.back().view, values[i]);
      } else {
        put(owned.back().view, values[i]);
      }
    }
    for (int i = 0; scaled && i < 2; ++i) {
      owned.emplace_back(Dtype::kBF16, std::span(cache).first(3), false, device);
      fill(owned.back().view, 0.003);
    }
    const KvPages kv = {owned[3].view,
                        owned[4].view,
                        table,
                        of_segment,
                        scaled ? owned[5].view : Tensor{},
                        scaled ? owned[6].view : Tensor{}};
    const Tensor y = attention(ctx, owned[0].view, owned[1].view, owned[2].view, segments.view(),
                               attention_config(s), &kv);
    return take(y);
  };
  auto inputs = attention_inputs(s);
  inputs.push_back({cache});
  inputs.push_back({cache});
  const auto drawn = draw(inputs);
  constexpr std::pair<Dtype, Dtype> kPages[] = {{Dtype::kF32, Dtype::kF32},
                                                {Dtype::kF32, Dtype::kBF16},
                                                {Dtype::kF32, Dtype::kF8E4M3},
                                                {Dtype::kBF16, Dtype::kBF16},
                                                {Dtype::kBF16, Dtype::kF8E4M3}};
  for (const auto& [type, stored] : kPages) {
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type) + " over pages of " + dtype_name(stored));
    auto values = drawn;
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = as_stored(std::move(values[i]), i < 3 ? type : stored);
    }
    const auto y = run(Device::kCuda, type, stored, values);
    EXPECT_LE(norm_error(y, run({}, Dtype::kF32, stored, values)), forward_tolerance(type));
    EXPECT_EQ(run(Device::kCuda, type, stored, values), y) << "two runs differ";
  }
}

TEST_F(CudaShapes, AttentionOverEveryLengthTogether) {
  const std::vector<int64_t> lengths{0, 1, 63, 64, 65, 4097, 0};
  for (const auto& [window, sinks] : {std::pair{0, 0}, {100, 0}, {100, 10}, {20, 200}}) {
    expect_attention_matches_cpu({lengths, 2, 1, 64, window, sinks});
    expect_attention_matches_cpu({lengths, 2, 1, 128, window, sinks});
  }
}

TEST_F(CudaShapes, AttentionOverEveryLengthInPages) {
  const std::vector<int64_t> lengths{0, 1, 63, 64, 65, 1025, 0};
  for (const auto& [window, sinks] : {std::pair{0, 0}, {100, 0}, {100, 10}, {20, 200}}) {
    expect_pages_match_cpu({lengths, 4, 2, 64, window, sinks}, 70, 16);
    expect_pages_match_cpu({lengths, 4, 2, 20, window, sinks}, 70, 16);
  }
}

TEST_F(CudaShapes, AttentionOverManySegments) {
  expect_attention_matches_cpu({std::vector<int64_t>(70000, 1), 2, 1, 4});
}

TEST_F(CudaShapes, AttentionDecodesManySequences) {
  expect_pages_match_cpu({std::vector<int64_t>(70000, 1), 2, 1, 4}, 1, 2);
}

// More pairs of a sequence and a head than a grid is high, by the kernels of models' dims.
TEST_F(CudaShapes, AttentionDecodesManyHeads) {
  expect_pages_match_cpu({std::vector<int64_t>(4200, 1), 16, 16, 64}, 1, 2);
}

// Few heads of keys leave a sequence many blocks, whose parts are more than the lanes that add a
// row up; sequences beside it have others, or one.
TEST_F(CudaShapes, AttentionDecodesFewHeadsInManyParts) {
  for (const int64_t page : {16, 64, 128, 256}) {
    SCOPED_TRACE(page);
    expect_pages_match_cpu({{1}, 14, 2, 64}, 20000, page);
    expect_pages_match_cpu({{1, 1, 1}, 14, 2, 64}, 5000, page);
    expect_pages_match_cpu({{1}, 14, 2, 64, 3000, 100}, 20000, page);
  }
  for (const int64_t before : {700, 1500, 5000}) {
    SCOPED_TRACE(before);
    expect_pages_match_cpu({{1, 2}, 12, 1, 64}, before, 64);
    expect_pages_match_cpu({{1}, 6, 1, 80}, before, 32);
    expect_pages_match_cpu({{1, 1}, 10, 1, 128}, before, 16);
    expect_pages_match_cpu({{1}, 3, 1, 256}, before, 16);
  }
}

// 131,073 tokens at once, and single tokens and a piece of a prompt after as many.
TEST_F(CudaShapes, AttentionOverALongSegment) {
  constexpr int64_t kLong = 2 * 65536 + 1;
  expect_attention_matches_cpu({{kLong}, 2, 1, 64, 100, 10});
  expect_attention_matches_cpu({{kLong}, 2, 1, 20, 33, 0});
  for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{1, 1}, {65}}) {
    expect_pages_match_cpu({lengths, 4, 2, 64}, kLong, 64);
    expect_pages_match_cpu({lengths, 4, 2, 20}, kLong, 16);
  }
}

TEST_P(CudaHeadDims, OfAttention) {
  const int64_t dim = GetParam();
  const std::vector<int64_t> lengths{130, 1, 65};
  for (const auto& [window, sinks] : {std::pair{0, 0}, {33, 0}, {33, 9}, {5, 64}}) {
    expect_attention_matches_cpu({lengths, 4, 2, dim, window, sinks});
    expect_attention_matches_cpu({lengths, 8, 1, dim, window, sinks});
    expect_pages_match_cpu({lengths, 4, 2, dim, window, sinks}, 70, 16);
    expect_pages_match_cpu({{1, 1, 1}, 8, 1, dim, window, sinks}, 600, 16);
  }
}

}  // namespace
}  // namespace cambium
