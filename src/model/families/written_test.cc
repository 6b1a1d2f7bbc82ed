// What a family writes is what it read: the same tensors by name, shape and value, the same spec,
// the same logits. Every fixture whose family writes, and all of them in our own layout.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "model/weights.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

const std::filesystem::path kFixtures = std::string(kSourceDir) + "/tests/fixtures";

std::vector<std::string> fixtures() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(kFixtures)) {
    if (std::filesystem::exists(entry.path() / "reference.safetensors")) {
      names.push_back(entry.path().filename().string());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<float> logits_of(Model& model) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(std::vector<int32_t>{5, 9, 100, 3, 77, 12, 300, 41});
  return elements_of(model.logits(ctx, model.forward(ctx, batch)));
}

std::map<std::string, std::pair<std::vector<int64_t>, std::vector<float>>> tensors_in(
    const std::string& dir) {
  std::map<std::string, std::pair<std::vector<int64_t>, std::vector<float>>> tensors;
  const SafeTensors file = SafeTensors::open(dir);
  for (const TensorEntry& entry : file.tensors()) {
    tensors[entry.name] = {entry.shape, as_f32(entry)};
  }
  return tensors;
}

class WrittenFamily : public ::testing::TestWithParam<std::string> {};

TEST_P(WrittenFamily, IsWhatWasRead) {
  const std::string dir = (kFixtures / GetParam()).string();
  const ModelSpec spec = read_spec(dir);
  EXPECT_TRUE(expresses(find_family("cambium"), spec));
  if (!expresses(find_family(spec.family), spec)) {
    GTEST_SKIP() << spec.family << " is read only";
  }
  const TestFolder folder;
  const LoadedModel read = load_model(dir);
  save_model(*read.model, folder.at("again"), {});
  const LoadedModel again = load_model(folder.at("again"));
  EXPECT_EQ(again.model->spec(), spec);
  EXPECT_EQ(logits_of(*again.model), logits_of(*read.model));
  if (read_text_file(dir + "/config.json").find("quantization_config") != std::string::npos) {
    return;  // what was packed is written as the numbers it stands for
  }
  const auto before = tensors_in(dir);
  const auto after = tensors_in(folder.at("again"));
  for (const auto& [name, tensor] : after) {
    const auto it = before.find(name);
    ASSERT_NE(it, before.end()) << name;
    EXPECT_EQ(tensor.first, it->second.first) << name;
    // Constants may have been bf16.
    for (size_t i = 0; i < tensor.second.size(); ++i) {
      ASSERT_NEAR(tensor.second[i], it->second.second[i], 1e-8) << name << " " << i;
    }
  }
  EXPECT_EQ(after.size(), before.size());
}

INSTANTIATE_TEST_SUITE_P(Fixtures, WrittenFamily, ::testing::ValuesIn(fixtures()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace cambium
