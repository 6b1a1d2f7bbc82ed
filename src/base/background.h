// Work that goes on beside the caller's: what was written is made durable while the next steps are
// done.
#pragma once

#include <functional>
#include <future>

namespace cambium {

/// Works are done one after the other, each on a thread of its own. Who owns it waits at the end;
/// destroying it waits too, and an error that nobody waited for is lost.
class Background {
 public:
  /// Begins `work` as soon as all that was given before is done. After one that failed no other is
  /// begun. It must not read what its caller changes meanwhile, nor ask for stop_point().
  void run(std::function<void()> work);
  /// Throws what failed, where that is known already; does not wait.
  void check();
  /// Until all is done. Throws what the first that failed threw, once.
  void wait();

 private:
  std::future<void> last_;  // of std::async: its end is waited for when it is destroyed
};

}  // namespace cambium
