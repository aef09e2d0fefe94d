// The one argument of every kernel of depthwise.cu, and the entries of its host part. kernels/cuda/depthwise_plan.py
// packs the argument; the fields there have the same order.
#pragma once

namespace dlkern::cuda {

// A convolution reads `x` and writes `y`: forward its x and y; the input's gradient grad_y and grad_x, in that order.
// Both are dense and in one memory format, planes or channels last; strides are in elements. Padding is zeros. A null
// pointer stands for "not given" or "not wanted".
//
// A block works on tiles of the output, each `columns` columns wide, and walks down a strip of `strip_rows` rows,
// `tile_rows` at a time. The rows of a strip are `row_gap` apart, and the columns of a tile `col_gap`, so that with a
// dilation the taps of neighbours meet: rows of x `row_step` apart, of which output row r and tap kh read number
// r * row_next + kh, and columns col_step apart, of which output column c and tap kw read c * col_next + kw * col_tap.
// `ring` of those rows, `cols` wide, are in shared memory.
struct DepthwiseArgs {
  void *x, *weight, *bias, *y, *grad_y;
  void* partial;     // [3, splits, channels]: count, mean, centred sum of squares; [splits, taps + 1, channels]
  void *mean, *var;  // (channels,), of the wide type: of what is stored in y
  void *grad_weight, *grad_bias;
  long long x_image, x_channel, x_row, x_col;  // strides of x
  long long y_image, y_channel, y_row, y_col;  // strides of y, and of grad_y where that is read beside x
  long long items, share;                      // strips of all tiles and images; those of one block in y of the grid
  double param;                                // the activation's
  int batch, channels, multiplier;             // channels of y; channel c reads channel c / multiplier of x
  int height, width, out_height, out_width;    // of x and y
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int lattice_height, lattice_width;  // rows and columns that items cover: those of y, but for the gradient at stride 2
  int row_phases, row_gap, row_step, row_next, segments, strip_rows, tile_rows, ring;
  int col_phases, col_gap, col_step, col_next, col_tap, tiles, columns, cols;
  int first_row, first_col;  // gradient of the input at stride 2: where in y tap 0 leads to from number 0
  int threads_c;             // threads of a block side by side along channels
  int groups;                // gradient of the weight: threads that share the columns of a tap
  int channels_last, flip, activation, splits, data_kind;
};

static_assert(sizeof(DepthwiseArgs) == 336, "kernels/cuda/depthwise_plan.py packs 336 bytes");

}  // namespace dlkern::cuda

#ifndef __CUDACC_RTC__
extern "C" {
// The name of kernel `index` as NVRTC takes it ("dlkern::cuda::depthwise::forward<float, 4, 3, 1, false>"), or null.
const char* dlkern_cuda_depthwise_kernel(int index);
// Starts kernel `index` on a stream of a device. `args` is a DepthwiseArgs. 0, or CUDA's error code.
int dlkern_cuda_depthwise_launch(int index, unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes,
                                 int device, void* stream, const void* args);
}
#endif
