#include "eval/problems/phrases.h"

#include <cctype>

#include "base/error.h"

namespace cambium {
namespace {

constexpr std::string_view kPeople[] = {"Tom",  "Ann",  "Ben",  "Eva",   "Sam",  "Mia",  "Leo",
                                        "Zoe",  "Max",  "Ida",  "Jack",  "Lucy", "Omar", "Nina",
                                        "Paul", "Rosa", "Hugo", "Vera",  "Carl", "Jane", "Finn",
                                        "Lena", "Noah", "Alma", "Felix", "Ruth", "Ivan", "Dora"};
constexpr std::string_view kGoods[] = {"pen",   "cup",   "lamp",  "book", "hat",   "bag",   "ball",
                                       "drum",  "chair", "clock", "coat", "scarf", "brush", "knife",
                                       "plate", "radio", "table", "kite", "torch", "glove", "spoon",
                                       "phone", "belt",  "vase",  "rug",  "bell",  "shirt", "mug"};
constexpr std::string_view kThings[] = {"apples",   "books",   "cards",  "coins",
                                        "marbles",  "pencils", "shells", "stamps",
                                        "stickers", "toys",    "nuts",   "stones"};

constexpr std::string_view kPicked[] = {"apples", "plums", "flowers", "nuts"};
constexpr std::string_view kBaked[] = {"cakes", "pies", "cookies"};
constexpr std::string_view kMade[] = {"cards", "kites", "masks", "toys"};
constexpr std::string_view kFound[] = {"shells", "stones", "coins", "nuts"};
constexpr std::string_view kSold[] = {"tickets", "books", "lamps", "pies"};
constexpr Activity kActivities[] = {{"picks", "pick", kPicked},
                                    {"bakes", "bake", kBaked},
                                    {"makes", "make", kMade},
                                    {"finds", "find", kFound},
                                    {"sells", "sell", kSold}};
constexpr Activity kPastimes[] = {{"reads", "read", {}},
                                  {"runs", "run", {}},
                                  {"works", "work", {}},
                                  {"swims", "swim", {}},
                                  {"sings", "sing", {}}};

// People have things.
constexpr std::string_view kHaveGiven[] = {"{a} has {n} {i}.", "{a} starts with {n} {i}."};
constexpr std::string_view kHaveMore[] = {"{a} has {n} more {i} than {b}.",
                                          "{a} has {n} {i} more than {b}."};
constexpr std::string_view kHaveFewer[] = {"{a} has {n} fewer {i} than {b}.",
                                           "{a} has {n} {i} fewer than {b}."};
constexpr std::string_view kHaveTwice[] = {"{a} has twice as many {i} as {b}.",
                                           "{a} has double the {i} of {b}."};
constexpr std::string_view kHaveTimes[] = {"{a} has {n} times as many {i} as {b}.",
                                           "{a} has {n} times the {i} of {b}."};
constexpr std::string_view kHaveHalf[] = {"{a} has half as many {i} as {b}.",
                                          "{a} has half the {i} of {b}."};
constexpr std::string_view kHavePart[] = {"{a} has {p} as many {i} as {b}."};
constexpr std::string_view kHaveSum[] = {"{a} has as many {i} as {b} and {c} together."};
constexpr std::string_view kHaveGain[] = {"Then {a} buys {n} more {i}.", "Then {a} gets {n} {i}.",
                                          "Later {a} finds {n} {i}."};
constexpr std::string_view kHaveLoss[] = {"Then {a} loses {n} {i}.", "Then {a} gives {n} {i} away.",
                                          "Later {a} gives {n} {i} to {x}."};
constexpr std::string_view kHaveHalve[] = {"Then {a} gives half of the {i} to {x}.",
                                           "Later {a} loses half of the {i}."};
constexpr std::string_view kHavePacks[] = {"Then {a} buys {n} bags of {m} {i}.",
                                           "Later {a} gets {n} boxes with {m} {i} each."};
constexpr std::string_view kHaveAsk[] = {"How many {i} does {a} have{t}?",
                                         "How many {i} are there with {a}{t}?"};
constexpr Question kHaveTotal[] = {{"How many {i} do {a} and {b} have together{t}?", "Total"},
                                   {"How many {i} do {a} and {b} have in all{t}?", "Total"}};
constexpr Question kHaveDifference[] = {{"How many more {i} does {a} have than {b}{t}?", "More"}};
constexpr Question kHaveTimesAsk[] = {
    {"{a} sells all the {i} for {n} dollars each. How many dollars does {a} get?", "Dollars"}};
constexpr Question kHaveDivide[] = {
    {"{a} shares the {i} equally among {n} friends. How many {i} does each friend get?", "Each"},
    {"{a} puts the {i} in bags of {n}. How many bags does {a} fill?", "Bags"}};
constexpr Question kHaveRest[] = {{"{a} needs {n} {i}. How many more must {a} get?", "Missing"}};

// People pick, bake, make things.
constexpr std::string_view kDoGiven[] = {"{a} {v} {n} {i}.", "On Monday {a} {v} {n} {i}."};
constexpr std::string_view kDoMore[] = {"{a} {v} {n} more {i} than {b}."};
constexpr std::string_view kDoFewer[] = {"{a} {v} {n} fewer {i} than {b}."};
constexpr std::string_view kDoTwice[] = {"{a} {v} twice as many {i} as {b}."};
constexpr std::string_view kDoTimes[] = {"{a} {v} {n} times as many {i} as {b}."};
constexpr std::string_view kDoHalf[] = {"{a} {v} half as many {i} as {b}."};
constexpr std::string_view kDoPart[] = {"{a} {v} {p} as many {i} as {b}."};
constexpr std::string_view kDoSum[] = {"{a} {v} as many {i} as {b} and {c} together."};
constexpr std::string_view kDoGain[] = {"Then {a} {v} {n} more {i}.",
                                        "Later {a} {v} another {n} {i}."};
constexpr std::string_view kDoAsk[] = {"How many {i} does {a} {w} in all?",
                                       "How many {i} does {a} {w}?"};
constexpr Question kDoTotal[] = {{"How many {i} do {a} and {b} {w} together?", "Total"}};
constexpr Question kDoDifference[] = {{"How many more {i} does {a} {w} than {b}?", "More"}};
constexpr Question kDoTimesAsk[] = {
    {"{a} gets {n} dollars for each one. How many dollars is that?", "Dollars"}};
constexpr Question kDoDivide[] = {
    {"{a} packs the {i} in boxes of {n}. How many boxes is that?", "Boxes"},
    {"{a} spreads this equally over {n} days. How many {i} is that a day?", "Each"}};

// Goods have prices.
constexpr std::string_view kCostGiven[] = {"{a} costs {n} dollars."};
constexpr std::string_view kCostMore[] = {"{a} costs {n} dollars more than {b}."};
constexpr std::string_view kCostFewer[] = {"{a} costs {n} dollars less than {b}."};
constexpr std::string_view kCostTwice[] = {"{a} costs twice as much as {b}."};
constexpr std::string_view kCostTimes[] = {"{a} costs {n} times as much as {b}."};
constexpr std::string_view kCostHalf[] = {"{a} costs half as much as {b}."};
constexpr std::string_view kCostPart[] = {"{a} costs {p} as much as {b}."};
constexpr std::string_view kCostSum[] = {"{a} costs as much as {b} and {c} together."};
constexpr std::string_view kCostGain[] = {"Then the price of {a} goes up by {n} dollars."};
constexpr std::string_view kCostLoss[] = {"Then the price of {a} goes down by {n} dollars."};
constexpr std::string_view kCostHalve[] = {"Then the price of {a} is cut in half."};
constexpr std::string_view kCostAsk[] = {"How many dollars does {a} cost{t}?",
                                         "What is the price of {a}{t}?"};
constexpr Question kCostTotal[] = {{"How many dollars do {a} and {b} cost together{t}?", "Total"}};
constexpr Question kCostDifference[] = {
    {"How many dollars more does {a} cost than {b}{t}?", "More"}};
constexpr Question kCostTimesAsk[] = {
    {"{x} buys {n} like {a}. How many dollars does {x} pay?", "Dollars"}};
constexpr Question kCostDivide[] = {
    {"{n} friends share the price of {a}. How many dollars does each friend pay?", "Each"}};
constexpr Question kCostRest[] = {
    {"{x} buys {a} and pays with {n} dollars. How many dollars does {x} get back?", "Change"},
    {"{x} has {n} dollars and buys {a}. How many dollars are left?", "Left"}};

// People spend time.
constexpr std::string_view kTimeGiven[] = {"{a} {v} for {n} minutes."};
constexpr std::string_view kTimeMore[] = {"{a} {v} {n} minutes longer than {b}."};
constexpr std::string_view kTimeFewer[] = {"{a} {v} {n} minutes less than {b}."};
constexpr std::string_view kTimeTwice[] = {"{a} {v} twice as long as {b}."};
constexpr std::string_view kTimeTimes[] = {"{a} {v} {n} times as long as {b}."};
constexpr std::string_view kTimeHalf[] = {"{a} {v} half as long as {b}."};
constexpr std::string_view kTimePart[] = {"{a} {v} {p} as long as {b}."};
constexpr std::string_view kTimeSum[] = {"{a} {v} as long as {b} and {c} together."};
constexpr std::string_view kTimeGain[] = {"Later {a} {v} for {n} more minutes."};
constexpr std::string_view kTimeAsk[] = {"How many minutes does {a} {w}?",
                                         "For how many minutes does {a} {w} in all?"};
constexpr Question kTimeTotal[] = {{"How many minutes do {a} and {b} {w} in all?", "Total"}};
constexpr Question kTimeDifference[] = {{"How many minutes longer does {a} {w} than {b}?", "More"}};
constexpr Question kTimeTimesAsk[] = {
    {"{a} does this on {n} days. How many minutes is that in all?", "Minutes"}};
constexpr Question kTimeDivide[] = {
    {"{a} spreads this equally over {n} days. How many minutes is that a day?", "Each"}};
constexpr Question kTimeRest[] = {{"{a} wants to {w} for {n} minutes. How many are left?", "Left"}};

constexpr Scene kHaving{false,           kHaveGiven,    kHaveMore,   kHaveFewer, kHaveTwice,
                        kHaveTimes,      kHaveHalf,     kHavePart,   kHaveSum,   kHaveGain,
                        kHaveLoss,       kHaveHalve,    kHavePacks,  kHaveAsk,   kHaveTotal,
                        kHaveDifference, kHaveTimesAsk, kHaveDivide, kHaveRest};
constexpr Scene kDoing{false,    kDoGiven,      kDoMore,     kDoFewer,  kDoTwice, kDoTimes, kDoHalf,
                       kDoPart,  kDoSum,        kDoGain,     {},        {},       {},       kDoAsk,
                       kDoTotal, kDoDifference, kDoTimesAsk, kDoDivide, {}};
constexpr Scene kPrice{
    true,       kCostGiven,      kCostMore,     kCostFewer,  kCostTwice, kCostTimes, kCostHalf,
    kCostPart,  kCostSum,        kCostGain,     kCostLoss,   kCostHalve, {},         kCostAsk,
    kCostTotal, kCostDifference, kCostTimesAsk, kCostDivide, kCostRest};
constexpr Scene kTime{
    false,      kTimeGiven,      kTimeMore,     kTimeFewer,  kTimeTwice, kTimeTimes, kTimeHalf,
    kTimePart,  kTimeSum,        kTimeGain,     {},          {},         {},         kTimeAsk,
    kTimeTotal, kTimeDifference, kTimeTimesAsk, kTimeDivide, kTimeRest};

constexpr std::string_view kOnPeople[] = {"{a} is {n} years old.", "{a} lives {n} miles away.",
                                          "{a} has {n} {i}.", "{a} sees {n} {i} in a shop."};
constexpr std::string_view kOnShops[] = {"The shop is {n} years old.", "The shop has {n} {i}.",
                                         "{x} is {n} years old.", "It is {n} miles to the shop."};

constexpr std::string_view kColours[] = {
    "red", "blue",  "green", "black", "white", "brown", "gold",  "pink",   "grey",  "old",
    "new", "small", "big",   "round", "flat",  "heavy", "light", "wooden", "quiet", "sharp"};
constexpr std::string_view kObjects[] = {
    "lantern", "box",    "door",   "chest",  "window", "clock",  "chair",  "table",
    "book",    "bottle", "basket", "bridge", "tower",  "wagon",  "boat",   "drum",
    "mirror",  "lamp",   "cup",    "hammer", "ladder", "barrel", "statue", "gate",
    "wheel",   "vase",   "bell",   "shield", "crown",  "coat"};

constexpr std::string_view kSubjects[] = {"The river", "A dog",  "The wind", "An old man",
                                          "The train", "A bird", "The rain", "The baker",
                                          "A child",   "The fox"};
constexpr std::string_view kVerbs[] = {"comes",  "goes",   "waits", "sleeps", "sings",
                                       "passes", "stands", "rests", "turns",  "stops"};
constexpr std::string_view kPlaces[] = {
    "near the mill",  "by the road",    "under the hill",  "behind the school", "at the market",
    "over the field", "along the wall", "past the church", "in the garden",     "before the night"};

}  // namespace

const Scene& having_scene() {
  return kHaving;
}
const Scene& doing_scene() {
  return kDoing;
}
const Scene& price_scene() {
  return kPrice;
}
const Scene& time_scene() {
  return kTime;
}

Sentences people() {
  return kPeople;
}
Sentences goods() {
  return kGoods;
}
Sentences things() {
  return kThings;
}
std::span<const Activity> activities() {
  return kActivities;
}
std::span<const Activity> pastimes() {
  return kPastimes;
}
Sentences distractors_on_people() {
  return kOnPeople;
}
Sentences distractors_on_shops() {
  return kOnShops;
}
Sentences fact_colours() {
  return kColours;
}
Sentences fact_objects() {
  return kObjects;
}
int max_retrieval_facts() {
  return static_cast<int>(std::size(kColours) * std::size(kObjects));
}
Sentences filler_subjects() {
  return kSubjects;
}
Sentences filler_verbs() {
  return kVerbs;
}
Sentences filler_places() {
  return kPlaces;
}

std::string say(std::string_view sentence, const Words& words) {
  std::string out;
  for (size_t k = 0; k < sentence.size(); ++k) {
    if (sentence[k] != '{') {
      out += sentence[k];
      continue;
    }
    CAMBIUM_CHECK(k + 2 < sentence.size() && sentence[k + 2] == '}', "in '{}'", sentence);
    switch (sentence[k + 1]) {
      case 'a':
        out += words.a;
        break;
      case 'b':
        out += words.b;
        break;
      case 'c':
        out += words.c;
        break;
      case 'n':
        out += words.n;
        break;
      case 'm':
        out += words.m;
        break;
      case 'p':
        out += words.p;
        break;
      case 'i':
        out += words.i;
        break;
      case 'v':
        out += words.v;
        break;
      case 'w':
        out += words.w;
        break;
      case 'x':
        out += words.x;
        break;
      case 't':
        out += words.t;
        break;
      default:
        CAMBIUM_CHECK(false, "no word for {} in '{}'", sentence[k + 1], sentence);
    }
    k += 2;
  }
  if (!out.empty()) {
    out[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(out[0])));
  }
  return out;
}

}  // namespace cambium
