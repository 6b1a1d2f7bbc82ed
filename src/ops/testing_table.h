// Tables of operations that need nothing but their inputs.
#pragma once

#include "ops/testing.h"

namespace cambium::testing {

struct OperationRow {
  const char* name;
  Operation operation;
  std::vector<Input> inputs;
};

inline std::ostream& operator<<(std::ostream& out, const OperationRow& row) {
  return out << row.name;
}

/// Its tests are TEST_P(Suite, KernelsMatchDefinitionAndGradientsMatchDifferences) with this body.
class OperationTable : public ::testing::TestWithParam<OperationRow> {
 public:
  static void expect_kernels_and_gradients() {
    expect_gradients_match_differences(GetParam().operation, GetParam().inputs);
    expect_kernels_match_reference(GetParam().operation, GetParam().inputs);
  }
};

}  // namespace cambium::testing
