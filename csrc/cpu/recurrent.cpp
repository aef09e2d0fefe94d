// Recurrent layers: which kernels run the time loop, on how many threads.
#include "dlkern/recurrent.h"

#include <algorithm>
#include <memory>

#include "dlkern/activation.h"
#include "recurrent_plan.h"

#define DLKERN_KERNELS "recurrent.inl"
#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wunused-function"  // of the elementary functions only some are used here
#endif
#include "foreach_isa.h"

namespace dlkern::cpu {

namespace {

int64_t gates_of(const RecurrentSize& s) { return s.cell == kLstm ? 4 : s.cell == kGru ? 3 : 1; }

int threads_for(const RecurrentSize& s, int threads) {
  const int64_t row = gates_of(s) * s.hidden * s.outputs + (s.outputs == s.hidden ? 0 : s.hidden * s.outputs);
  threads = std::max(threads, 1);
  const int64_t worth = s.batch >= 2 * threads ? s.rows * row / kGrainRows : s.batch * row / kGrainUnits;
  return (int)std::clamp<int64_t>(worth, 1, threads);
}

}  // namespace

void recurrent_forward(const RecurrentForward& given, int threads) {
  RecurrentForward args = given;
  threads = threads_for(args.size, threads);
  if (args.variant) threads = (int)std::min<int64_t>(threads, args.size.batch);
  std::unique_ptr<double[]> gates;
  if (args.gates == nullptr) {
    gates.reset(new double[args.size.rows * gates_of(args.size) * args.size.hidden]);
    args.gates = gates.get();
  }
#if DLKERN_HAS_AVX2
  if (active_isa() == kAvx2) return run_team(threads, &avx2::recurrent::forward_body, args);
#endif
  run_team(threads, &portable::recurrent::forward_body, args);
}

void recurrent_backward(const RecurrentBackward& args, int threads) {
  threads = threads_for(args.size, threads);
  if (args.variant) threads = (int)std::min<int64_t>(threads, args.size.batch);
#if DLKERN_HAS_AVX2
  if (active_isa() == kAvx2) return run_team(threads, &avx2::recurrent::backward_body, args);
#endif
  run_team(threads, &portable::recurrent::backward_body, args);
}

}  // namespace dlkern::cpu
