#include "eval/problems/long_context.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "base/error.h"
#include "base/random.h"
#include "base/signals.h"
#include "base/text.h"
#include "eval/problems/phrases.h"

namespace cambium {
namespace {

using Count = std::function<int64_t(const std::string&)>;

std::string digits(Rng& rng, int count) {
  std::string out(1, static_cast<char>('1' + rng.below(9)));
  while (std::ssize(out) < count) {
    out += static_cast<char>('0' + rng.below(10));
  }
  return out;
}

std::string filler(Rng& rng) {
  std::string out(rng.pick(filler_subjects()));
  out.append(" ").append(rng.pick(filler_verbs()));
  return out.append(" ").append(rng.pick(filler_places())).append(".");
}

std::string variable(Rng& rng) {
  std::string out;
  for (int k = 0; k < 5; ++k) {
    out += static_cast<char>('A' + rng.below(26));
  }
  return out;
}

struct Text {
  std::string before, after;             // the sentences
  std::vector<std::string> facts;        // in the order in which they must stand
  std::function<std::string(Rng&)> hay;  // one sentence of the rest
  std::vector<std::string> words;        // of the answer
};

Text passkey(Rng& rng) {
  Text text;
  text.words = {digits(rng, 7)};
  text.before = "Somewhere in the text below a pass key is hidden. Remember it.\n\n";
  text.facts = {"The pass key is " + text.words[0] + ". Remember that " + text.words[0] +
                " is the pass key."};
  text.after = "\n\nWhat is the pass key? Answer with the number alone.";
  text.hay = filler;
  return text;
}

Text key_value(Rng& rng) {
  Text text;
  const std::string key = digits(rng, 6);
  text.words = {digits(rng, 6)};
  text.before = "Below is a list of keys and their values. Remember them.\n\n";
  const auto pair = [](const std::string& k, const std::string& v) {
    return "The value of key " + k + " is " + v + ".";
  };
  text.facts = {pair(key, text.words[0])};
  text.after = "\n\nWhat is the value of key " + key + "? Answer with the number alone.";
  text.hay = [pair, key](Rng& r) {
    std::string other = digits(r, 6);
    while (other == key) {
      other = digits(r, 6);
    }
    return pair(other, digits(r, 6));
  };
  return text;
}

Text variables(const LongSpec& spec, Rng& rng) {
  Text text;
  std::vector<std::string> names;  // all different
  const auto fresh = [&] {
    std::string name = variable(rng);
    while (std::find(names.begin(), names.end(), name) != names.end()) {
      name = variable(rng);
    }
    names.push_back(name);
    return name;
  };
  std::string asked;
  std::vector<std::vector<std::string>> chains;
  for (int64_t c = 0; c < spec.chains; ++c) {
    std::string last = fresh();
    const std::string value = digits(rng, 5);
    chains.push_back({"VAR " + last + " = " + value});
    if (c == 0) {
      asked = value;
      text.words = {last};
    }
    for (int64_t hop = 0; hop < spec.hops; ++hop) {
      const std::string next = fresh();
      chains.back().push_back("VAR " + next + " = VAR " + last);
      last = next;
      if (c == 0) {
        text.words.push_back(next);
      }
    }
  }
  // Chains are dealt in turn, each in its own order.
  for (int64_t hop = 0; hop <= spec.hops; ++hop) {
    for (const auto& chain : chains) {
      text.facts.push_back(chain[static_cast<size_t>(hop)]);
    }
  }
  text.before =
      "The text below hides assignments of variables. Remember which have which value.\n\n";
  text.after = "\n\nFind all " + std::to_string(spec.hops + 1) + " variables that have the value " +
               asked + ". Answer with their names alone.";
  text.hay = filler;
  return text;
}

/// The facts among `count` sentences: one at the depth, several from there to the end, evenly.
std::string written(const Text& text, const std::vector<std::string>& hay, double depth) {
  const auto count = static_cast<double>(hay.size());
  std::string out = text.before;
  size_t fact = 0;
  for (size_t at = 0; at <= hay.size(); ++at) {
    while (fact < text.facts.size()) {
      const double share = depth + (1.0 - depth) * static_cast<double>(fact) /
                                       static_cast<double>(text.facts.size());
      if (static_cast<double>(at) < std::floor(share * count)) {
        break;
      }
      out += text.facts[fact];
      ++fact;
      out += at < hay.size() || fact < text.facts.size() ? " " : "";
    }
    if (at < hay.size()) {
      out += hay[at] + (at + 1 < hay.size() || fact < text.facts.size() ? " " : "");
    }
  }
  return out + text.after;
}

}  // namespace

const std::vector<std::string>& long_task_names() {
  static const std::vector<std::string> kNames = {"passkey", "keyvalue", "variables"};
  return kNames;
}

bool is_long_task(const std::string& name) {
  const auto& names = long_task_names();
  return std::find(names.begin(), names.end(), name) != names.end();
}

Example long_example(const LongSpec& spec, uint64_t seed, uint64_t index,
                     const Count& count_tokens) {
  expect(spec.depth >= 0 && spec.depth <= 1, "expected a depth of 0 to 1, got {}", spec.depth);
  expect(spec.hops >= 1 && spec.hops <= 100 && spec.chains >= 1 && spec.chains <= 100,
         "expected 1 to 100 hops and chains, got {} and {}", spec.hops, spec.chains);
  Rng rng(seed, mix_seed(index, static_cast<uint64_t>(spec.task)));
  const Text text = spec.task == LongTask::kPasskey    ? passkey(rng)
                    : spec.task == LongTask::kKeyValue ? key_value(rng)
                                                       : variables(spec, rng);
  std::vector<std::string> hay;
  const int64_t bare = count_tokens(written(text, hay, spec.depth));
  expect(bare <= spec.length,
         "{}: the question alone has {} tokens, expected a length of {} or more, got {}",
         long_task_names()[static_cast<size_t>(spec.task)], bare, bare, spec.length);
  // Sentences are much alike: what a few cost tells how many are missing, twice over.
  double each = 16.0;
  int64_t now = bare;
  for (int round = 0; round < 4 && now < spec.length; ++round) {
    const auto more = static_cast<int64_t>(static_cast<double>(spec.length - now) / each * 0.995);
    if (more < 1) {
      break;
    }
    for (int64_t k = 0; k < more; ++k) {
      hay.push_back(text.hay(rng));
    }
    now = count_tokens(written(text, hay, spec.depth));
    each = std::max(1.0, static_cast<double>(now - bare) / static_cast<double>(hay.size()));
  }
  while (now > spec.length) {
    const auto fewer =
        static_cast<int64_t>(std::ceil(static_cast<double>(now - spec.length) / each));
    hay.resize(hay.size() - std::min(hay.size(), static_cast<size_t>(std::max<int64_t>(fewer, 1))));
    now = count_tokens(written(text, hay, spec.depth));
  }
  Example out{written(text, hay, spec.depth), "", ""};
  for (const std::string& word : text.words) {
    out.answer += (out.answer.empty() ? "" : " ") + word;
  }
  return out;
}

double depth_of(int64_t column, int64_t depths) {
  return depths == 1 ? 0.5 : static_cast<double>(column) / static_cast<double>(depths - 1);
}

Task long_task(const std::string& name, const LongGrid& grid, uint64_t seed,
               const Tokenizer& tokenizer) {
  CAMBIUM_CHECK(is_long_task(name), "{}", name);
  const auto& names = long_task_names();
  Task task{name, AnswerForm::kWords, {}};
  const auto count = [&](const std::string& text) {
    stop_point();
    return std::ssize(tokenizer.encode(text, true));
  };
  LongSpec spec;
  spec.task = static_cast<LongTask>(std::find(names.begin(), names.end(), name) - names.begin());
  for (const int64_t length : grid.lengths) {
    spec.length = length;
    for (int64_t column = 0; column < grid.depths; ++column) {
      spec.depth = depth_of(column, grid.depths);
      for (int64_t i = 0; i < grid.answers; ++i) {
        task.examples.push_back(long_example(spec, seed, static_cast<uint64_t>(i), count));
      }
    }
  }
  return task;
}

Task long_tasks(const std::vector<std::string>& names, const LongGrid& grid, uint64_t seed,
                const Tokenizer& tokenizer) {
  Task all{join(names, " and "), AnswerForm::kWords, {}};
  for (const std::string& name : names) {
    Task one = long_task(name, grid, seed, tokenizer);
    std::move(one.examples.begin(), one.examples.end(), std::back_inserter(all.examples));
  }
  return all;
}

uint64_t choosing_seed(uint64_t seed) {
  return mix_seed(seed, 1);
}

int64_t answers_of_cells(const LongGrid& grid, size_t tasks, int64_t problems) {
  const int64_t cells = std::ssize(grid.lengths) * grid.depths * static_cast<int64_t>(tasks);
  return std::max<int64_t>(problems / std::max<int64_t>(cells, 1), 1);
}

}  // namespace cambium
