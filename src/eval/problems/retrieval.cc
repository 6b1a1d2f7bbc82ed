// Retrieval problems: numbered codes of things, hidden among sentences that say nothing.
#include <xxhash.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "base/random.h"
#include "eval/problems/phrases.h"
#include "eval/problems/problems.h"

namespace cambium {
namespace {

struct Fact {
  std::string key;    // "red lantern"
  std::string value;  // "4821"
  std::string text() const { return "The code of the " + key + " is " + value + "."; }
};

std::string name_of(int64_t colour, int64_t object) {
  return std::string(fact_colours()[static_cast<size_t>(colour)]) + " " +
         std::string(fact_objects()[static_cast<size_t>(object)]);
}

std::vector<std::string> draw_names(int64_t count, Rng& rng) {
  const auto objects = static_cast<int64_t>(fact_objects().size());
  const Permutation keys(max_retrieval_facts(), rng.next());
  std::vector<std::string> names;
  for (int64_t k = 0; k < count; ++k) {
    names.push_back(name_of(keys(k) / objects, keys(k) % objects));
  }
  return names;
}

/// Names of as few words as they can have: nearly each word is in several of them.
std::vector<std::string> draw_alike_names(int64_t count, Rng& rng) {
  const auto up = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  int64_t side = 1;
  while (side * side < count) {
    ++side;
  }
  const auto colours = static_cast<int64_t>(fact_colours().size());
  const int64_t rows = std::min(colours, rng.chance(0.5) ? side : up(count, side));
  const int64_t columns = up(count, rows);
  const Permutation colour(colours, rng.next());
  const Permutation object(static_cast<int64_t>(fact_objects().size()), rng.next());
  const Permutation cell(rows * columns, rng.next());
  std::vector<std::string> names;
  for (int64_t k = 0; k < count; ++k) {
    names.push_back(name_of(colour(cell(k) / columns), object(cell(k) % columns)));
  }
  return names;
}

std::vector<Fact> draw_facts(int64_t count, const RetrievalSpec& spec, Rng& rng) {
  const std::vector<std::string> names = spec.alike > 0.0 && rng.chance(spec.alike)
                                             ? draw_alike_names(count, rng)
                                             : draw_names(count, rng);
  int64_t least = 1;
  for (int k = 1; k < spec.digits; ++k) {
    least *= 10;
  }
  std::vector<Fact> facts;
  facts.reserve(static_cast<size_t>(count));
  for (const std::string& name : names) {
    facts.push_back({name, std::to_string(rng.between(least, 10 * least - 1))});
  }
  return facts;
}

std::string filler(Rng& rng) {
  std::string out(rng.pick(filler_subjects()));
  out.append(" ").append(rng.pick(filler_verbs()));
  out.append(" ").append(rng.pick(filler_places())).append(".");
  return out;
}

std::string question_on(const std::vector<Fact>& asked) {
  if (asked.size() == 1) {
    return "What is the code of the " + asked[0].key + "?";
  }
  std::string out = "What are the codes of ";
  for (size_t k = 0; k < asked.size(); ++k) {
    out += k == 0 ? "the " : k + 1 == asked.size() ? " and the " : ", the ";
    out += asked[k].key;
  }
  return out + "?";
}

}  // namespace

Problem draw_retrieval_problem(const RetrievalSpec& spec, Rng& rng) {
  const int64_t chars = rng.between(spec.min_chars, spec.max_chars);
  const int64_t room = std::max<int64_t>(spec.questions, chars / (kFactChars + 1));
  const int64_t most = std::min<int64_t>(spec.max_facts, room);
  const std::vector<Fact> facts =
      draw_facts(rng.between(std::min<int64_t>(spec.min_facts, most), most), spec, rng);

  std::vector<std::string> sentences;
  int64_t length = 0;
  Problem problem;
  problem.kind = ProblemKind::kRetrieval;
  std::string content;
  for (const Fact& fact : facts) {
    sentences.push_back(fact.text());
    length += static_cast<int64_t>(sentences.back().size()) + 1;
    content += fact.key + fact.value;
  }
  for (std::string next = filler(rng); length + static_cast<int64_t>(next.size()) + 1 <= chars;
       next = filler(rng)) {
    length += static_cast<int64_t>(next.size()) + 1;
    sentences.push_back(std::move(next));
  }
  rng.shuffle(std::span(sentences));
  for (const std::string& sentence : sentences) {
    problem.question += sentence + " ";
  }

  std::vector<Fact> asked = facts;
  rng.shuffle(std::span(asked));
  asked.resize(static_cast<size_t>(rng.between(1, spec.questions)));
  problem.question += question_on(asked);
  for (const Fact& fact : asked) {
    problem.answer += fact.key + ": " + fact.value + "\n";
    content += fact.key;
  }
  problem.result = asked.back().value;
  problem.answer += "#### " + problem.result;
  problem.steps = static_cast<int>(asked.size());
  problem.identity = XXH64(content.data(), content.size(), 1);
  return problem;
}

}  // namespace cambium
