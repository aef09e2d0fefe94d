// Batch normalisation with activation and residual: which kernels run, on how many threads, with which memory.
//
// Algorithm: Ioffe and Szegedy, "Batch Normalization" (2015).
#include "dlkern/batch_norm_act.h"

#include <algorithm>
#include <memory>

#include "batch_norm_act_plan.h"
#include "dlkern/activation.h"

#define DLKERN_KERNELS "batch_norm_act.inl"
#include "foreach_isa.h"

namespace dlkern::cpu {

namespace {

// Below this many elements a thread, waking it costs more than it saves.
constexpr int64_t kGrain = 16384;

template <class Args>
void run(const Args& args, int threads, void (*body)(const Context<Args>&, Team)) {
  const Geometry& g = args.geometry;
  const int64_t elements = g.outer * g.channels * g.inner;
  if (elements == 0) return;
  threads = (int)std::clamp<int64_t>(elements / kGrain, 1, std::max(threads, 1));
  const Plan plan = make_plan(g, args.dtype == kFloat64 ? 8 : args.dtype == kFloat32 ? 4 : 2);
  const std::unique_ptr<double[]> memory(new double[plan.common + threads * plan.per_thread]);
  run_team(threads, body, Context<Args>{args, plan, memory.get(), memory.get() + plan.common});
}

}  // namespace

void batch_norm_act_forward(const BatchNormActForward& args, int threads) {
#if DLKERN_HAS_AVX2
  if (active_isa() == kAvx2) return run(args, threads, &avx2::forward_body);
#endif
  run(args, threads, &portable::forward_body);
}

void batch_norm_act_backward(const BatchNormActBackward& args, int threads) {
#if DLKERN_HAS_AVX2
  if (active_isa() == kAvx2) return run(args, threads, &avx2::backward_body);
#endif
  run(args, threads, &portable::backward_body);
}

}  // namespace dlkern::cpu
