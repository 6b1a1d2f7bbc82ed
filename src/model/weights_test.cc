// Where a loaded model's numbers lie: in the mapped file, or in memory of their own.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <cstring>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "files/golden.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

std::string llama() {
  return std::string(kSourceDir) + "/tests/fixtures/llama";  // bf16
}

std::vector<float> logits_of(Model& model) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(std::vector<int32_t>{5, 9, 100, 3, 77, 12});
  const Tensor logits = model.logits(ctx, model.forward(ctx, batch));
  return {logits.ptr<float>(), logits.ptr<float>() + logits.numel()};
}

void save_as(Model& model, const std::string& folder, MatrixStorage storage) {
  SaveOptions options;
  options.storage = storage;
  options.replace = true;
  save_model(model, folder, options);
}

TEST(LoadedWeights, GiveTheSameLogitsWhereverTheyLie) {
  LoadedModel wide = load_model(llama(), {.storage = MatrixStorage::kF32});
  LoadedModel stored = load_model(llama(), {.storage = MatrixStorage::kStored});
  EXPECT_EQ(logits_of(*wide.model), logits_of(*stored.model));
  EXPECT_LT(stored.weights.bytes(), wide.weights.bytes() * 6 / 10);
  EXPECT_GT(stored.load_seconds, 0.0);
  EXPECT_EQ(stored.load_bytes, SafeTensors::open(llama()).total_bytes());
  stored.model->visit([&](const std::string& name, Parameter& p) {
    EXPECT_EQ(p.tensor.dtype, p.shape.size() == 2 ? Dtype::kBF16 : Dtype::kF32) << name;
  });
}

TEST(LoadedWeights, AreNotTheFilesForWhoeverWritesToThem) {
  TestFolder folder;
  {
    LoadedModel model = load_model(llama());
    save_as(*model.model, folder.at("m"), MatrixStorage::kF32);
  }
  const std::string file = folder.at("m") + "/model.safetensors";
  const std::string before = read_text_file(file);
  LoadedModel one = load_model(folder.at("m"));
  LoadedModel other = load_model(folder.at("m"));
  const std::vector<float> expected = logits_of(*other.model);
  one.model->visit([&](const std::string& /*name*/, Parameter& p) {
    std::memset(p.tensor.data, 0, static_cast<size_t>(p.tensor.bytes()));
  });
  EXPECT_NE(logits_of(*one.model), expected);
  EXPECT_EQ(logits_of(*other.model), expected);
  EXPECT_EQ(read_text_file(file), before);
  // Replacing the checkpoint leaves a loaded model as it was.
  save_as(*one.model, folder.at("m"), MatrixStorage::kF32);
  EXPECT_EQ(logits_of(*other.model), expected);
}

TEST(LoadedWeights, BecomeFp32OfTheirOwnWhenTheyAreTrained) {
  const auto down = [](const std::string& name, const Parameter& /*p*/) {
    return name.find(".down.") != std::string::npos;
  };
  for (const bool at_load : {false, true}) {
    LoadOptions options{.storage = MatrixStorage::kStored};
    if (at_load) {
      options.trainable = down;
    }
    LoadedModel model = load_model(llama(), options);
    const std::vector<float> before = logits_of(*model.model);
    model.weights.set_trainable(*model.model, down);
    int64_t trained = 0;
    model.model->visit([&](const std::string& name, Parameter& p) {
      const bool wanted = down(name, p);
      EXPECT_EQ(p.tensor.has_grad(), wanted) << name;
      if (wanted) {
        EXPECT_EQ(p.tensor.dtype, Dtype::kF32) << name;
        ++trained;
      }
    });
    EXPECT_EQ(trained, 3);
    EXPECT_EQ(logits_of(*model.model), before);
  }
}

TEST(LoadedWeights, AreSavedAsAsked) {
  TestFolder folder;
  LoadedModel stored = load_model(llama(), {.storage = MatrixStorage::kStored});
  const std::vector<float> expected = logits_of(*stored.model);
  const struct {
    MatrixStorage storage;
    StoredType matrix;
  } rows[] = {{MatrixStorage::kF32, StoredType::kF32},
              {MatrixStorage::kBF16, StoredType::kBF16},
              {MatrixStorage::kStored, StoredType::kBF16}};
  for (const auto& row : rows) {
    save_as(*stored.model, folder.at("m"), row.storage);
    const SafeTensors file = SafeTensors::open(folder.at("m"));
    for (const TensorEntry& entry : file.tensors()) {
      EXPECT_EQ(entry.dtype, entry.shape.size() == 2 ? row.matrix : StoredType::kF32) << entry.name;
    }
    LoadedModel back = load_model(folder.at("m"), {.storage = MatrixStorage::kStored});
    EXPECT_EQ(logits_of(*back.model), expected);
  }
}

// The golden logits are those of fp32 copies of the weights, and what a model was made of may be
// given back before they are computed: it is read from its file again.
TEST(LoadedWeights, GoldenLogitsDoNotDependOnHowTheyLie) {
  TestFolder folder;
  LoadedModel stored = load_model(llama(), {.storage = MatrixStorage::kStored});
  const std::vector<float> before = logits_of(*stored.model);
  SaveOptions options;
  options.storage = MatrixStorage::kStored;
  options.golden_tokens = {5, 9, 100, 3, 77, 12};
  bool released = false;
  options.written = [&] {
    EXPECT_FALSE(std::filesystem::exists(folder.at("m")));
    stored.weights.release_mapped();
    released = true;
  };
  save_model(*stored.model, folder.at("m"), options);
  EXPECT_TRUE(released);
  EXPECT_EQ(logits_of(*stored.model), before);
  LoadedModel wide = load_model(folder.at("m"), {.storage = MatrixStorage::kF32});
  const auto golden = read_golden(folder.at("m"));
  ASSERT_TRUE(golden.has_value());
  EXPECT_EQ(golden->logits, logits_of(*wide.model));
}

// Files of other writers may put a tensor at any byte.
TEST(LoadedWeights, MayLieAtOddAddressesInTheFile) {
  TestFolder folder;
  const std::string config = read_text_file(llama() + "/config.json");
  std::string bytes = read_text_file(llama() + "/model.safetensors");
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof header);
  bytes.insert(8 + header, " ");
  ++header;
  std::memcpy(bytes.data(), &header, sizeof header);
  make_folder(folder.at("m"));
  write_file_atomically(folder.at("m") + "/config.json", config);
  write_file_atomically(folder.at("m") + "/model.safetensors", bytes);
  LoadedModel even = load_model(llama(), {.storage = MatrixStorage::kStored});
  LoadedModel odd = load_model(folder.at("m"), {.storage = MatrixStorage::kStored});
  EXPECT_EQ(logits_of(*odd.model), logits_of(*even.model));
}

TEST(LoadedWeights, AreRefusedWhenOneBitIsAnother) {
  TestFolder folder;
  {
    LoadedModel model = load_model(llama());
    save_as(*model.model, folder.at("m"), MatrixStorage::kF32);
  }
  const std::string file = folder.at("m") + "/model.safetensors";
  std::string bytes = read_text_file(file);
  bytes[bytes.size() - 3] = static_cast<char>(bytes[bytes.size() - 3] ^ 1);
  write_file_atomically(file, bytes);
  for (const MatrixStorage storage :
       {MatrixStorage::kF32, MatrixStorage::kBF16, MatrixStorage::kStored}) {
    EXPECT_THROW(load_model(folder.at("m"), {.storage = storage}), Error);
  }
}

// Streamed there: the same numbers as in memory of the host, whatever they are converted to.
TEST(OnCuda, LoadedWeightsAreThoseOfTheHost) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const MatrixStorage storage :
       {MatrixStorage::kF32, MatrixStorage::kBF16, MatrixStorage::kStored}) {
    LoadedModel here = load_model(llama(), {.storage = storage});
    LoadedModel there = load_model(llama(), {.storage = storage, .device = Device::kCuda});
    EXPECT_EQ(there.model->activations(),
              storage == MatrixStorage::kF32 ? Dtype::kF32 : Dtype::kBF16);
    std::map<std::string, Tensor> expected;
    here.model->visit(
        [&](const std::string& name, Parameter& p) { expected.emplace(name, p.tensor); });
    there.model->visit([&](const std::string& name, Parameter& p) {
      EXPECT_EQ(p.tensor.dtype, expected.at(name).dtype) << name;
      EXPECT_EQ(elements_of(p.tensor), elements_of(expected.at(name))) << name;
    });
  }
}

}  // namespace
}  // namespace cambium
