#include "base/background.h"

#include <gmock/gmock.h>

#include <future>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/testing.h"

namespace cambium {
namespace {

using ::testing::ElementsAre;
using testing::message_of;

TEST(Background, WorksAreDoneInTheirOrderBesideTheCaller) {
  std::promise<void> gate;
  std::vector<int> done;
  Background background;
  background.run([&] {
    gate.get_future().wait();
    done.push_back(1);
  });
  background.run([&] { done.push_back(2); });
  background.check();  // waits for nothing
  gate.set_value();    // and neither did run()
  background.wait();
  EXPECT_THAT(done, ElementsAre(1, 2));
  background.wait();
  background.check();
}

TEST(Background, TheFirstErrorIsSaidOnceAndNothingIsBegunAfterIt) {
  for (const bool by_check : {false, true}) {
    bool begun = false;
    Background background;
    background.run([] { fail("cannot write a"); });
    background.run([&] { begun = true; });
    std::string message = "no error";
    while (by_check && message == "no error") {
      message = message_of([&] { background.check(); });
    }
    EXPECT_EQ(by_check ? message : message_of([&] { background.wait(); }), "cannot write a");
    EXPECT_FALSE(begun);
    background.run([&] { begun = true; });
    background.wait();
    EXPECT_TRUE(begun);
  }
}

TEST(Background, IsWaitedForWhereItsOwnerLeaves) {
  bool done = false;
  std::promise<void> gate;
  std::thread opens;
  {
    Background background;
    background.run([&] {
      gate.get_future().wait();
      done = true;
    });
    opens = std::thread([&] { gate.set_value(); });
  }
  EXPECT_TRUE(done);
  opens.join();
}

}  // namespace
}  // namespace cambium
