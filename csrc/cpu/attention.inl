// Attention's kernels. Included once per instruction set (foreach_isa.h).
//
// Tiles of scores of kQueryBlock rows and up to kKeyBlock columns stay in the caches; softmax is kept online (Milakov
// and Gimelshein, "Online normalizer calculation for softmax", 2018), and made again from its logarithm in backward
// (Dao et al., "FlashAttention", 2022).

namespace attention {

#include "attention_product.inl"

template <class T>
constexpr T kInfinity = __builtin_inff();

#include "attention_scores.inl"

#include "attention_forward.inl"

#include "attention_backward.inl"

#include "attention_added.inl"

inline void forward_body(const AttentionForwardContext& f, Team team) {
  if (f.args.problem.dtype == kFloat64)
    forward_tasks<double>(f, team);
  else
    forward_tasks<float>(f, team);
}

inline void backward_body(const AttentionBackwardContext& b, Team team) {
  if (b.args.problem.dtype == kFloat64)
    backward_tasks<double>(b, team);
  else
    backward_tasks<float>(b, team);
}

#undef DLKERN_UNROLL

}  // namespace attention
