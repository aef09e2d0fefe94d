// How a recurrent sequence is walked, and how it is shared between threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dlkern/recurrent.h"
#include "team.h"

namespace dlkern::cpu {

// Multiply-adds below which a second thread costs more than it saves: in all, where threads take batch elements of
// their own; in one step, where they share its units and wait for each other at its end.
constexpr int64_t kGrainRows = 1 << 18;
constexpr int64_t kGrainUnits = 1 << 16;
// Units that one thread takes at a time: a cache line of float32.
constexpr int64_t kUnits = 16;

// One step: its rows, and those of the step before it in the order of the recurrence (none: before_batch is 0).
struct Step {
  int64_t t, offset, batch, before, before_batch;
};

inline int64_t batch_at(const RecurrentSize& s, int64_t t) { return s.batch_sizes ? s.batch_sizes[t] : s.batch; }

// Walks the steps in the order of the recurrence (`onward`) or against it.
class Walk {
 public:
  Walk(const RecurrentSize& size, bool onward) : size_(size), ascending_(onward != size.reverse) {
    t_ = ascending_ ? 0 : size.steps - 1;
    offset_ = ascending_ || size.steps == 0 ? 0 : size.rows - batch_at(size, t_);
  }
  bool done() const { return t_ < 0 || t_ >= size_.steps; }
  Step step() const {
    Step s{t_, offset_, batch_at(size_, t_), 0, 0};
    if (!size_.reverse && t_ > 0) {
      s.before = offset_ - batch_at(size_, t_ - 1);
      s.before_batch = s.batch;
    } else if (size_.reverse && t_ + 1 < size_.steps) {
      s.before = offset_ + s.batch;
      s.before_batch = batch_at(size_, t_ + 1);
    }
    return s;
  }
  void next() {
    if (ascending_) {
      offset_ += batch_at(size_, t_++);
    } else if (--t_ >= 0) {
      offset_ -= batch_at(size_, t_);
    }
  }

 private:
  const RecurrentSize& size_;
  bool ascending_;
  int64_t t_, offset_;
};

// What one thread does of each step: all units of some batch elements, which needs no barrier, or some units of all.
struct Share {
  Range batch, units, outputs;
  bool together;  // threads wait for each other
};

inline bool by_batch(const RecurrentSize& s, int threads) { return threads == 1 || s.batch >= 2 * threads; }

// With `apart` threads never wait for each other: of few batch elements some threads have none.
inline Share share_of(const RecurrentSize& s, Team team, bool apart = false) {
  Share share{{0, s.batch}, {0, s.hidden}, {0, s.outputs}, false};
  if (!apart && !by_batch(s, team.size)) {
    share.units = team.share(s.hidden, kUnits);
    share.outputs = s.outputs == s.hidden ? share.units : team.share(s.outputs, kUnits);
    share.together = true;
  } else if (s.batch_sizes == nullptr) {
    share.batch = team.share(s.batch);
  } else {  // consecutive elements, of about the same number of rows
    int64_t length = s.steps, sum = 0, b = 0;
    const auto until = [&](int64_t target) {
      for (; b < s.batch && sum < target; ++b) {
        while (length > 0 && s.batch_sizes[length - 1] <= b) --length;
        sum += length;
      }
      return b;
    };
    share.batch.begin = until(s.rows * team.rank / team.size);
    share.batch.end = team.rank + 1 == team.size ? s.batch : until(s.rows * (team.rank + 1) / team.size);
  }
  return share;
}

}  // namespace dlkern::cpu
