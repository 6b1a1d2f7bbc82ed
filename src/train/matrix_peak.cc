#include "train/matrix_peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "base/random.h"
#include "ops/matmul/matmul.h"
#include "tensor/copy.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

constexpr int kProducts = 9;
constexpr int64_t kDistinct = int64_t{1} << 18;  // numbers drawn; they repeat

// What a product costs depends on the numbers: a chip that multiplies zeros draws less power.
void fill_random(const Tensor& t, uint64_t seed) {
  const OwnedTensor drawn(Dtype::kF32, {kDistinct});
  Rng random(seed, 0);
  for (int64_t i = 0; i < kDistinct; ++i) {
    drawn.view.ptr<float>()[i] = random.normal();
  }
  const Tensor flat = t.reshape({t.numel()});
  const int64_t first = std::min(kDistinct, t.numel());
  copy(flat.slice(0, 0, first), drawn.view.slice(0, 0, first));
  for (int64_t at = first; at < t.numel();) {
    const int64_t count = std::min(at, t.numel() - at);
    copy(flat.slice(0, at, count), flat.slice(0, 0, count));
    at += count;
  }
}

}  // namespace

double measure_matrix_peak(Device device, Dtype dtype) {
  const bool cuda = device.kind == Device::kCuda;
  const int64_t n = !cuda ? 768 : dtype == Dtype::kBF16 ? 8192 : 4096;
  const OwnedTensor x(dtype, {n, n}, false, device);
  const OwnedTensor weight(dtype, {n, n}, false, device);
  const OwnedTensor y(dtype, {n, n}, false, device);
  fill_random(x.view, 1);
  fill_random(weight.view, 2);
  Workspace workspace(device);
  const Context ctx = workspace.context(dtype);
  std::vector<double> seconds;
  for (int i = 0; i < kProducts + 2; ++i) {
    wait_for(device);
    const auto start = std::chrono::steady_clock::now();
    matmul_into(ctx, y.view, x.view, weight.view);
    wait_for(device);
    if (i >= 2) {  // the first ones choose an algorithm and wake the device
      seconds.push_back(
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
  }
  const auto middle = seconds.begin() + kProducts / 2;
  std::nth_element(seconds.begin(), middle, seconds.end());
  const auto side = static_cast<double>(n);
  return 2.0 * side * side * side / *middle;
}

}  // namespace cambium
