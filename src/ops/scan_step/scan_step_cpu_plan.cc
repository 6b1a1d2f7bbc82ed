// The CPU computes these steps operation by operation: the definition stands in for a kernel.
#include "ops/scan_step/scan_step_ref.h"
#include "tensor/arena.h"

namespace cambium {

void scan_step_forward::cpu(const ScanStep<float>& a, Arena& /*arena*/) {
  reference(a);
}

}  // namespace cambium
