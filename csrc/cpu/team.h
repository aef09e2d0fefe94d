// A team of threads that runs one function, with barriers inside it.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>

namespace dlkern::cpu {

struct Range {
  int64_t begin, end;
};

struct Team {
  int rank, size;

  void barrier() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }

  // This member's share of `count` tasks: consecutive ones, in multiples of `grain`.
  Range share(int64_t count, int64_t grain = 1) const {
    const int64_t units = (count + grain - 1) / grain;
    return {std::min(count, units * rank / size * grain), std::min(count, units * (rank + 1) / size * grain)};
  }
};

// Whether this process was forked after the module was loaded: the threads that OpenMP keeps may not exist in it.
bool forked();

// Runs body(context, team) on `threads` threads. With one thread, and in a forked process, which would wait forever
// for the threads that its parent's OpenMP runtime had started, no OpenMP region is entered.
template <class Context>
void run_team(int threads, void (*body)(const Context&, Team), const Context& context) {
#ifdef _OPENMP
  if (threads > 1 && !forked()) {
#pragma omp parallel num_threads(threads)
    body(context, Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(context, Team{0, 1});
}

}  // namespace dlkern::cpu
