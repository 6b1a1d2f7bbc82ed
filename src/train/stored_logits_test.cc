// Stored logits: what is written is what the teacher says, and nothing else is taken for it.
#include "train/stored_logits.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::copy_task;
using ::testing::HasSubstr;
using testing::message_of;
using testing::tiny_attention;
using testing::tiny_config;

constexpr int64_t kDocuments = 40;

class StoredLogitsTest : public ::testing::Test {
 protected:
  void SetUp() override { Progress::silence(true); }
  void TearDown() override { Progress::silence(false); }

  StoredLogitsInfo write(const std::string& name, int64_t top_k, int64_t max_tokens = 48) {
    StoredLogitsInfo info;
    info.top_k = top_k;
    info.documents = kDocuments;
    info.max_tokens = max_tokens;
    info.tokenizer = "letters";
    info.teacher = "seed 5";
    return write_stored_logits(folder_.at(name), *teacher_.model, *data_, info);
  }

  /// Steps of training against the teacher, or against the file.
  std::vector<double> losses(const StoredLogits* stored, int64_t steps = 3,
                             int64_t sequence_length = 48) {
    LoadedModel student = fresh_model(tiny_attention(2), 1);
    TrainConfig config = tiny_config(steps);
    config.sequence_length = sequence_length;
    config.loss = {.forward_kl = 0.5F, .reverse_kl = 0.5F};
    config.logits = stored;
    Trainer trainer(*student.model, student.weights, config, *data_,
                    stored == nullptr ? teacher_.model.get() : nullptr);
    std::vector<double> losses;
    while (!trainer.finished()) {
      losses.push_back(trainer.step().loss);
    }
    return losses;
  }

  TestFolder folder_;
  LoadedModel teacher_ = fresh_model(tiny_attention(2), 5, 0.5);
  std::unique_ptr<DocumentSource> data_ = copy_task();
};

TEST_F(StoredLogitsTest, OfAllTokensTrainsAsTheTeacherDoes) {
  const StoredLogitsInfo info = write("all", 24);
  EXPECT_EQ(info.vocabulary, 24);
  EXPECT_EQ(info.documents, kDocuments);
  const StoredLogits stored(folder_.at("all"));
  EXPECT_EQ(stored.info().rows, info.rows);
  const std::vector<double> expected = losses(nullptr);
  const std::vector<double> got = losses(&stored);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(got[i], expected[i], 2e-3 * expected[i]) << i;  // fp16
  }
}

TEST_F(StoredLogitsTest, FewTokensTakeFewBytesAndAreNearTheTeacher) {
  const StoredLogitsInfo info = write("some", 4);
  EXPECT_EQ(stored_row_bytes(4, 24), 2 * 5 + 3);  // 5 bits an id
  EXPECT_EQ(stored_row_bytes(32, 151936), 2 * 33 + 72);
  const auto size = static_cast<int64_t>(std::filesystem::file_size(folder_.at("some")));
  EXPECT_LT(size - info.rows * stored_row_bytes(4, 24), 8 * kDocuments + 400);
  const StoredLogits stored(folder_.at("some"));
  const double whole = losses(nullptr)[0];
  const double some = losses(&stored)[0];
  EXPECT_LT(some, whole);
  EXPECT_GT(some, 0.2 * whole);
}

TEST_F(StoredLogitsTest, RefusesADamagedByteWhereverItIs) {
  write("file", 4);
  const std::string whole = read_text_file(folder_.at("file"));
  for (const size_t at :
       {size_t{8}, size_t{20}, size_t{200}, whole.size() / 2, whole.size() - 9, whole.size() - 1}) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ 4);
    write_file_atomically(folder_.at("damaged"), damaged);
    EXPECT_THAT(message_of([&] { StoredLogits(folder_.at("damaged")); }),
                HasSubstr("is not what was written"))
        << at;
  }
  write_file_atomically(folder_.at("cut"), whole.substr(0, whole.size() - 5));
  EXPECT_THAT(message_of([&] { StoredLogits(folder_.at("cut")); }), HasSubstr("damaged or cut"));
  for (const char* other : {"", "CAMLOGIT", "{\"text\": \"a document\", \"more\": 1}"}) {
    write_file_atomically(folder_.at("other"), other);
    EXPECT_THAT(message_of([&] { StoredLogits(folder_.at("other")); }),
                HasSubstr("holds no stored logits"));
  }
}

/// Documents of which one cannot be had, once.
class StoppedSource : public DocumentSource {
 public:
  StoppedSource(const DocumentSource& data, int64_t calls) : data_(data), calls_(calls) {}
  int64_t size() const override { return data_.size(); }
  std::string fingerprint() const override { return data_.fingerprint(); }
  Document document(uint64_t index) const override {
    expect(calls_-- != 0, "stopped");
    return data_.document(index);
  }

 private:
  const DocumentSource& data_;
  mutable int64_t calls_;
};

TEST_F(StoredLogitsTest, AHalfMadeFileEndsAsAWholeOne) {
  StoredLogitsInfo info;
  info.top_k = 4;
  info.documents = 250;
  info.max_tokens = 48;
  write_stored_logits(folder_.at("whole"), *teacher_.model, *data_, info);
  // Its documents are read once for their sizes, then for what they say.
  for (const int64_t calls : {250 + 20, 250 + 130, 250 + 240}) {
    const StoppedSource stopped(*data_, calls);
    const std::string path = folder_.at("half");
    EXPECT_THAT(message_of([&] { write_stored_logits(path, *teacher_.model, stopped, info); }),
                HasSubstr("stopped"));
    EXPECT_FALSE(std::filesystem::exists(path));
    StoredLogitsInfo other = info;
    other.top_k = 5;
    EXPECT_THAT(message_of([&] { write_stored_logits(path, *teacher_.model, *data_, other); }),
                HasSubstr("half-made, of other data, another teacher or other options"));
    const auto half = std::filesystem::file_size(path + ".part");
    write_stored_logits(path, *teacher_.model, *data_, info);
    EXPECT_LT(half, std::filesystem::file_size(path));
    EXPECT_EQ(read_text_file(path), read_text_file(folder_.at("whole"))) << calls;
    std::filesystem::remove(path);
  }
}

TEST_F(StoredLogitsTest, RefusesWhatItIsNotOf) {
  write("file", 4);
  const StoredLogits stored(folder_.at("file"));
  EXPECT_THAT(message_of([&] { stored.expect_tokenizer("others"); }),
              HasSubstr("logits of another tokenizer: letters there, others here"));
  EXPECT_THAT(message_of([&] { stored.expect_teacher("seed 6"); }),
              HasSubstr("logits of another teacher: seed 5 there, seed 6 here"));
  EXPECT_THAT(message_of([&] { losses(&stored, 40); }),
              HasSubstr("the first 40 documents, the run has come to document 40"));
  EXPECT_THAT(message_of([&] {
                write("short", 4, 6);
                const StoredLogits cut(folder_.at("short"));
                losses(&cut);
              }),
              HasSubstr("holds documents cut at 6 tokens"));
  EXPECT_THAT(message_of([&] { write("none", 25); }), HasSubstr("1 to 24 tokens"));
  LoadedModel student = fresh_model(tiny_attention(2), 1);
  TrainConfig config = tiny_config(1);
  config.loss = {.reverse_kl = 1.0F};
  config.logits = &stored;
  const auto other = copy_task(8);
  EXPECT_THAT(message_of([&] { Trainer trainer(*student.model, student.weights, config, *other); }),
              HasSubstr("logits of other data: copy task 7 there, copy task 8 here"));
  config.loss.temperature = 2.0F;
  EXPECT_THAT(message_of([&] { Trainer trainer(*student.model, student.weights, config, *data_); }),
              HasSubstr("temperature 1, got temperature 2"));
}

}  // namespace
}  // namespace cambium
