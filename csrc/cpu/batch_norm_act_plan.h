// How batch_norm_act cuts a tensor into partial results, and the working memory that takes.
//
// The cut depends on the shape alone, and partial results are merged in one order, so that results are the same bits
// whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dlkern/batch_norm_act.h"

namespace dlkern::cpu {

// Elements (16 to a lane), or terms of a column, that are added in the wide type before their sum is added to a double.
// A gradient is often constant, and equal terms round the same way: 128 of them cost 15 eps, these 4.
constexpr int64_t kRun = 512;
constexpr int64_t kRunRows = 32;
// Elements (or rows) whose squares are summed about one shift.
constexpr int64_t kChunk = 4096;
constexpr int64_t kChunkRows = 64;
// Elements of one partial result, at least; and for rows the number of partial results, at most.
constexpr int64_t kBlock = 32768;
constexpr int64_t kRowBlocks = 64;

// Outputs from this many bytes on are stored past the caches: they would not stay there until they are read, and the
// processor need not fetch lines that are overwritten. Measured in chains of a convolution, this op and a convolution:
// 1 to 5 % less time for the chain at 6 and 25 MB, 25 % more at 0.8 MB.
constexpr int64_t kStreamedBytes = 4 << 20;

struct Plan {
  bool streaming;
  // planes: each plane is cut into `parts` pieces of `part_length`; a channel's pieces, image after image, are
  // grouped into chunks and blocks.
  int64_t parts, part_length, pieces, pieces_per_chunk, pieces_per_block;
  // The distance at which kernels prefetch. Processors prefetch along a stream within a page, so that without help
  // every short plane would begin with a wait: for the shortest, which share cache lines with their neighbours, the
  // same image's plane of the next channel (or the one after) is fetched, for others the next image's of the same
  // channel.
  int64_t ahead;
  // rows
  int64_t rows_per_chunk, rows_per_block;
  // both: partial results a channel
  int64_t blocks;
  // doubles of working memory: common to all threads, and for each thread
  int64_t common, per_thread;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Plan make_plan(const Geometry& g, int64_t element_bytes) {
  Plan p{};
  p.streaming = g.outer * g.channels * g.inner * element_bytes >= kStreamedBytes;
  if (g.channels_last) {
    p.rows_per_chunk = std::clamp<int64_t>(16 * kChunk / g.channels, 16, kChunkRows);
    const int64_t rows = std::max(divide_up(g.outer, kRowBlocks), divide_up(kBlock, g.channels));
    p.rows_per_block = divide_up(rows, p.rows_per_chunk) * p.rows_per_chunk;
    p.blocks = divide_up(g.outer, p.rows_per_block);
    p.common = (2 * p.blocks + 4) * g.channels;
    p.per_thread = 3 * g.channels;
  } else {
    p.part_length = g.inner;
    if (g.inner > kChunk) p.part_length = divide_up(divide_up(g.inner, divide_up(g.inner, kChunk)), 64) * 64;
    p.parts = divide_up(g.inner, p.part_length);
    p.ahead = g.inner <= 256    ? g.inner * std::max<int64_t>(1, 128 / g.inner)
              : g.inner <= 1024 ? g.channels * g.inner
                                : 0;
    p.pieces = g.outer * p.parts;
    p.pieces_per_chunk = std::max<int64_t>(1, kChunk / p.part_length);
    p.pieces_per_block = p.pieces_per_chunk * (kBlock / kChunk);
    p.blocks = divide_up(p.pieces, p.pieces_per_block);
    p.common = (2 * p.blocks + 2) * g.channels;
    p.per_thread = 0;
  }
  return p;
}

// Per channel count of values.
inline int64_t values_per_channel(const Geometry& g) { return g.outer * g.inner; }

template <class Args>
struct Context {
  Args args;
  Plan plan;
  double* common;
  double* scratch;  // plan.per_thread doubles for each thread
};
typedef Context<BatchNormActForward> ForwardContext;
typedef Context<BatchNormActBackward> BackwardContext;

}  // namespace dlkern::cpu
