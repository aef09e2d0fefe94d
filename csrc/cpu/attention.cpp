// Attention: which kernels run, on how many threads, with which memory.
#include "dlkern/attention.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "attention_plan.h"
#include "dlkern/activation.h"

#define DLKERN_KERNELS "attention.inl"
#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wunused-function"  // of the elementary functions only some are used here
#endif
#include "foreach_isa.h"

namespace dlkern::cpu {

namespace {

// Multiply-adds below which a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 18;

AttentionPlan make_plan(const AttentionProblem& p, int64_t least_tasks) {
  AttentionPlan plan{};
  plan.group = p.heads / p.key_heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, b);
    plan.most_queries = std::max(plan.most_queries, s.queries);
    plan.most_keys = std::max(plan.most_keys, s.keys);
    if (p.cu_queries == nullptr) break;
  }
  const int64_t items = plan.group * query_blocks(plan.most_queries), pairs = p.batch * p.key_heads;
  plan.parts = std::clamp<int64_t>(divided_up(least_tasks, pairs), 1, std::max<int64_t>(items, 1));
  plan.units = pairs * plan.parts;
  plan.chunk = divided_up(plan.units, kChunks);
  plan.chunks = divided_up(plan.units, plan.chunk);
  plan.row = row_of(p.dim), plan.value_row = row_of(p.value_dim);
  plan.positions = p.table && p.reach < 0;
  plan.distances = p.table && p.reach >= 0;
  return plan;
}

template <class T, class Args>
void run_typed(const Args& args, AttentionPlan& plan, int threads, bool backward,
               void (*body)(const AttentionContext<Args>&, Team)) {
  const AttentionProblem& p = args.problem;
  const double work = (double)plan.group * (double)p.key_heads * (double)p.queries * (double)plan.most_keys *
                      (double)(p.cu_queries ? 1 : p.batch) * (double)(p.dim + p.value_dim);
  threads = (int)std::clamp<double>(work / kGrain, 1, std::max(threads, 1));
  AttentionWork<T> none{};
  plan.per_thread = AttentionWork<T>::layout(none, p, plan, backward, nullptr);
  constexpr size_t kAligned = 64;
  const auto aligned = [](size_t bytes) { return (bytes + kAligned - 1) / kAligned * kAligned; };
  const size_t tables = aligned(backward && p.table ? (size_t)(plan.chunks * p.heads * p.rows) * sizeof(double) : 0);
  const size_t keys =
      aligned(backward && plan.parts > 1
                  ? (size_t)(plan.units * (padded(plan.most_keys) + kPadded) * (plan.row + plan.value_row)) * sizeof(T)
                  : 0);
  const size_t own = aligned((size_t)plan.per_thread * sizeof(T)) * (size_t)threads;
  const std::unique_ptr<char[]> memory(new char[tables + keys + own + kAligned]);
  char* first = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & (kAligned - 1));
  std::atomic<int64_t> next[3] = {{0}, {0}, {0}};
  plan.per_thread = (int64_t)(aligned((size_t)plan.per_thread * sizeof(T)) / sizeof(T));
  const AttentionContext<Args> context{
      args, plan, reinterpret_cast<double*>(first), first + tables, first + tables + keys, next};
  run_team(threads, body, context);
}

template <class Args>
void run(const Args& args, AttentionPlan plan, int threads, bool backward,
         void (*body)(const AttentionContext<Args>&, Team)) {
  if (args.problem.dtype == kFloat64)
    run_typed<double>(args, plan, threads, backward, body);
  else
    run_typed<float>(args, plan, threads, backward, body);
}

}  // namespace

void attention_forward(const AttentionForward& args, int threads) {
  // each block's result is its own: how many tasks there are does not show
  const AttentionPlan plan = make_plan(args.problem, 4 * (int64_t)std::max(threads, 1) - 3);
#if DLKERN_HAS_AVX2
  if (active_isa() == kAvx2) return run(args, plan, threads, false, &avx2::attention::forward_body);
#endif
  run(args, plan, threads, false, &portable::attention::forward_body);
}

void attention_backward(const AttentionBackward& args, int threads) {
  const AttentionPlan plan = make_plan(args.problem, kBackwardTasks);
#if DLKERN_HAS_AVX2
  if (active_isa() == kAvx2) return run(args, plan, threads, true, &avx2::attention::backward_body);
#endif
  run(args, plan, threads, true, &portable::attention::backward_body);
}

}  // namespace dlkern::cpu
