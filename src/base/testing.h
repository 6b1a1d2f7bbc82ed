// What the tests of all rooms share.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "base/error.h"

namespace cambium::testing {

/// The message of the Error that `call` throws, or "" and a failure.
template <class Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  ADD_FAILURE() << "expected an error";
  return "";
}

}  // namespace cambium::testing
