#include "base/simd.h"
#include "vector_math.h"

namespace cambium::CAMBIUM_ISA {

void vector_math(const VectorMath& a) {
  for (int64_t i = 0; i < a.n; i += kLanes) {
    const vf x = vload_upto(a.x + i, a.n - i);
    vf y = {};
    switch (a.function) {
      case VectorFunction::kExp:
        y = vexp(x);
        break;
      case VectorFunction::kLog:
        y = vlog(x);
        break;
      case VectorFunction::kSoftplus:
        y = vsoftplus(x);
        break;
      case VectorFunction::kSigmoid:
        y = vsigmoid(x);
        break;
      case VectorFunction::kSilu:
        y = vsilu(x);
        break;
      case VectorFunction::kSiluGrad:
        y = vsilu_grad(x);
        break;
    }
    vstore_upto(a.y + i, y, a.n - i);
  }
}

void vector_parts(const VectorParts& a) {
  for (int64_t r = 0; r <= a.n && r <= kLanes; ++r) {
    vstore_part(a.y + r * a.n, vload_part(a.x + r * a.n, r), r);
  }
}

void vector_square(const VectorSquare& a) {
  vf rows[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = vload(a.x + i * kLanes);
  }
  transpose_square(rows);
  for (int i = 0; i < kLanes; ++i) {
    vstore(a.y + i * kLanes, rows[i]);
  }
  *a.lanes = kLanes;
}

}  // namespace cambium::CAMBIUM_ISA
