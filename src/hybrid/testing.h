// What the tests of the pipeline share: a plan of three tiny stages and a teacher for it.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "hybrid/pipeline.h"
#include "hybrid/plan.h"
#include "text/tokenizer_train.h"
#include "train/testing.h"

namespace cambium::testing {

inline constexpr const char* kPlan = R"(
name = "tiny"
after_failed_gate = "continue"
[data.problems.word]
min_steps = 2
max_steps = 2
[evaluate]
held_out_documents = 4
held_out_tokens = 320
problems = 3
retrieval = 2
max_new_tokens = 4
contexts = [8]
speed_repeats = 1
[graft]
mixer = "gated_delta_net"
calibrate = 0
[place]
documents = 2
[align]
steps = 3
sequence_length = 320
checkpoint_every = 1
[distill]
steps = 3
sequence_length = 320
checkpoint_every = 1
[[stage]]
name = "one"
layers = 1
gate = {max_reverse_kl = 100.0}
[[stage]]
name = "two"
layers = 2
gate = {max_reverse_kl = 1e-12, retries = 1, retry_steps = 2.0}
[[stage]]
name = "three"
layers = 3
place = {method = "mmr", probe = {steps = 2, sequence_length = 320}}
gate = {min_accuracy_kept = 0.5}
)";

/// The beginning of a plan that measures next to nothing; keys of [evaluate] may follow.
inline const std::string kMeasuresLittle = R"(
name = "tiny"
[evaluate]
held_out_documents = 4
held_out_tokens = 320
problems = 0
contexts = [8]
speed_repeats = 1
)";

/// The plan of this text.
inline HybridPlan read_plan(const std::string& text, const std::vector<std::string>& set = {},
                            const std::string& teacher = "") {
  const TestFolder folder;
  write_file_atomically(folder.at("p.toml"), text);
  return read_hybrid_plan(folder.at("p.toml"), teacher, set);
}

// Writes the teacher with a tokenizer of its own to folder/teacher, and the plan.
inline void write_inputs(const std::string& folder, const std::string& plan, Model& teacher) {
  std::vector<std::string> texts;
  for (uint64_t i = 0; i < 20; ++i) {
    texts.push_back(make_problem({}, Split::kTrain, 1, i).question);
  }
  const TokenizerFiles files = train_tokenizer(
      texts, 300, {"<|end|>"}, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}");
  make_folder(folder + "/tokenizer");
  write_file_atomically(folder + "/tokenizer/tokenizer.json", files.tokenizer_json);
  write_file_atomically(folder + "/tokenizer/tokenizer_config.json", files.config_json);
  SaveOptions save;
  save.tokenizer_from = folder + "/tokenizer";
  save_model(teacher, folder + "/teacher", save);
  write_file_atomically(folder + "/plan.toml", plan);
}

// The same of a teacher with random weights.
inline void write_inputs(const std::string& folder, const std::string& plan = kPlan) {
  ModelSpec spec = tiny_attention(4);
  spec.vocab = 300;
  spec.max_positions = 2048;
  spec.eos_ids = {0};
  write_inputs(folder, plan, *fresh_model(spec, 5).model);
}

inline RunSummary run(const std::string& folder, const std::string& name, bool resume = false,
                      const std::vector<std::string>& set = {}, Device device = {}) {
  const HybridPlan plan = read_hybrid_plan(folder + "/plan.toml", folder + "/teacher", set);
  Progress::silence(true);
  const RunSummary summary = run_pipeline(plan, {folder + "/" + name, resume, "test", device});
  Progress::silence(false);
  return summary;
}

inline std::vector<float> weights_in(const std::filesystem::path& dir) {
  return all_weights(*load_model(dir).model);
}

}  // namespace cambium::testing
