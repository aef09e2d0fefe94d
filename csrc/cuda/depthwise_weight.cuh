// The gradients of weight and bias of a depthwise convolution: sums in shares, and these in their order.
#pragma once

#include "cuda/depthwise.cuh"

namespace dlkern::cuda::depthwise {

// partial [splits, taps + 1, channels]: a share's sums of grad_y * (the pixel a tap reads), the last one of grad_y.
// A thread has kTaps taps of one column of the kernel, and every groups-th column of a tile.
template <class T, int kWidth, int kTaps, int kStride>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<kWidth, kTaps == 7>) weight_gradient(const Args a) {
  using A = Wide<T>;
  using P = Pack<T, kWidth>;
  constexpr int kCount = kRows<kStride>;
  DLKERN_DYNAMIC_SHARED(bytes);
  const Place place(a, kWidth);
  P* const shared = reinterpret_cast<P*>(bytes);
  Window<T, kWidth> gradients(a, shared, place, a.tile_rows, a.columns);
  Window<T, kWidth> window(a, shared + a.tile_rows * a.columns * a.threads_c, place, a.ring, a.cols);
  const int group = place.lane % a.groups, tap = place.lane / a.groups;
  const int kw = tap % a.kernel_w, first_kh = tap / a.kernel_w * kTaps;
  A sums[kTaps][kWidth] = {}, total[kWidth] = {};
  const Index begin = blockIdx.y * a.share, end = begin + a.share < a.items ? begin + a.share : a.items;
  for (Index number = begin; number < end; ++number) {
    const Item item(a, number);
    enter(a, place, item, window);
    gradients.image = static_cast<const T*>(a.grad_y) + item.image * a.y_image + place.channel * a.y_channel;
    gradients.image_row = a.y_row, gradients.image_col = a.y_col;
    gradients.height = a.out_height, gradients.width = a.out_width;
    gradients.base_row = item.first_row, gradients.row_step = a.row_gap;
    gradients.base_col = item.first_column, gradients.col_step = a.col_gap;
    for (int first = 0; first < item.rows; first += a.tile_rows) {
      const int there = item.rows - first < a.tile_rows ? item.rows - first : a.tile_rows;
      const int limit = (there - 1) * a.row_next + a.kernel_h;  // what no tap reads may be anything
      __syncthreads();
      if (first == 0) {
        gradients.fill(place, 0, there, there);
        window.fill(place, 0, a.ring, limit);
      } else {
        gradients.move(place, a.tile_rows, there);
        window.move(place, a.tile_rows * a.row_next, limit);
      }
      __syncthreads();
      for (int c = group; c < item.columns; c += a.groups) {
        A grad[kCount][kWidth] = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (i >= there) continue;
          widen_pack(gradients.own[gradients.slot(i) + c * gradients.col_stride], grad[i]);
          if (tap != 0) continue;
#pragma unroll
          for (int v = 0; v < kWidth; ++v) total[v] += grad[i][v];
        }
        const int at = (c * a.col_next + kw * a.col_tap) * window.col_stride;
        A x[kWidth];
        if constexpr (kStride != 0) {
#pragma unroll
          for (int j = 0; j < (kCount - 1) * kStride + kTaps; ++j) {
            widen_pack(window.own[window.slot(j) + at], x);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              const int t = j - i * kStride;
              if (t < 0 || t >= kTaps) continue;
#pragma unroll
              for (int v = 0; v < kWidth; ++v) sums[t][v] = i < there ? fma_(grad[i][v], x[v], sums[t][v]) : sums[t][v];
            }
          }
        } else {
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            if (first_kh + t >= a.kernel_h) continue;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              if (i >= there) continue;
              widen_pack(window.own[window.slot(i * a.row_next + first_kh + t) + at], x);
#pragma unroll
              for (int v = 0; v < kWidth; ++v) sums[t][v] = fma_(grad[i][v], x[v], sums[t][v]);
            }
          }
        }
      }
    }
  }
  // the groups of each tap, in their order
  const int taps = a.kernel_h * a.kernel_w, step = a.threads_c * kWidth;
  A* const found = reinterpret_cast<A*>(bytes) + place.pack * kWidth;
  A* const out = static_cast<A*>(a.partial) + Index(blockIdx.y) * (taps + 1) * a.channels + place.channel;
#pragma unroll
  for (int t = 0; t <= kTaps; ++t) {
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kWidth; ++v) found[place.lane * step + v] = t < kTaps ? sums[t < kTaps ? t : 0][v] : total[v];
    __syncthreads();
    const bool wanted = t < kTaps ? first_kh + t < a.kernel_h : tap == 0;
    if (group != 0 || !wanted || !place.known) continue;
    const int row = t < kTaps ? (first_kh + t) * a.kernel_w + kw : taps;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
      A sum = 0;
      for (int g = 0; g < a.groups; ++g) sum += found[(place.lane + g) * step + v];
      out[Index(row) * a.channels + v] = sum;
    }
  }
}

// The gradients of weight and bias from partial.
template <class A>
__global__ void __launch_bounds__(kMaxThreads) merge_weight_gradient(const Args a) {
  const int lane = int(threadIdx.x) % a.threads_c, first = int(threadIdx.x) / a.threads_c;
  const int taps = a.kernel_h * a.kernel_w;
  const Index entries = Index(taps + 1) * a.channels, entry = Index(blockIdx.x) * a.threads_c + lane;
  Sums<A, 1> all;
  for (int s = first; s < a.splits && entry < entries; s += int(blockDim.x) / a.threads_c)
    all.values[0] += static_cast<const A*>(a.partial)[s * entries + entry];
  reduce<A>(all, a.threads_c);
  if (first != 0 || entry >= entries) return;
  const Index tap = entry / a.channels, channel = entry % a.channels;
  if (tap < taps && a.grad_weight) store_any(a.grad_weight, channel * taps + tap, a.data_kind, all.values[0]);
  if (tap == taps && a.grad_bias) store_any(a.grad_bias, channel, a.data_kind, all.values[0]);
}

}  // namespace dlkern::cuda::depthwise
