// Residual: the stream that layers read through norms and add to.
//
// With a tape every addition makes a new tensor of the activations' type. Without one there is one
// stream for all layers in the type of sums (fp32 beside bf16: nothing is rounded from layer to
// layer), and an addition waits for the norm that follows it, with which it is one pass.
#pragma once

#include "nn/norm.h"

namespace cambium {

class Residual {
 public:
  /// h (T, C); every addition makes a new tensor.
  explicit Residual(const Tensor& h) : h_(h) {}
  /// One stream for a forward call without a tape, in memory of ctx.arena; begins as h.
  static Residual stream(Context& ctx, const Tensor& h);

  /// norm(h)
  Tensor normed(Context& ctx, const Norm& norm);
  /// h = x
  void replace(Context& ctx, const Tensor& x);
  /// h = keep h + out y
  void add(Context& ctx, float keep, float out, const Tensor& y);
  /// Adds what waits, before the memory it lies in is given back; `next` is the norm that will
  /// read, null where value() will.
  void settle(Context& ctx, const Norm* next);
  /// h in the type of the activations.
  Tensor value(Context& ctx);

 private:
  void flush(Context& ctx, const Tensor& x, const Norm* norm);

  Tensor h_;        // the stream itself where there is one
  Tensor next_;     // norm_(h), where norm_ is set
  Tensor waiting_;  // h is to become keep_ h + out_ waiting_
  const Norm* norm_ = nullptr;
  float keep_ = 0.0F;
  float out_ = 1.0F;
  bool streams_ = false;
};

}  // namespace cambium
