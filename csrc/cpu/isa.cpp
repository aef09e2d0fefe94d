#include "isa.h"

#include <atomic>

namespace dlkern::cpu {

Isa best_isa() {
#if DLKERN_HAS_AVX2
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kPortable;
}

namespace {
std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}
}  // namespace

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { active().store(isa, std::memory_order_relaxed); }

}  // namespace dlkern::cpu
