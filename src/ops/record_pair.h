// The backward step of operations on two inputs.
#pragma once

#include "ops/checks.h"
#include "ops/pair_sets.h"
#include "ops/run.h"

namespace cambium {

/// Records Backward for y = f(a, b), b undefined where there is none. args.operator()<T>() builds
/// its arguments, whose `sets` then says which gradients it sets.
template <class Backward, class Args>
void record_pair(const Context& ctx, const Tensor& y, const Tensor& a, const Tensor& b,
                 const Args& args) {
  ctx.record({y}, [=](const Context& c) {
    const bool set_a = sets_grad(a);
    const bool set_b = sets_grad(b);  // not if it is a's, which is set
    run<Backward>(c, a, [=]<class T>() {
      auto with_sets = args.template operator()<T>();
      with_sets.sets = {set_a, set_b};
      return with_sets;
    });
  });
}

}  // namespace cambium
