#include <algorithm>

#include "ops/selection/selection_work.h"
#include "tensor/arena.h"

namespace cambium {

void choose_tokens_of::cpu(const ChooseTokens<float>& a, Arena& arena) {
  for (int64_t s = 0; s < a.shape.segments; ++s) {
    const int64_t end = a.shape.start[s + 1];
    const int64_t longest = a.candidates(a.shape.first_position(s) + a.shape.length(s) - 1);
    const int64_t room = a.chosen.lists * longest + a.shape.heads;
    const ArenaScope scope(arena);
    auto* scores = static_cast<float*>(
        arena.allocate(kTokensScored * room * static_cast<int64_t>(sizeof(float))));
    for (int64_t t = a.shape.start[s]; t < end; t += kTokensScored) {
      choose_piece({a, s, t, std::min(end, t + kTokensScored), scores, longest, room});
    }
  }
}

}  // namespace cambium
