#include "train/dataset.h"

#include <gmock/gmock.h>
#include <algorithm>

#include <set>

#include "base/error.h"
#include "base/testing.h"
#include "base/toml.h"
#include "ops/loss/loss.h"
#include "train/testing.h"

namespace cambium {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// Documents of 2 + index tokens, all equal to 3 + index; the last half is learned.
std::unique_ptr<DocumentSource> ladder(int64_t size) {
  return generated_source(
      [](uint64_t index) {
        Document document;
        const auto n = static_cast<size_t>(index) + 2;
        document.append(std::vector<int32_t>(n / 2, static_cast<int32_t>(index + 3)), false);
        document.append(std::vector<int32_t>(n - n / 2, static_cast<int32_t>(index + 3)), true);
        return document;
      },
      "ladder", size);
}

TEST(Packer, LabelsAreTheNextTokensThatAreLearned) {
  Document document;
  document.append({5, 6, 7}, false);
  document.append({8, 9}, true);
  PackedSequence sequence;
  add_document(sequence, document);
  add_document(sequence, document);
  EXPECT_THAT(sequence.labels, ElementsAre(-1, -1, 8, 9, -1, -1, 8, 9));
  EXPECT_EQ(sequence.learned, 4);
  EXPECT_EQ(sequence.batch.size(), 8);
  EXPECT_EQ(sequence.batch.segments().count(), 2);
  EXPECT_EQ(sequence.batch.segments().position[1], 0);
}

TEST(Packer, EveryEpochSeesEveryDocumentOnceAndAnywhereItCanGoOn) {
  const auto source = ladder(7);
  Packer packer(*source, 5, 12, LongDocuments::kCut);
  std::vector<std::vector<int32_t>> sequences;
  std::vector<DataPosition> positions;
  for (int i = 0; i < 12; ++i) {
    positions.push_back(packer.position());
    const PackedSequence s = packer.next();
    EXPECT_LE(s.batch.size(), 12);
    sequences.emplace_back(s.batch.tokens().begin(), s.batch.tokens().end());
  }
  for (size_t i = 0; i < positions.size(); ++i) {
    Packer again(*source, 5, 12, LongDocuments::kCut);
    again.seek(positions[i]);
    const PackedSequence s = again.next();
    EXPECT_TRUE(std::equal(sequences[i].begin(), sequences[i].end(), s.batch.tokens().begin(),
                           s.batch.tokens().end()));
  }
  for (uint64_t epoch = 0; epoch < 3; ++epoch) {
    std::set<uint64_t> seen;
    for (uint64_t i = 0; i < 7; ++i) {
      seen.insert(document_at(*source, 5, epoch * 7 + i));
    }
    EXPECT_EQ(seen.size(), 7U);
  }
}

TEST(Packer, CountsWhatItCutsAndDrops) {
  const auto source = ladder(7);  // 2 to 8 tokens, 1 to 7 rows
  Packer cut(*source, 5, 5, LongDocuments::kCut);
  Packer dropped(*source, 5, 5, LongDocuments::kDrop);
  while (cut.position().next_sample < 7) {
    cut.next();
  }
  while (dropped.position().next_sample < 7) {
    dropped.next();
  }
  EXPECT_GE(cut.position().cut, 1);
  EXPECT_EQ(cut.position().dropped, 0);
  EXPECT_EQ(dropped.position().cut, 0);
  EXPECT_GE(dropped.position().dropped, 1);
}

TEST(Packer, DataWithNothingToLearnIsAnError) {
  const auto source = generated_source(
      [](uint64_t) {
        Document document;
        document.append({3, 4, 5}, false);
        return document;
      },
      "prompts only");
  Packer packer(*source, 1, 8, LongDocuments::kCut);
  EXPECT_THROW(packer.next(), Error);
}

TEST(MixedSource, KeepsTheShares) {
  std::vector<std::shared_ptr<DocumentSource>> sources;
  for (const int32_t token : {5, 6}) {
    sources.push_back(generated_source(
        [token](uint64_t) {
          Document document;
          document.append({token, token}, true);
          return document;
        },
        "constant"));
  }
  const auto mixed = mixed_source(sources, {3.0, 1.0}, 9);
  int first = 0;
  for (uint64_t i = 0; i < 2000; ++i) {
    first += mixed->document(i).tokens[0] == 5 ? 1 : 0;
  }
  EXPECT_EQ(first, 1500);
  EXPECT_THROW(mixed_source(sources, {1.0}, 9), Error);
  EXPECT_THROW(mixed_source(sources, {1.0, 0.0}, 9), Error);
}

// What a document gives does not depend on what it is packed with.
TEST(Packing, EqualsDocumentsApart) {
  LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
  const auto source = testing::copy_task();
  PackedSequence packed;
  Arena arena;
  Context ctx{.arena = &arena};
  double apart = 0.0;
  const auto loss_of = [&](const PackedSequence& s) {
    LossInputs inputs;
    inputs.hidden = model.model->forward(ctx, s.batch);
    inputs.head = model.model->head();
    inputs.labels = s.labels;
    return head_loss(ctx, inputs, {.cross_entropy = 1.0F}).cross_entropy;
  };
  for (uint64_t i = 0; i < 5; ++i) {
    PackedSequence alone;
    add_document(alone, source->document(i));
    add_document(packed, source->document(i));
    apart += loss_of(alone);
  }
  EXPECT_NEAR(loss_of(packed), apart, 1e-4);
}

TEST(PlanTable, ReadsTypedValuesAndRefusesTheRest) {
  const PlanTable plan = PlanTable::parse(
      "steps = 3\nrate = 1\nname = \"x\"\nlayers = [1, 2]\n[loss]\ntemperature = 2.0\n"
      "[[stage]]\nk = 1\n[[stage]]\nk = 2\n",
      "p.toml");
  EXPECT_EQ(plan.get_int("steps"), 3);
  EXPECT_EQ(plan.get_real("rate"), 1.0);
  EXPECT_EQ(plan.get_int("missing", 7), 7);
  EXPECT_THAT(plan.get_int_list("layers"), ElementsAre(1, 2));
  EXPECT_EQ(plan.table("loss").get_real("temperature"), 2.0);
  ASSERT_EQ(plan.tables("stage").size(), 2U);
  EXPECT_EQ(plan.tables("stage")[1].get_int("k"), 2);
  EXPECT_EQ(plan.tables("stage")[0].get_int("k"), 1);
  EXPECT_THAT(testing::message_of([&] { plan.get_int("name"); }), HasSubstr("p.toml:3"));
  EXPECT_THAT(testing::message_of([&] { plan.get_int("none"); }), HasSubstr("none is missing"));
  EXPECT_EQ(plan.get_string("name"), "x");
  EXPECT_EQ(testing::message_of([&] { plan.expect_all_used(); }), "no error");
  EXPECT_THAT(testing::message_of([&] { PlanTable::parse("a = ", "q.toml"); }),
              HasSubstr("q.toml:1"));
}

TEST(PlanTable, SuggestsTheKeyThatWasMeant) {
  const PlanTable plan = PlanTable::parse("[loss]\ntemperatur = 2.0\n", "p.toml");
  EXPECT_EQ(plan.table("loss").get_real("temperature", 1.0), 1.0);
  const std::string error = testing::message_of([&] { plan.expect_all_used(); });
  EXPECT_THAT(error, HasSubstr("p.toml:2"));
  EXPECT_THAT(error, HasSubstr("did you mean 'temperature'"));
}

TEST(PlanTable, TakesSettingsFromTheCommandLine) {
  PlanTable plan = PlanTable::parse("[loss]\ntemperature = 2.0\n", "p.toml");
  plan.set("loss.temperature", "3.5");
  plan.set("train.optimizer.kind", "muon");
  EXPECT_EQ(plan.table("loss").get_real("temperature"), 3.5);
  EXPECT_EQ(plan.table("train").table("optimizer").get_string("kind"), "muon");
}

}  // namespace
}  // namespace cambium
