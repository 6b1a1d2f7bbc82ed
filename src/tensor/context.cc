#include "tensor/context.h"

namespace cambium {

void Tape::backward(const Context& ctx) {
  while (!steps_.empty()) {
    const Entry entry = steps_.back();
    steps_.pop_back();
    const ArenaScope scope(*ctx.arena);
    entry.run(entry.closure, ctx);
  }
}

Tensor Context::result(Dtype dtype, std::span<const int64_t> shape, bool with_grad) const {
  Tensor t = arena->empty(dtype, shape);
  if (with_grad) {
    t.grad = arena->allocate(t.bytes());
    std::memset(t.grad, 0, static_cast<size_t>(t.bytes()));
  }
  return t;
}

}  // namespace cambium
