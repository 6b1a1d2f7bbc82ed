// What the tests of all rooms share.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"

namespace cambium::testing {

/// The message of the Error that `call` throws, or "no error".
template <class Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

/// The same where there must be an Error: without one it is a failure.
template <class Call>
std::string error_of(Call call) {
  bool failed = false;
  const std::string message = message_of([&] {
    failed = true;
    call();
    failed = false;
  });
  EXPECT_TRUE(failed) << "expected an error";
  return message;
}

}  // namespace cambium::testing
