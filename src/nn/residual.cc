#include "nn/residual.h"

#include "ops/norm/norm.h"
#include "ops/pointwise/pointwise.h"

namespace cambium {
namespace {

// What value() reads by: the stream as it is.
const Norm& no_norm() {
  static const Norm none;
  return none;
}

}  // namespace

Residual Residual::stream(Context& ctx, const Tensor& h) {
  CAMBIUM_CHECK(ctx.tape == nullptr);
  Residual made(ctx.result(sum_dtype(h.dtype), {h.dim(0), h.dim(1)}, false));
  made.next_ = ctx.result_like(h, false);
  made.waiting_ = h;
  made.streams_ = true;
  return made;
}

// x, where it is defined, becomes norm(h) (h itself without a norm).
void Residual::flush(Context& ctx, const Tensor& x, const Norm* norm) {
  CAMBIUM_CHECK(waiting_.defined());
  const bool weighted = norm != nullptr && norm->spec.kind != NormKind::kNone;
  if (weighted && norm->spec.kind == NormKind::kLayer) {
    add_layer_norm_into(ctx, x, h_, keep_, waiting_, out_, norm->weight.tensor, norm->bias.tensor,
                        norm->spec.eps);
  } else {
    add_rms_norm_into(ctx, x, h_, keep_, waiting_, out_, weighted ? norm->weight.tensor : Tensor{},
                      weighted ? norm->spec.eps : 0.0F,
                      weighted && norm->spec.kind == NormKind::kZeroCentred);
  }
  waiting_ = {};
  norm_ = nullptr;
}

Tensor Residual::normed(Context& ctx, const Norm& norm) {
  if (!streams_) {
    return norm.forward(ctx, h_);
  }
  if (norm_ == &norm) {
    return next_;
  }
  const Tensor x = ctx.result_like(next_, false);
  flush(ctx, x, &norm);
  return x;
}

void Residual::replace(Context& ctx, const Tensor& x) {
  if (!streams_) {
    h_ = x;
    return;
  }
  add(ctx, 0.0F, 1.0F, x);
}

void Residual::add(Context& ctx, float keep, float out, const Tensor& y) {
  if (!streams_) {
    h_ = add_scaled(ctx, keep, h_, out, y);
    return;
  }
  if (waiting_.defined()) {
    flush(ctx, {}, nullptr);
  }
  waiting_ = y;
  keep_ = keep;
  out_ = out;
  norm_ = nullptr;
}

void Residual::settle(Context& ctx, const Norm* next) {
  if (streams_ && waiting_.defined()) {
    const Norm& norm = next == nullptr ? no_norm() : *next;
    flush(ctx, next_, &norm);
    norm_ = &norm;
  }
}

Tensor Residual::value(Context& ctx) {
  if (!streams_) {
    return h_;
  }
  return normed(ctx, no_norm());
}

}  // namespace cambium
