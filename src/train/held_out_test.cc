#include "train/held_out.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "base/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::copy_task;
using ::testing::HasSubstr;
using testing::tiny_attention;

/// Document i: 40 + i random tokens, of which the last 20 + i are learned; every third has nothing
/// to learn. Enough of them that they do not all run together.
std::unique_ptr<DocumentSource> long_documents(int64_t size) {
  return generated_source(
      [](uint64_t index) {
        Rng rng(3, index);
        Document document;
        for (uint64_t t = 0; t < 40 + index; ++t) {
          document.append({static_cast<int32_t>(rng.between(2, 23))}, t >= 20 && index % 3 != 2);
        }
        return document;
      },
      "long", size);
}

LossSums alone(Model& model, Model& teacher, const Document& document) {
  PackedSequence sequence;
  add_document(sequence, document);
  Arena arena;
  Context ctx{.arena = &arena};
  const LossInputs inputs{.hidden = model.forward(ctx, sequence.batch),
                          .head = model.head(),
                          .teacher_hidden = teacher.forward(ctx, sequence.batch),
                          .teacher_head = teacher.head(),
                          .labels = sequence.labels};
  return head_loss(ctx, inputs, {.cross_entropy = 1.0F});
}

TEST(HeldOut, MeasuresEveryDocumentAsIfItStoodAlone) {
  LoadedModel model = fresh_model(tiny_attention(2), 1, 0.3);
  LoadedModel teacher = fresh_model(tiny_attention(3), 2, 0.3);
  constexpr int64_t kDocuments = 70;
  constexpr int64_t kMaxTokens = 90;
  const auto source = long_documents(0);
  const HeldOut held_out(*source, kDocuments, kMaxTokens);
  const std::vector<LossSums> sums = held_out.measure(*model.model, teacher.model.get());
  const std::vector<LossSums> untaught = held_out.measure(*model.model);
  ASSERT_EQ(static_cast<int64_t>(sums.size()), held_out.documents());
  size_t at = 0;
  int64_t labels = 0;
  for (uint64_t index = 0; index < kDocuments; ++index) {
    Document document = source->document(index);
    if (document.tokens.size() > kMaxTokens) {
      document.tokens.resize(kMaxTokens);
      document.learn.resize(kMaxTokens);
    }
    if (index % 3 == 2) {
      continue;
    }
    const LossSums expected = alone(*model.model, *teacher.model, document);
    ASSERT_LT(at, sums.size());
    EXPECT_EQ(sums[at].tokens, expected.tokens) << index;
    EXPECT_NEAR(sums[at].cross_entropy, expected.cross_entropy, 1e-4) << index;
    EXPECT_NEAR(sums[at].forward_kl, expected.forward_kl, 1e-4) << index;
    EXPECT_NEAR(sums[at].reverse_kl, expected.reverse_kl, 1e-4) << index;
    EXPECT_EQ(sums[at].correct, expected.correct) << index;
    EXPECT_EQ(sums[at].agreement, expected.agreement) << index;
    EXPECT_EQ(untaught[at].cross_entropy, sums[at].cross_entropy) << index;
    EXPECT_EQ(untaught[at].reverse_kl, 0.0) << index;
    labels += document.labels();
    ++at;
  }
  EXPECT_EQ(at, sums.size());
  EXPECT_EQ(held_out.labels(), labels);
  EXPECT_EQ(total(sums).tokens, labels);
}

TEST(HeldOut, AModelIsNoDistanceFromItself) {
  LoadedModel model = fresh_model(tiny_attention(2), 1, 0.3);
  LoadedModel other = fresh_model(tiny_attention(2), 2, 0.3);
  const HeldOut held_out(*copy_task(), 20, 64);
  const LossSums same = total(held_out.measure(*model.model, model.model.get()));
  EXPECT_NEAR(same.reverse_kl, 0.0, 1e-6);
  EXPECT_NEAR(same.forward_kl, 0.0, 1e-6);
  EXPECT_EQ(same.agreement, same.tokens);
  const LossSums apart = total(held_out.measure(*model.model, other.model.get()));
  EXPECT_GT(apart.reverse_kl, 0.01 * static_cast<double>(apart.tokens));
  EXPECT_LT(apart.agreement, apart.tokens);
  EXPECT_EQ(apart.cross_entropy, same.cross_entropy);
}

TEST(HeldOut, TakesWhatThereIs) {
  const HeldOut few(*long_documents(4), 100, 1000);
  EXPECT_EQ(few.documents(), 3);
  EXPECT_EQ(few.labels(), 20 + 21 + 23);
  // Cut in front of the first label, a document has nothing to learn; with it, one.
  EXPECT_EQ(HeldOut(*long_documents(4), 4, 21).labels(), 3);
  EXPECT_EQ(HeldOut(*long_documents(4), 1, 1000).documents(), 1);
}

TEST(HeldOut, TotalAddsEveryField) {
  const LossSums a{.cross_entropy = 1,
                   .forward_kl = 2,
                   .reverse_kl = 3,
                   .total = 4,
                   .tokens = 5,
                   .agreement = 6,
                   .correct = 7};
  const LossSums sum = total({a, a, a});
  EXPECT_EQ(sum.cross_entropy, 3);
  EXPECT_EQ(sum.forward_kl, 6);
  EXPECT_EQ(sum.reverse_kl, 9);
  EXPECT_EQ(sum.total, 12);
  EXPECT_EQ(sum.tokens, 15);
  EXPECT_EQ(sum.agreement, 18);
  EXPECT_EQ(sum.correct, 21);
  EXPECT_EQ(total({}).tokens, 0);
}

TEST(HeldOutErrors, NameWhatIsWrong) {
  const struct {
    int64_t documents, max_tokens;
    const char* expected;
  } rows[] = {{0, 64, "at least one document of two tokens, got 0 of 64"},
              {-1, 64, "got -1 of 64"},
              {4, 1, "got 4 of 1"},
              {4, 20, "no document with anything to learn"}};
  for (const auto& row : rows) {
    const std::string message = testing::error_of(
        [&] { const HeldOut held_out(*long_documents(4), row.documents, row.max_tokens); });
    EXPECT_THAT(message, HasSubstr(row.expected));
  }
}

}  // namespace
}  // namespace cambium
