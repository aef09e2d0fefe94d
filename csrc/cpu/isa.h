// Which of the compiled instruction sets runs.
#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define DLKERN_HAS_AVX2 1
#else
#define DLKERN_HAS_AVX2 0
#endif

namespace dlkern::cpu {

enum Isa : int { kPortable = 0, kAvx2 = 1 };

Isa best_isa();         // the best one that was compiled and that this processor has
Isa active_isa();       // what kernels use
void set_isa(Isa isa);  // for tests

}  // namespace dlkern::cpu
