#include "model/random_model.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <span>

#include "base/signals.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

constexpr int64_t kDistinct = int64_t{1} << 20;  // numbers drawn for one parameter

}  // namespace

LoadedModel random_model(const ModelSpec& spec, MatrixStorage storage, uint64_t seed, Device device,
                         Model* share) {
  const auto started = std::chrono::steady_clock::now();
  LoadedModel made{{}, std::make_unique<Model>(spec), {}};
  std::map<std::string, Tensor> theirs;
  if (share != nullptr) {
    share->visit([&](const std::string& name, Parameter& p) { theirs[name] = p.tensor; });
  }
  const auto is_shared = [&](const std::string& name, const Parameter& p) {
    const auto it = theirs.find(name);
    return it != theirs.end() &&
           std::ranges::equal(
               p.shape, std::span(it->second.shape.data(), static_cast<size_t>(it->second.rank)));
  };
  made.model->visit([&](const std::string& name, Parameter& p) {
    if (is_shared(name, p)) {
      made.weights.share(name, p, theirs.at(name));
    }
  });
  made.weights.allocate(*made.model, nullptr, storage, Dtype::kF32, device);
  made.model->visit([&](const std::string& name, Parameter& p) {
    if (is_shared(name, p)) {
      return;
    }
    stop_point();
    Parameter drawn = p;
    if (p.numel() > kDistinct) {
      drawn.shape = {kDistinct};
    }
    const OwnedTensor values(Dtype::kF32, drawn.shape);
    drawn.tensor = values.view;
    initialise(drawn, name, seed);
    const Tensor flat = p.tensor.reshape({p.numel()});
    const Tensor from = drawn.tensor.reshape({drawn.numel()});
    const int64_t first = std::min(kDistinct, p.numel());
    copy(flat.slice(0, 0, first), from.slice(0, 0, first));
    for (int64_t at = first; at < p.numel();) {  // what is there already, again
      const int64_t count = std::min(at, p.numel() - at);
      copy(flat.slice(0, at, count), flat.slice(0, 0, count));
      at += count;
    }
  });
  if (device.kind == Device::kCuda && storage == MatrixStorage::kBF16) {
    made.model->set_activations(Dtype::kBF16);
  }
  wait_for(device);
  made.load_bytes = static_cast<uint64_t>(made.weights.bytes());
  made.load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return made;
}

}  // namespace cambium
