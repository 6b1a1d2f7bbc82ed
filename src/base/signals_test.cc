#include "base/signals.h"

#include <gmock/gmock.h>

#include <csignal>
#include <filesystem>

#include "base/file.h"
#include "base/test_folder.h"

namespace cambium {
namespace {

TEST(StopSignals, MakeASignalAWish) {
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    const StopSignals signals;
    EXPECT_EQ(stop_signal(), 0);
    stop_if_asked("nothing is lost");
    std::raise(signal);
    EXPECT_EQ(stop_signal(), signal);
    {
      const StopSignals nested;
      EXPECT_EQ(stop_signal(), signal);
    }
    try {
      stop_if_asked("all is kept");
      ADD_FAILURE();
    } catch (const Interrupted& stopped) {
      EXPECT_EQ(stopped.signal(), signal);
      EXPECT_EQ(std::string(stopped.what()),
                std::string("stopped by ") + signal_name(signal) + "; all is kept");
    }
  }
  EXPECT_EQ(stop_signal(), 0);
}

TEST(StopSignals, WhoIgnoresTheEndOfTheTerminalGoesOnIgnoringIt) {
  ::signal(SIGHUP, SIG_IGN);
  {
    const StopSignals signals;
    std::raise(SIGHUP);
    EXPECT_EQ(stop_signal(), 0);
  }
  EXPECT_EQ(::signal(SIGHUP, SIG_DFL), SIG_IGN);
}

TEST(StopAnywhere, EndsWorkAtItsNextPieceOnlyWhileItLives) {
  stop_point();
  const StopSignals signals;
  std::raise(SIGINT);
  stop_point();  // asked for by nobody: training writes its checkpoint
  {
    const StopAnywhere outer("nothing is written");
    const StopAnywhere inner("one is written");
    EXPECT_THAT([] { stop_point(); },
                ::testing::ThrowsMessage<Interrupted>("stopped by SIGINT; one is written"));
  }
  stop_point();
  const TestFolder folder;
  const std::string path = folder.at("file");
  const StopAnywhere stop("nothing is written");
  EXPECT_THROW(write_file_atomically(path, "text"), Interrupted);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(StopSignalsDeathTest, TheSecondEndsTheProcess) {
  EXPECT_EXIT(
      {
        const StopSignals signals;
        std::raise(SIGTERM);
        std::raise(SIGTERM);
      },
      ::testing::KilledBySignal(SIGTERM), "");
}

}  // namespace
}  // namespace cambium
