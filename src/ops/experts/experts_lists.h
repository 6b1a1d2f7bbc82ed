// What a router is and what it leaves: numbers and pointers only, so that kernels of every backend
// include it.
#pragma once

#include <cstdint>

namespace cambium {

/// Most experts of a router.
inline constexpr int64_t kMaxRoutedExperts = 1024;

/// How logits become scores.
enum class RouterScore : uint8_t {
  kSoftmax,  // over all experts
  kSigmoid,  // each by itself (DeepSeek-V3, arXiv 2412.19437)
};

/// Tokens choose by score + choice bias and weigh by the score alone:
///   weight = scale * score / (sum of the chosen scores + eps)   renormalised
///   weight = scale * score                                      else
/// A softmax over the chosen logits alone is kSoftmax renormalised with eps 0. With groups the
/// experts are cut into so many equal ones; the `group_top` groups whose two best choices have the
/// largest sum stay, the others' experts are not chosen (DeepSeek-V3). Of equal choices the lower
/// expert wins.
struct RouterConfig {
  RouterScore score = RouterScore::kSoftmax;
  int64_t top = 1;
  bool renormalise = false;
  float eps = 0.0F;
  float scale = 1.0F;
  int64_t groups = 1;
  int64_t group_top = 1;
};

/// Which experts the tokens of a call go to. Slot t * top + k is the k-th expert of token t; rows
/// are the slots ordered by expert, those of one expert in the order of the tokens. The lists lie
/// where kernels find them and live as long as the results.
struct ExpertLists {
  int64_t tokens = 0;
  int64_t experts = 0;
  int64_t top = 0;
  int32_t* expert = nullptr;  // (T * top): of a slot
  int32_t* row = nullptr;     // (T * top): of a slot
  int32_t* slot = nullptr;    // (T * top): of a row
  int32_t* start = nullptr;   // (E + 1): the first row of an expert, and the number of rows

  constexpr int64_t rows() const { return tokens * top; }
};

}  // namespace cambium
