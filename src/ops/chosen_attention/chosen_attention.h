// Attention to chosen keys and values: softmax attention whose tokens look at what an index has
// chosen for each group of heads (ops/selection), as MiniMax-M3's block-sparse attention does.
#pragma once

#include "ops/attention/attention.h"
#include "ops/selection/chosen_tokens.h"

namespace cambium {

/// y[t, h] = sum over s of softmax_s(scale q[t, h] . k[s, g]) v[s, g], over the tokens that token t
/// has chosen for head g of the keys, that of query head h; softmax in fp32.
/// q (T, H, D), k (T, Hkv, D), v (T, Hkv, Dv) -> (T, H, Dv). The choice has one list a token, or
/// one for each head of keys. Backward adds to the gradients of all three; the choice has none.
/// With pages, where k and v go first unless they are written, keys and values are read from there,
/// those of the tokens before too, and there is no gradient.
Tensor chosen_attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Segments& segments, float scale, const ChosenTokens& chosen,
                        const KvPages* pages = nullptr);

}  // namespace cambium
