#include "isa.h"

#include <atomic>

#if DLKERN_HAS_AVX2
#include <cpuid.h>
#endif

namespace dlkern::cpu {

namespace {

#if DLKERN_HAS_AVX2
// By hand and not by __builtin_cpu_supports: that one knows F16C from GCC 11 on only, and some Clang runtimes answer 0
// to everything.
bool has_avx2() {
  constexpr unsigned kFma = 1u << 12, kXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29, kAvx2 = 1u << 5;
  constexpr unsigned kNeeded = kFma | kXsave | kAvx | kF16c;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kNeeded) != kNeeded) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 6u) != 6u) return false;  // the operating system does not save the wide registers
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & kAvx2) != 0;
}
#endif

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa best_isa() {
#if DLKERN_HAS_AVX2
  static const bool avx2 = has_avx2();
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { active().store(isa, std::memory_order_relaxed); }

}  // namespace dlkern::cpu
