// The wording of the problems: tables of names, things and sentences, and nothing that computes.
//
// In a sentence {a} is the quantity's owner, {b} and {c} are the owners it is compared with, {n}
// and {m} are numbers, {p} a part ("a third"), {i} the things counted, {v} and {w} the verb as in
// "Tom picks" and "does Tom pick", {x} a bystander, {t} " now" once something has happened, else
// nothing.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cambium {

inline constexpr int kMaxSteps = 16;
inline constexpr int kMaxDistractors = 6;
inline constexpr int kFactChars = 44;  // no fact with a value of four digits is longer

using Sentences = std::span<const std::string_view>;

/// A last question that takes one more computation, and the name of what it finds.
struct Question {
  std::string_view text;
  std::string_view label;
};

/// One kind of story. An empty list means that the story has no such sentence.
struct Scene {
  bool goods;  // owners are goods ("the pen"), not people
  Sentences given, more, fewer, twice, times, half, part, sum;
  Sentences gain, loss, halve, packs;
  Sentences ask;
  std::span<const Question> ask_total, ask_more, ask_times, ask_divide, ask_rest;
};

/// What people do with things that can be counted.
struct Activity {
  std::string_view verb;  // "picks"
  std::string_view base;  // "pick"
  Sentences things;
};

const Scene& having_scene();
const Scene& doing_scene();
const Scene& price_scene();
const Scene& time_scene();

Sentences people();
Sentences goods();
Sentences things();
std::span<const Activity> activities();
std::span<const Activity> pastimes();
Sentences distractors_on_people();
Sentences distractors_on_shops();

Sentences fact_colours();
Sentences fact_objects();
int max_retrieval_facts();
/// Filler: a subject, what it does, and where.
Sentences filler_subjects();
Sentences filler_verbs();
Sentences filler_places();

/// What stands for each {letter} of a sentence.
struct Words {
  std::string a, b, c, n, m, p, i, v, w, x, t;
};

/// Puts the words into the sentence and begins it with a capital.
std::string say(std::string_view sentence, const Words& words);

}  // namespace cambium
