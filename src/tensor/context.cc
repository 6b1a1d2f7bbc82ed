#include "tensor/context.h"

namespace cambium {

void Tape::backward(const Context& ctx) {
  while (!steps_.empty()) {
    const Entry entry = steps_.back();
    steps_.pop_back();
    for (; touched_.size() > entry.first_touched; touched_.pop_back()) {
      touched_.back()->settle();
    }
    const ArenaScope scope(*ctx.arena);
    entry.run(entry.closure, ctx);
  }
}

void Tape::set_fresh_grad(Tensor& t, void* grad) {
  t.grad = grad;
  t.grad_memory =
      new (arena_.allocate(sizeof(GradientMemory))) GradientMemory{t.device, grad, t.bytes(), true};
}

Tensor Context::result(Dtype dtype, std::span<const int64_t> shape, bool with_grad) const {
  Tensor t = arena->empty(dtype, shape);
  if (with_grad) {
    tape->set_fresh_grad(t, arena->allocate(t.bytes()));
  }
  return t;
}

}  // namespace cambium
