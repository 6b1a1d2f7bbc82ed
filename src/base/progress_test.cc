#include "base/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace cambium {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

/// A Progress whose clock and paper are the test's.
struct Watched {
  double time = 100;
  std::string text;

  Progress::Options options(Progress::Mode mode, bool bytes = false) {
    return {.unit = bytes ? "" : "steps",
            .bytes = bytes,
            .mode = mode,
            .write = [this](std::string_view more) { text += more; },
            .now = [this] { return time; }};
  }
};

TEST(Progress, PlainLinesComeRarely) {
  Watched w;
  Progress progress("train", 200, w.options(Progress::Mode::kPlain));
  for (int step = 1; step <= 100; ++step) {
    w.time += 0.25;
    progress.advance(1);
  }
  EXPECT_EQ(w.text,
            "train:  20%  40/200 steps  4/s  40s left\n"
            "train:  40%  80/200 steps  4/s  30s left\n");
  w.text.clear();
  progress.update(200, "loss 1.5");
  progress.finish();
  EXPECT_EQ(w.text, "train: 100%  200/200 steps  8/s  in 25s  loss 1.5\n");
  progress.finish();
  EXPECT_THAT(w.text, EndsWith("loss 1.5\n"));
}

TEST(Progress, TerminalRedrawsOneLine) {
  Watched w;
  {
    Progress progress("import", 4096, w.options(Progress::Mode::kTerminal, true));
    w.time += 1;
    progress.update(2048);
    EXPECT_THAT(w.text, EndsWith("\rimport: [############............]  50%  2.0 KiB/4.0 KiB  "
                                 "2.0 KiB/s  1.0s left"));
    w.time += 0.01;
    const std::string before = w.text;
    progress.update(2049);  // too soon to draw again
    EXPECT_EQ(w.text, before);
  }
  EXPECT_THAT(w.text, EndsWith("left\n"));  // an unfinished line is ended
}

TEST(Progress, UnknownTotalAndNothingDone) {
  Watched w;
  Progress progress("read", 0, w.options(Progress::Mode::kPlain));
  w.time += 11;
  progress.update(0);
  EXPECT_EQ(w.text, "read: 0 steps\n");
  progress.finish();
  EXPECT_THAT(w.text, Not(HasSubstr("left")));
}

TEST(Progress, SilentSaysNothing) {
  Progress::silence(true);
  EXPECT_EQ(Progress::default_mode(), Progress::Mode::kSilent);
  Progress::silence(false);
  Watched w;
  Progress progress("train", 10, w.options(Progress::Mode::kSilent));
  w.time += 100;
  progress.advance(5);
  progress.finish();
  EXPECT_EQ(w.text, "");
}

}  // namespace
}  // namespace cambium
