#include "base/signals.h"

#include <gmock/gmock.h>

#include <csignal>

namespace cambium {
namespace {

TEST(StopSignals, MakeASignalAWish) {
  for (const int signal : {SIGINT, SIGTERM}) {
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
