// Retrieval from texts of any length, the synthetic tasks by which long context is measured: one
// fact at one depth of a text of so many tokens. The words are ours, the tasks those of
//   passkey    Mohtashami and Jaggi, "Landmark attention" (2023); RULER's niah_single
//   keyvalue   Arora et al., "Zoology" (2023), MQAR, as text: many pairs, one is asked for
//   variables  Hsieh et al., "RULER" (2024), variable tracking: chains of assignments
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "eval/tasks.h"
#include "text/tokenizer.h"

namespace cambium {

enum class LongTask : uint8_t { kPasskey, kKeyValue, kVariables };

/// "passkey", "keyvalue", "variables".
const std::vector<std::string>& long_task_names();
bool is_long_task(const std::string& name);

struct LongSpec {
  LongTask task = LongTask::kPasskey;
  int64_t length = 4096;  // tokens of the question, at most; nearly reached
  double depth = 0.5;     // 0..1: where what is asked for stands, of all sentences
  int64_t hops = 4;       // of kVariables: assignments after the first
  int64_t chains = 2;     // of kVariables: of which one is asked for
};

/// Problem `index` of the seed. `count_tokens` says how long a text is for the model that is asked.
/// Error where not even the facts fit into the length.
Example long_example(const LongSpec& spec, uint64_t seed, uint64_t index,
                     const std::function<int64_t(const std::string&)>& count_tokens);

/// The cells of a task of long contexts: all depths of a length, then the next length.
struct LongGrid {
  std::vector<int64_t> lengths;  // tokens
  int64_t depths = 1;
  int64_t answers = 1;  // problems of a cell; in a report, answers to them
};
/// Depths are even from the beginning to the end of a text; a single one is the middle.
double depth_of(int64_t column, int64_t depths);
/// All problems of a grid as one task, which has the same facts at every depth. `name` is one of
/// long_task_names(). Errors as long_example.
Task long_task(const std::string& name, const LongGrid& grid, uint64_t seed,
               const Tokenizer& tokenizer);
/// Several of them as one task.
Task long_tasks(const std::vector<std::string>& names, const LongGrid& grid, uint64_t seed,
                const Tokenizer& tokenizer);
/// The seed of texts that choose, where those of `seed` are reported.
uint64_t choosing_seed(uint64_t seed);
/// Problems of a cell, one at least, so that `tasks` of a grid have about so many in all.
int64_t answers_of_cells(const LongGrid& grid, size_t tasks, int64_t problems);

}  // namespace cambium
