// How attention is cut into blocks, tasks and working memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "dlkern/attention.h"
#include "team.h"

namespace dlkern::cpu {

constexpr int64_t kQueryBlock = 66;            // rows of a tile of scores: 11 times the 6 of a product's tile
constexpr int64_t kKeyBlock = 128;             // its columns
constexpr int64_t kScoreRow = kKeyBlock + 16;  // and where its next row begins: not a multiple of a page's parts
constexpr int64_t kPadded = 16;                // rows of working memory are whole multiples of that
// Tasks that backward is cut into at least, where there are so many blocks, and the sets of partial sums at most.
constexpr int64_t kBackwardTasks = 16, kChunks = 64;

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t padded(int64_t n) { return divided_up(n, kPadded) * kPadded; }
// The length of a row of working memory: multiples of 64 elements would share few sets of the first cache.
inline int64_t row_of(int64_t n) { return padded(n) % 64 == 0 ? padded(n) + kPadded : padded(n); }

// One sequence: where its rows begin, and how many there are.
struct Sequence {
  int64_t first_query, queries, first_key, keys, offset;
};

inline Sequence sequence(const AttentionProblem& p, int64_t b) {
  if (p.cu_queries == nullptr) return {0, p.queries, 0, p.keys, p.offset};
  Sequence s{p.cu_queries[b], p.cu_queries[b + 1] - p.cu_queries[b], p.cu_keys[b], p.cu_keys[b + 1] - p.cu_keys[b], 0};
  s.offset = p.bottom_right ? s.keys - s.queries : p.offset;
  return s;
}

inline int64_t query_blocks(int64_t queries) { return divided_up(queries, kQueryBlock); }

// Consecutive batches whose heads are taken in turn: a head's table is made once for all of them, and what lies beside
// it in memory is found in a cache by the next head.
constexpr int64_t kBatches = 8;

// Work is cut into units (band of batches, key head, batch, part), of which `chunk` consecutive ones are one task. A
// part is a share of the blocks of queries of all heads that read the key head.
struct AttentionPlan {
  int64_t group, most_queries, most_keys;  // of one sequence
  int64_t parts, units, chunk, chunks;
  int64_t row, value_row;  // lengths of rows of dim and value_dim in working memory
  int64_t per_thread;      // elements
  bool positions, distances;
};

template <class Args>
struct AttentionContext {
  const Args& args;
  const AttentionPlan& plan;
  double* partial_tables;      // backward: (chunks, heads, rows)
  void* partial_keys;          // backward with several parts: (units, keys, row + value_row), wide
  void* memory;                // `size` times plan.per_thread, wide
  std::atomic<int64_t>* next;  // three counters of tasks
};

using AttentionForwardContext = AttentionContext<AttentionForward>;
using AttentionBackwardContext = AttentionContext<AttentionBackward>;

// Hands out consecutive pieces of working memory; with a null base it only counts.
template <class T>
class Carver {
 public:
  explicit Carver(T* base) : base_(base) {}
  T* take(int64_t n) {
    T* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += padded(n);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  T* base_;
  int64_t used_ = 0;
};

// A thread's working memory.
template <class T>
struct AttentionWork {
  T *query, *scores,
      *slopes;  // query (kQueryBlock, row) where it is copied; scores, and what softcap's gradient is multiplied by
  T *out, *top, *sum, *scaled;  // (kQueryBlock, value_row) and three per row
  T *key_panels, *value_rows;   // a head's keys in panels, values in rows (forward)
  T* hidden;                    // (keys,): 0 or -infinity
  T* diagonals;                 // what is added by distance
  T* tile;                      // (kQueryBlock, kScoreRow): what is added by position
  T* kept;                      // what dropout multiplies with
  // backward
  T *value_panels, *key_rows, *grad_out, *grad_scores, *dropped, *grad_query, *grad_key, *grad_value;
  T *grad_diagonals, *grad_tile;

  static int64_t layout(AttentionWork& w, const AttentionProblem& p, const AttentionPlan& plan, bool backward,
                        T* base) {
    Carver<T> c(base);
    const int64_t tile_size = kQueryBlock * kScoreRow, keys = padded(plan.most_keys) + kPadded;
    const bool diagonal = plan.distances || p.slopes != nullptr;
    const int64_t diagonals = diagonal ? plan.most_queries + keys + kPadded : 0;
    w.query = c.take(kQueryBlock * plan.row);
    w.scores = c.take(tile_size);
    w.slopes = c.take(backward && p.softcap != 0 ? tile_size : 0);
    w.out = c.take(kQueryBlock * plan.value_row);
    w.top = c.take(kQueryBlock);
    w.sum = c.take(kQueryBlock);
    w.scaled = c.take(kQueryBlock);
    w.key_panels = c.take(keys * padded(p.dim));
    w.value_rows = c.take(backward ? 0 : keys * plan.value_row);
    w.hidden = c.take(keys);
    w.diagonals = c.take(diagonals);
    w.tile = c.take(plan.positions ? tile_size : 0);
    w.kept = c.take(p.dropout > 0 ? tile_size : 0);
    const int64_t own = backward ? 1 : 0;
    w.value_panels = c.take(own * keys * padded(p.value_dim));
    w.key_rows = c.take(own * keys * plan.row);
    w.grad_out = c.take(own * kQueryBlock * plan.value_row);
    w.grad_scores = c.take(own * tile_size);
    w.dropped = c.take(own * (p.dropout > 0 ? tile_size : 0));
    w.grad_query = c.take(own * kQueryBlock * plan.row);
    w.grad_key = c.take(own * (plan.parts == 1 ? keys * plan.row : 0));
    w.grad_value = c.take(own * (plan.parts == 1 ? keys * plan.value_row : 0));
    w.grad_diagonals = c.take(own * (plan.distances ? diagonals : 0));
    w.grad_tile = c.take(own * (plan.positions ? tile_size : 0));
    return c.used();
  }
};

}  // namespace dlkern::cpu
