// For tests of what survives a kill: this test program again, as a process of its own.
#pragma once

#include <string>

namespace cambium {

/// Starts this program with only the (disabled) test `name` and `folder` in its environment, where
/// test_child_folder finds it; what it says is dropped. Kills it (SIGKILL) after `delay`
/// milliseconds, or waits for its end when negative. Returns whether it ended by itself and passed.
bool run_test_child(const std::string& name, const std::string& folder, long delay);

/// In the child: the folder it was given. Empty elsewhere.
std::string test_child_folder();

}  // namespace cambium
