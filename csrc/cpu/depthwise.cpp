// Depthwise convolution: which kernels run, on how many threads, with which memory.
#include "dlkern/depthwise.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "depthwise_plan.h"
#include "dlkern/activation.h"

#define DLKERN_KERNELS "depthwise.inl"
#include "foreach_isa.h"

namespace dlkern::cpu {

namespace {

// Below this many products a thread, waking it costs more than it saves.
constexpr int64_t kGrain = 65536;

// Elements of neighbouring planes that are to be read in turn: small ones share cache lines and pages.
constexpr int64_t kGroupElements = 4096;

constexpr int64_t kAligned = 16;  // elements that parts of the working memory begin at multiples of

int64_t aligned(int64_t n) { return divide_up(n, kAligned) * kAligned; }

int64_t bytes_of(DType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

void add_gradient_axes(DepthwisePlan& p, const DepthwiseGeometry& g) {
  for (int64_t phase = 0; phase < g.stride_h; ++phase)
    p.rows.push_back(gradient_axis(g.height, g.out_height, g.kernel_h, g.stride_h, g.dilation_h, g.pad_top, phase));
  for (int64_t phase = 0; phase < g.stride_w; ++phase)
    p.columns.push_back(gradient_axis(g.width, g.out_width, g.kernel_w, g.stride_w, g.dilation_w, g.pad_left, phase));
}

void add_forward_axes(const DepthwiseGeometry& g, std::vector<Axis>& rows, std::vector<Axis>& columns) {
  rows.push_back(forward_axis(g.height, g.out_height, g.kernel_h, g.stride_h, g.dilation_h, g.pad_top));
  columns.push_back(forward_axis(g.width, g.out_width, g.kernel_w, g.stride_w, g.dilation_w, g.pad_left));
}

void cut_rows(DepthwisePlan& p, const DepthwiseGeometry& g) {
  p.row_count = g.batch * g.out_height;
  const int64_t rows = std::max(divide_up(p.row_count, kDepthwiseBlocks), divide_up(kDepthwiseBlock, g.out_width));
  p.rows_per_block = rows;
  p.step = g.dilation_h / std::gcd(g.dilation_h, g.stride_h);
  p.order = row_order(g.out_height, p.step);
  p.blocks = divide_up(p.row_count, rows);
}

DepthwisePlan make_plan(const DepthwiseForward& a) {
  const DepthwiseGeometry& g = a.geometry;
  DepthwisePlan p{};
  p.outputs = g.channels * g.multiplier;
  p.taps = g.kernel_h * g.kernel_w;
  add_forward_axes(g, p.rows, p.columns);
  if (g.channels_last) {
    cut_rows(p, g);
    p.input_rows = row_copies(p.rows, g.dilation_w, g.width, g.channels, bytes_of(a.dtype));
    p.common = (p.taps + 1) * p.outputs + (a.mean ? 2 * p.blocks * p.outputs : 0);
    p.per_thread = aligned(a.mean ? 3 * p.outputs : 0) + p.input_rows.doubles;
  } else {
    p.row_count = g.batch * g.out_height;
    p.rows_per_block = g.out_height;
    p.blocks = g.batch;
    p.input = padded_rows(p.rows, p.columns);
    p.common = a.mean ? 2 * p.blocks * p.outputs : 0;
    p.per_thread = aligned(p.taps) + (p.input.capacity + 1) * p.input.row();
  }
  return p;
}

DepthwisePlan make_plan(const DepthwiseBackward& a) {
  const DepthwiseGeometry& g = a.geometry;
  DepthwisePlan p{};
  p.outputs = g.channels * g.multiplier;
  p.taps = g.kernel_h * g.kernel_w;
  add_gradient_axes(p, g);
  add_forward_axes(g, p.forward_rows, p.forward_columns);
  const bool sums = a.grad_weight || a.grad_bias;
  if (g.channels_last) {
    cut_rows(p, g);
    p.input_rows = row_copies(p.forward_rows, g.dilation_w, g.width, g.channels, bytes_of(a.dtype));
    p.gradient_rows = row_copies(p.rows, g.dilation_w, g.out_width, p.outputs, bytes_of(a.dtype));
    p.common = p.taps * p.outputs + (sums ? (p.taps + 1) * p.blocks * p.outputs : 0);
    p.per_thread = aligned((p.taps + 1) * p.outputs) + p.input_rows.doubles + p.gradient_rows.doubles;
  } else {
    // few channels: several groups of images, for the threads to share
    p.rows_per_block = divide_up(g.batch, std::min(g.batch, divide_up(kDepthwiseBlocks, g.channels)));
    p.blocks = divide_up(g.batch, p.rows_per_block);
    p.group = std::clamp<int64_t>(kGroupElements / (g.height * g.width), 1, divide_up(g.channels, kDepthwiseBlocks));
    p.input = padded_rows(p.forward_rows, p.forward_columns);
    p.gradient = padded_rows(p.rows, p.columns);
    p.gradient.capacity = std::max(p.gradient.capacity, std::min(g.out_height, p.input.band));
    p.common = (p.taps + 1) * p.blocks * p.outputs;
    p.per_thread = aligned(8 * (p.taps + 1) * p.group * g.multiplier) + aligned(p.taps * g.multiplier) +
                   (p.input.capacity + 1) * p.input.row() + (p.gradient.capacity + 1) * p.gradient.row() +
                   (int64_t)p.columns.size() * p.gradient.band * aligned(p.columns[0].out);
  }
  return p;
}

template <class Args>
void run(const Args& args, int threads, void (*body)(const DepthwiseContext<Args>&, Team)) {
  const DepthwisePlan plan = make_plan(args);
  const DepthwiseGeometry& g = args.geometry;
  const int64_t products = g.batch * plan.outputs * g.out_height * g.out_width * plan.taps;
  threads = (int)std::clamp<int64_t>(products / kGrain, 1, std::max(threads, 1));
  const int64_t common = aligned(plan.common);
  const std::unique_ptr<double[]> memory(new double[common + threads * plan.per_thread + kAligned]);
  double* first = memory.get() + (-(reinterpret_cast<uintptr_t>(memory.get()) / sizeof(double)) & (kAligned - 1));
  const DepthwiseContext<Args> context{args, plan, first, first + common};
  run_team(threads, body, context);
}

}  // namespace

void depthwise_forward(const DepthwiseForward& args, int threads) {
#if DLKERN_HAS_AVX2
  if (active_isa() == kAvx2) return run(args, threads, &avx2::depthwise::forward_body);
#endif
  run(args, threads, &portable::depthwise::forward_body);
}

void depthwise_backward(const DepthwiseBackward& args, int threads) {
#if DLKERN_HAS_AVX2
  if (active_isa() == kAvx2) return run(args, threads, &avx2::depthwise::backward_body);
#endif
  run(args, threads, &portable::depthwise::backward_body);
}

}  // namespace dlkern::cpu
