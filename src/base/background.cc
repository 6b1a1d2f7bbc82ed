#include "base/background.h"

#include <chrono>
#include <utility>

namespace cambium {

void Background::run(std::function<void()> work) {
  last_ =
      std::async(std::launch::async, [before = std::move(last_), work = std::move(work)]() mutable {
        if (before.valid()) {
          before.get();
        }
        work();
      });
}

void Background::check() {
  if (last_.valid() && last_.wait_for(std::chrono::seconds(0)) == std::future_status::ready) {
    last_.get();
  }
}

void Background::wait() {
  if (last_.valid()) {
    last_.get();
  }
}

}  // namespace cambium
