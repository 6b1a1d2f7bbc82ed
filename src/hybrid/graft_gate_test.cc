// What becomes of the gate of an attention's output.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/testing.h"
#include "hybrid/graft_testing.h"

namespace cambium {
namespace {

using namespace graft_testing;  // NOLINT(google-build-using-namespace)

TEST(Graft, AGateGoesWithItsHead) {
  LoadedModel teacher = make_gated_teacher(false);
  const UnitSpec& attention = *teacher.model->spec().layers[1].mixer();
  const AttentionSizes shape = attention_shape(attention, teacher.model->spec().width);
  const Parameter& q = parameter(*teacher.model, "layers.1.mixer.q_proj.weight");
  const auto expect_rows = [&](const float* rows, bool gate) {
    for (int64_t row = 0; row < shape.heads * shape.dim; ++row) {
      const int64_t from = (row / shape.dim * 2 + (gate ? 1 : 0)) * shape.dim + row % shape.dim;
      ASSERT_TRUE(std::equal(rows + row * shape.width, rows + (row + 1) * shape.width,
                             q.tensor.ptr<float>() + from * shape.width))
          << row;
    }
  };
  LoadedModel delta = convert(*teacher.model, *teacher.model, {1}, {.mixer = "gated_delta_net"}, 7);
  Parameter& in = parameter(*delta.model, "layers.1.mixer.in_proj.weight");
  const auto block = [&](const char* name) {
    return in.tensor.ptr<float>() + rows_of(in, name).begin * shape.width;
  };
  expect_rows(block("z"), true);
  expect_rows(block("q"), false);
  EXPECT_EQ(delta.model->spec().layers[1].mixer()->options.text("", "out_gate"), "sigmoid");
  LoadedModel lightning = convert(*teacher.model, *teacher.model, {1}, {.mixer = "lightning"}, 7);
  expect_rows(parameter(*lightning.model, "layers.1.mixer.gate_proj.weight").tensor.ptr<float>(),
              true);
  LoadedModel kimi = convert(*teacher.model, *teacher.model, {1}, {.mixer = "kimi_delta"}, 7);
  expect_rows(parameter(*kimi.model, "layers.1.mixer.gate_proj.weight").tensor.ptr<float>(), true);
  const Parameter& decay = parameter(*kimi.model, "layers.1.mixer.decay_proj.weight");
  EXPECT_TRUE(std::all_of(decay.tensor.ptr<float>(), decay.tensor.ptr<float>() + decay.numel(),
                          [](float x) { return x == 0.0F; }));
  LoadedModel mamba2 = convert(*teacher.model, *teacher.model, {1}, {.mixer = "mamba2"}, 7);
  const Parameter& of_mamba2 = parameter(*mamba2.model, "layers.1.mixer.in_proj.weight");
  expect_rows(of_mamba2.tensor.ptr<float>() + rows_of(of_mamba2, "z").begin * shape.width, true);
  const Options& options = mamba2.model->spec().layers[1].mixer()->options;
  EXPECT_EQ(options.text("", "out_gate"), "sigmoid");
  EXPECT_TRUE(options.flag("", "norm_first", false));
}

// Mamba's heads are as wide as its state: gates go where the columns of out_proj went, and the
// gate's biases with them.
TEST(Graft, AGateOfMambaGoesWithItsChannels) {
  for (const int64_t state : {8, 2}) {
    LoadedModel teacher = make_gated_teacher(false, Biases::kOfAll);
    const UnitSpec& attention = *teacher.model->spec().layers[1].mixer();
    const AttentionSizes shape = attention_shape(attention, teacher.model->spec().width);
    LoadedModel hybrid =
        convert(*teacher.model, *teacher.model, {1}, {.mixer = "mamba", .state = state}, 7);
    const UnitSpec& mixer = *hybrid.model->spec().layers[1].mixer();
    EXPECT_EQ(mixer.options.text("", "out_gate"), "sigmoid");
    const std::vector<int64_t> channels = find_graft("mamba").output_channels(mixer, shape);
    const auto values = [&](LoadedModel& model, const char* name) {
      return parameter(*model.model, std::string("layers.1.mixer.") + name).tensor.ptr<float>();
    };
    const RowRange z = rows_of(parameter(*hybrid.model, "layers.1.mixer.in_proj.weight"), "z");
    ASSERT_EQ(std::ssize(channels), z.count);
    for (int64_t row = 0; row < z.count; ++row) {
      const int64_t channel = channels[static_cast<size_t>(row)];
      const int64_t from = (channel / shape.dim * 2 + 1) * shape.dim + channel % shape.dim;
      const float* weight = values(hybrid, "in_proj.weight") + (z.begin + row) * shape.width;
      ASSERT_TRUE(std::equal(weight, weight + shape.width,
                             values(teacher, "q_proj.weight") + from * shape.width))
          << row;
      ASSERT_EQ(values(hybrid, "in_proj.bias")[z.begin + row],
                values(teacher, "q_proj.bias")[from]);
      ASSERT_EQ(values(hybrid, "out_proj.weight")[row], values(teacher, "o_proj.weight")[channel]);
    }
  }
}

// Of the attention's channels one alone is heard. Whatever the mixer makes of it, the gate is the
// attention's: at each token it opens and shuts the mixer as it does the attention, where gates of
// zero leave both half open.
TEST(Graft, AGateOpensAsTheAttentionsDoes) {
  for (const char* mixer : {"mamba", "mamba2", "gated_delta_net", "kimi_delta", "lightning"}) {
    for (const int64_t channel : {0, 11, 30}) {
      std::vector<float> of_attention[2];
      std::vector<float> of_mixer[2];
      for (const bool half_open : {false, true}) {
        LoadedModel teacher = make_gated_teacher(false);
        float* o = parameter(*teacher.model, "layers.0.mixer.o_proj.weight").tensor.ptr<float>();
        for (int64_t i = 0; i < 24 * 32; ++i) {
          o[i] *= i % 32 == channel ? 1.0F : 0.0F;
        }
        Parameter& q = parameter(*teacher.model, "layers.0.mixer.q_proj.weight");
        for (int64_t i = 0; i < q.numel(); ++i) {
          q.tensor.ptr<float>()[i] *= i / (8 * 24) % 2 == 0 ? 1.0F : half_open ? 0.0F : 4.0F;
        }
        of_attention[half_open ? 1 : 0] = mixer_output(*teacher.model, 0);
        of_mixer[half_open ? 1 : 0] = mixer_output(
            *convert(*teacher.model, *teacher.model, {0}, {.mixer = mixer}, 7).model, 0);
      }
      double largest = 0.0;
      for (size_t i = 0; i < of_mixer[0].size(); ++i) {
        largest = std::max(largest, std::abs(static_cast<double>(of_mixer[0][i])));
      }
      EXPECT_GT(difference(of_mixer[0], of_mixer[1]), 0.1 * largest) << mixer << " " << channel;
      for (size_t i = 0; i < of_mixer[0].size(); ++i) {
        const double ratio = of_attention[0][i] / of_attention[1][i];  // 2 sigmoid(gate)
        ASSERT_NEAR(of_mixer[0][i], ratio * of_mixer[1][i], 1e-4 * largest)
            << mixer << " " << channel << " " << i;
      }
    }
  }
}

TEST(Graft, AGateThatHasNoPlaceIsRefused) {
  const LoadedModel teacher = make_gated_teacher(false);
  const UnitSpec& attention = *teacher.model->spec().layers[1].mixer();
  UnitSpec biased = attention;
  biased.options.set("qkv_bias", true);
  for (const char* mixer : {"mamba", "gated_delta_net"}) {
    EXPECT_EQ(
        testing::error_of([&] { graft_spec(attention, 24, {.mixer = mixer, .faithful = true}); }),
        std::string("the faithful ") + mixer +
            " has no place for the gate of an attention's output; leave faithful out");
  }
  for (const char* mixer : {"mamba2", "gated_delta_net", "kimi_delta", "lightning"}) {
    EXPECT_EQ(testing::error_of([&] { graft_spec(biased, 24, {.mixer = mixer}); }),
              std::string(mixer) +
                  " has no place for the bias of an attention's output gate; choose mamba or "
                  "sliding_window");
  }
}

}  // namespace
}  // namespace cambium
