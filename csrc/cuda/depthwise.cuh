// How the blocks of depthwise.cu go through images, and the window of rows that they keep in shared memory.
#pragma once

#include "cuda/depthwise.h"
#include "cuda/reduction.cuh"

namespace dlkern::cuda::depthwise {

using Args = DepthwiseArgs;

constexpr int kMaxThreads = 256;

// Blocks that a multiprocessor must be able to hold, which bounds the registers of a thread to 128, or 255 for the
// kernels that hold most. (Left alone, the compiler spills a few for one block more.)
template <int kWidth, bool kMany>
constexpr int kBlocks = kWidth == 8 && kMany ? 1 : 2;

// Rows that a thread works on at a time, each with what it has of a column in registers.
template <int kStride>
constexpr int kRows = kStride == 2 ? 2 : 4;

// The channels of a thread, `width` side by side, and its number among the block's threads of the same channels: in
// channels last neighbouring threads have neighbouring channels, in planes neighbouring columns.
struct Place {
  int pack, lane, lanes;
  Index channel;
  bool known;  // whether there are such channels

  __device__ __forceinline__ Place(const Args& a, int width) {
    const int thread = int(threadIdx.x);
    lanes = int(blockDim.x) / a.threads_c;
    pack = a.channels_last ? thread % a.threads_c : thread / lanes;
    lane = a.channels_last ? thread / a.threads_c : thread % lanes;
    channel = (Index(blockIdx.x) * a.threads_c + pack) * width;
    known = channel < a.channels;
  }
};

// One tile of columns of one strip of one image.
struct Item {
  Index image;
  int first_row, rows;        // rows of the strip, row_gap apart
  int first_column, columns;  // columns of the tile, col_gap apart

  __device__ __forceinline__ Item(const Args& a, Index number) {
    const int tiles = a.tiles * a.col_phases, strips = a.segments * a.row_phases;
    const int tile = int(number % tiles), strip = int(number / tiles % strips);
    image = number / tiles / strips;
    const int begin = strip / a.row_phases * a.strip_rows;
    first_row = strip % a.row_phases + begin * a.row_gap;
    rows = count(a.lattice_height - first_row, a.row_gap, a.strip_rows);
    first_column = tile % a.col_phases + tile / a.col_phases * a.columns * a.col_gap;
    columns = count(a.lattice_width - first_column, a.col_gap, a.columns);
  }

 private:
  static __device__ __forceinline__ int count(int left, int gap, int most) {
    const int there = left > 0 ? (left + gap - 1) / gap : 0;
    return there < most ? there : most;
  }
};

// Rows of an image in shared memory, each `cols` packs; row number j, counted from the one at `top`, is in slot
// (top + j) % ring.
template <class T, int kWidth>
struct Window {
  using P = Pack<T, kWidth>;
  static constexpr int kAtOnce = 4;  // loads of a thread in flight

  P* own;  // this thread's channels
  int ring, cols, row_stride, col_stride, top;
  const T* image;  // this thread's channels
  Index image_row, image_col;
  int base_row, row_step, base_col, col_step, height, width;

  // Where this thread finds the packs of `ring` x `cols`; the block's memory for them is ring * cols * threads_c packs.
  __device__ __forceinline__ Window(const Args& a, P* shared, const Place& place, int ring, int cols)
      : ring(ring), cols(cols), top(0) {
    col_stride = a.channels_last ? a.threads_c : 1;
    row_stride = cols * col_stride;
    own = shared + (a.channels_last ? place.pack : place.pack * ring * cols);
  }

  __device__ __forceinline__ int slot(int j) const {
    const int s = top + j;
    return (s < ring ? s : s - ring) * row_stride;
  }

  // Rows from number `first` on, `count` of them; those from number `limit` on, and all outside of the image, are zero.
  __device__ __forceinline__ void fill(const Place& place, int first, int count, int limit) {
    int row = place.lane / cols, col = place.lane % cols;
    const int rows_on = place.lanes / cols, cols_on = place.lanes % cols;
    while (row < count) {
      P packs[kAtOnce];
      int at[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        packs[i] = P{};
        at[i] = -1;
        if (row < count) {
          const int j = first + row, h = base_row + j * row_step, w = base_col + col * col_step;
          at[i] = slot(j) + col * col_stride;
          if (place.known && j < limit && h >= 0 && h < height && w >= 0 && w < width)
            packs[i] = *reinterpret_cast<const P*>(image + (h * image_row + w * image_col));
        }
        row += rows_on;
        col += cols_on;
        if (col >= cols) {
          col -= cols;
          ++row;
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (at[i] >= 0) own[at[i]] = packs[i];
    }
  }

  // The next `advance` rows down: what is new comes in, in the slots of what has left.
  __device__ __forceinline__ void move(const Place& place, int advance, int limit) {
    base_row += advance * row_step;
    top = (top + advance) % ring;
    const int count = advance < ring ? advance : ring;
    fill(place, ring - count, count, limit);
  }
};

template <class T, int kWidth, class A>
__device__ __forceinline__ void widen_pack(const Pack<T, kWidth>& pack, A (&out)[kWidth]) {
#pragma unroll
  for (int v = 0; v < kWidth; ++v) out[v] = widen(pack.v[v]);
}

// The part of x that an item reads.
template <class T, int kWidth>
__device__ __forceinline__ void enter(const Args& a, const Place& place, const Item& item, Window<T, kWidth>& window) {
  window.image = static_cast<const T*>(a.x) + item.image * a.x_image + place.channel / a.multiplier * a.x_channel;
  window.image_row = a.x_row, window.image_col = a.x_col;
  window.height = a.height, window.width = a.width;
  window.base_row = item.first_row * a.stride_h - a.pad_top, window.row_step = a.row_step;
  window.base_col = item.first_column * a.stride_w - a.pad_left, window.col_step = a.col_step;
}

// The block's weights of its channels [taps + 1, threads_c], the last one the bias or zero.
template <class T, int kWidth>
__device__ __forceinline__ void load_weights(const Args& a, const Place& place, Pack<T, kWidth>* weights) {
  const int taps = a.kernel_h * a.kernel_w;
  for (int tap = place.lane; tap <= taps; tap += place.lanes) {
    Pack<T, kWidth> pack{};
    if (place.known && (tap < taps || a.bias)) {
      const T* const from = static_cast<const T*>(tap < taps ? a.weight : a.bias);
      const int step = tap < taps ? taps : 1, first = tap == taps ? 0 : a.flip ? taps - 1 - tap : tap;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) pack.v[v] = from[(place.channel + v) * step + first];
    }
    weights[tap * a.threads_c + place.pack] = pack;
  }
}

}  // namespace dlkern::cuda::depthwise
