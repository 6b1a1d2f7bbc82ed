// What the tests of products share.
#pragma once

#include <cstdint>
#include <ostream>

namespace cambium::testing {

/// x (t, k) times a weight (n, k).
struct MatmulShape {
  int64_t t, n, k;
};

inline std::ostream& operator<<(std::ostream& out, const MatmulShape& s) {
  return out << s.t << "x" << s.n << "x" << s.k;
}

}  // namespace cambium::testing
