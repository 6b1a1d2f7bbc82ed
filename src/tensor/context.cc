#include "tensor/context.h"

#include <cstring>

#include "tensor/work_recorder.h"

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

void GradientPool::next_layer() {
  turn_ = 1 - turn_;
  for (Piece& piece : pieces_[turn_]) {
    piece.taken = false;
  }
}

void* GradientPool::take(Arena& arena, int64_t bytes) {
  Piece* best = nullptr;
  for (Piece& piece : pieces_[turn_]) {
    if (!piece.taken && piece.bytes >= bytes && (best == nullptr || piece.bytes < best->bytes)) {
      best = &piece;
    }
  }
  if (best == nullptr) {
    best = &pieces_[turn_].emplace_back(Piece{arena.allocate(bytes), bytes, false});
  }
  best->taken = true;
  return best->data;
}

Tensor Context::result(Dtype dtype, std::span<const int64_t> shape, bool with_grad) const {
  Tensor t = arena->empty(dtype, shape);
  if (with_grad) {
    tape->set_fresh_grad(
        t, gradients != nullptr ? gradients->take(*arena, t.bytes()) : arena->allocate(t.bytes()));
  }
  return t;
}

const void* Context::to_device(const void* elements, int64_t bytes) const {
  if (device().kind == Device::kCpu) {
    return elements;
  }
  if (device().kind == Device::kMeta) {
    return arena->allocate(bytes);
  }
  if (recorder != nullptr) {
    if (void* uploaded = recorder->upload(elements, bytes); uploaded != nullptr) {
      return uploaded;
    }
  }
  void* pinned = host_arena().allocate(bytes);
  std::memcpy(pinned, elements, static_cast<size_t>(bytes));
  void* copy = arena->allocate(bytes);
  copy_from_pinned(copy, device(), pinned, bytes);
  return copy;
}

}  // namespace cambium
