// How depthwise sees an axis of an image, and how it cuts its work into partial results.
//
// The cut depends on the shape alone, and partial results are merged in one order, so that results are the same bits
// whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "dlkern/depthwise.h"

namespace dlkern::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Outputs [begin, end) whose taps inside the image are [tap_begin, tap_end).
struct Segment {
  int64_t begin, end, tap_begin, tap_end;
};

// A correlation along one axis: output t, stored at position start + t * stride, is the sum over taps k of
// weight[first + k * next] * input[t * step + offset + k * spacing], where that is inside [0, in).
//
// A forward pass is one of these; the gradient of the input is one for each remainder of the position by the stride.
struct Axis {
  int64_t in, out, step, taps, offset, spacing, first, next, start, stride;
  std::vector<Segment> segments;

  int64_t input(int64_t t, int64_t k) const { return t * step + offset + k * spacing; }

  void cut() {
    int64_t t = 0;
    while (t < out) {
      Segment s{t, t, 0, taps};
      while (s.tap_begin < taps && input(t, s.tap_begin) < 0) ++s.tap_begin;
      while (s.tap_end > s.tap_begin && input(t, s.tap_end - 1) >= in) --s.tap_end;
      // with t the first tap inside enters at the front, and the last one leaves at the back
      int64_t end = out;
      const auto change = [&](int64_t k, int64_t bound) {  // the first output at which tap k is at `bound`
        const int64_t distance = bound - offset - k * spacing;
        return distance <= 0 ? 0 : divide_up(distance, step);
      };
      if (s.tap_begin > 0) end = std::min(end, change(s.tap_begin - 1, 0));
      if (s.tap_end > s.tap_begin) end = std::min(end, change(s.tap_end - 1, in));
      s.end = std::max(end, t + 1);
      segments.push_back(s);
      t = s.end;
    }
  }
};

inline Axis forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
  Axis a{in, out, stride, kernel, -pad, dilation, 0, 1, 0, 1, {}};
  a.cut();
  return a;
}

// Of the input's positions that are `phase` modulo stride; `in` and `out` are those of the forward pass.
inline Axis gradient_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad,
                          int64_t phase) {
  Axis a{out, in > phase ? divide_up(in - phase, stride) : 0, 1, 0, 0, 1, 0, -1, phase, stride, {}};
  int64_t previous = -1;
  for (int64_t s = 0; s < kernel; ++s) {
    if ((phase + pad - s * dilation) % stride != 0) continue;
    if (previous >= 0) a.next = previous - s, a.spacing = (s - previous) * dilation / stride;
    previous = s;
    ++a.taps;
  }
  if (a.taps) a.first = previous, a.offset = (phase + pad - previous * dilation) / stride;
  a.cut();
  return a;
}

// Rows of the output (of all images, one after the other) are cut into blocks, at most this many.
constexpr int64_t kDepthwiseBlocks = 64;
// Outputs of one channel in a block, at least.
constexpr int64_t kDepthwiseBlock = 512;

// Rows of an image in the wide type with zeros around them, as kernels on planes read them. Where outputs are `step`
// columns apart, columns are sorted by their remainder, so that those of consecutive outputs lie side by side.
struct PaddedRows {
  int64_t base;            // the column of the image that comes first, at most 0
  int64_t step, length;    // remainders, and elements of each
  int64_t columns;         // of the image
  int64_t band, capacity;  // rows of outputs that are made together, and rows of the image that takes

  int64_t row() const { return step * length; }
  int64_t position(int64_t column) const { return (column - base) % step * length + (column - base) / step; }
};

// Elements of padded rows that a thread works on at a time.
constexpr int64_t kPaddedElements = 32768;

// For correlations over `columns` and `rows`, one of each for every remainder.
inline PaddedRows padded_rows(const std::vector<Axis>& rows, const std::vector<Axis>& columns) {
  PaddedRows p{0, columns[0].step, 0, columns[0].in, 0, 0};
  int64_t end = p.columns, above = 0, below = 0, out = 0;
  for (const Axis& a : columns) {
    p.base = std::min(p.base, a.offset);
    end = std::max(end, a.out ? a.input(a.out - 1, std::max<int64_t>(a.taps - 1, 0)) + 1 : 0);
  }
  for (const Axis& a : rows) {
    above = std::min(above, a.offset);
    below = std::max(below, a.offset + std::max<int64_t>(a.taps - 1, 0) * a.spacing);
    out = std::max(out, a.out);
  }
  p.length = (divide_up(end - p.base, p.step) + 31) / 16 * 16;
  const int64_t step = rows[0].step, budget = kPaddedElements / p.row();
  p.band =
      budget >= rows[0].in ? out : std::clamp<int64_t>((budget - (below - above)) / step, 8, std::max<int64_t>(out, 8));
  p.capacity = std::min(rows[0].in, p.band * step + below - above + 1);
  return p;
}

// Outputs from this many bytes on are stored past the caches (channels last).
constexpr int64_t kDepthwiseStreamedBytes = 4 << 20;

// Rows of one image that a thread copies, where kernels read them from places that crowd each other out of the cache:
// so many bytes from one pixel to the next that a column of pixels finds few sets of it. A copy has its pixels apart by
// one cache line more.
struct RowCopies {
  int64_t spacing, capacity;  // rows that are read together: their distance, and how many
  int64_t width, channels;    // of a row
  int64_t pixel;              // elements from one pixel of a copy to the next; 0 where rows are read where they are
  int64_t doubles;            // memory for all of them
};

inline RowCopies row_copies(const std::vector<Axis>& rows, int64_t dilation, int64_t width, int64_t channels,
                            int64_t element_bytes) {
  RowCopies c{1, 1, width, channels, 0, 0};
  if (dilation == 1 || channels * element_bytes % 512 != 0) return c;
  for (const Axis& a : rows) {
    c.capacity = std::max(c.capacity, a.taps);
    if (a.taps > 1) c.spacing = a.spacing;
  }
  c.pixel = channels + 64 / element_bytes;
  c.doubles = divide_up(c.capacity * width * c.pixel * element_bytes, 128) * 16;
  return c;
}

// Rows of the output in the order in which neighbours, `step` apart, share rows of the input.
inline std::vector<int64_t> row_order(int64_t count, int64_t step) {
  std::vector<int64_t> order;
  for (int64_t first = 0; first < std::min(step, count); ++first)
    for (int64_t t = first; t < count; t += step) order.push_back(t);
  return order;
}

struct DepthwisePlan {
  int64_t outputs;  // channels * multiplier
  int64_t taps;
  std::vector<Axis> rows, columns;                  // one of each in forward, stride_h and stride_w in backward
  std::vector<Axis> forward_rows, forward_columns;  // one of each, for the gradient of weight
  // channels last: rows of the output, of all images, are cut into blocks; planes: images are, in backward
  int64_t row_count, rows_per_block, blocks;
  std::vector<int64_t> order;           // channels last: of the rows of an image
  int64_t step;                         // and from one of them to the next
  RowCopies input_rows, gradient_rows;  // channels last: of x and of grad_y
  PaddedRows input, gradient;           // planes: what x and grad_y are copied to
  int64_t group;  // planes: neighbouring channels of an image that a thread takes in turn, in backward
  // doubles of working memory: common to all threads, and for each thread
  int64_t common, per_thread;
};

template <class Args>
struct DepthwiseContext {
  const Args& args;
  const DepthwisePlan& plan;
  double* common;
  double* scratch;  // plan.per_thread doubles for each thread
};
typedef DepthwiseContext<DepthwiseForward> DepthwiseForwardContext;
typedef DepthwiseContext<DepthwiseBackward> DepthwiseBackwardContext;

}  // namespace dlkern::cpu
