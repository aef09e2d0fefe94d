// act(depthwise convolution of x + bias), statistics of the result, and the gradients of x, weight and bias; the
// contract is kernels/reference/depthwise.py.
//
// A block keeps a window of rows in shared memory and slides it down the image: each pixel is read from global memory
// once for a strip of a tile of columns. Kernels of 3 x 3, 5 x 5 and 7 x 7 without dilation are unrolled (kSize, and
// kStride 1 or 2), all others go by kSize = 0. Statistics leave a block as moments, merged by Chan's formula; the
// gradient of the weight in shares, which are summed in their order. No atomics: results are bit for bit repeatable.
//
// Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
#include "cuda/depthwise.cuh"
#include "cuda/depthwise_weight.cuh"

namespace dlkern::cuda::depthwise {

// acc[i] += what row i of the thread reads, of all taps of a kernel of kSize x kSize.
template <class T, int kWidth, int kSize, int kStride, class A, int kCount>
__device__ __forceinline__ void convolve_unrolled(const Window<T, kWidth>& window, const Pack<T, kWidth>* weights,
                                                  int threads_c, int row, int col, A (&acc)[kCount][kWidth]) {
  int at[(kCount - 1) * kStride + kSize];
#pragma unroll
  for (int j = 0; j < (kCount - 1) * kStride + kSize; ++j)
    at[j] = window.slot(row * kStride + j) + col * kStride * window.col_stride;
#pragma unroll 1
  for (int kw = 0; kw < kSize; ++kw) {
    A w[kSize][kWidth];
#pragma unroll
    for (int kh = 0; kh < kSize; ++kh) widen_pack(weights[(kh * kSize + kw) * threads_c], w[kh]);
#pragma unroll
    for (int j = 0; j < (kCount - 1) * kStride + kSize; ++j) {
      A x[kWidth];
      widen_pack(window.own[at[j] + kw * window.col_stride], x);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int kh = j - i * kStride;
        if (kh < 0 || kh >= kSize) continue;
#pragma unroll
        for (int v = 0; v < kWidth; ++v) acc[i][v] = fma_(x[v], w[kh][v], acc[i][v]);
      }
    }
  }
}

// The same for any kernel. Where the next output row reads the next row, what taps have read stays in registers.
template <class T, int kWidth, class A, int kCount>
__device__ __forceinline__ void convolve(const Args& a, const Window<T, kWidth>& window, const Pack<T, kWidth>* weights,
                                         int row, int col, A (&acc)[kCount][kWidth]) {
  const bool slides = a.row_next == 1 && a.tile_rows % kCount == 0;
  for (int kw = 0; kw < a.kernel_w; ++kw) {
    const int at = (col * a.col_next + kw * a.col_tap) * window.col_stride;
    A x[kCount][kWidth] = {}, w[kWidth];
    if (slides) {
#pragma unroll
      for (int i = 0; i + 1 < kCount; ++i) widen_pack(window.own[window.slot(row + i) + at], x[i]);
#pragma unroll kCount
      for (int kh = 0; kh < a.kernel_h; ++kh) {
        widen_pack(window.own[window.slot(row + kCount - 1 + kh) + at], x[kCount - 1]);
        widen_pack(weights[(kh * a.kernel_w + kw) * a.threads_c], w);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
          for (int v = 0; v < kWidth; ++v) {
            acc[i][v] = fma_(x[i][v], w[v], acc[i][v]);
            if (i + 1 < kCount) x[i][v] = x[i + 1][v];
          }
        }
      }
    } else {
      for (int kh = 0; kh < a.kernel_h; ++kh) {
        widen_pack(weights[(kh * a.kernel_w + kw) * a.threads_c], w);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int r = row + i < a.tile_rows ? row + i : a.tile_rows - 1;  // a row that is none is not stored
          widen_pack(window.own[window.slot(r * a.row_next + kh) + at], x[i]);
#pragma unroll
          for (int v = 0; v < kWidth; ++v) acc[i][v] = fma_(x[i][v], w[v], acc[i][v]);
        }
      }
    }
  }
}

// What the values of a thread's channels may be near to, from the middle of the first image: where their mean is far
// larger than the deviation, moments of what is left of them keep their digits.
template <class T, int kWidth, class A>
__device__ __forceinline__ void find_pivot(const Args& a, const Place& place, const Pack<T, kWidth>* weights,
                                           A (&pivot)[kWidth]) {
  A x[kWidth] = {}, w[kWidth];
  if (place.known)
    load<T, kWidth>(a.x, place.channel / a.multiplier * a.x_channel + a.height / 2 * a.x_row + a.width / 2 * a.x_col,
                    x);
#pragma unroll
  for (int v = 0; v < kWidth; ++v) pivot[v] = A(0);
  for (int tap = 0; tap < a.kernel_h * a.kernel_w; ++tap) {
    widen_pack(weights[tap * a.threads_c], w);
#pragma unroll
    for (int v = 0; v < kWidth; ++v) pivot[v] = fma_(x[v], w[v], pivot[v]);
  }
  widen_pack(weights[a.kernel_h * a.kernel_w * a.threads_c], w);
#pragma unroll
  for (int v = 0; v < kWidth; ++v) {
    pivot[v] += w[v];
    if (!(pivot[v] - pivot[v] == A(0))) pivot[v] = A(0);  // infinity or NaN
  }
}

// y; with kStatistics also partial, of what is left of y after the pivot, which `mean` is given.
template <class T, int kWidth, int kSize, int kStride, bool kStatistics>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<kWidth, kStatistics && kSize != 3>) forward(const Args a) {
  using A = Wide<T>;
  using P = Pack<T, kWidth>;
  constexpr int kCount = kRows<kStride>;
  DLKERN_DYNAMIC_SHARED(bytes);
  const Place place(a, kWidth);
  P* const shared = reinterpret_cast<P*>(bytes);
  const P* const weights = shared + place.pack;
  load_weights<T, kWidth>(a, place, shared);
  const int taps = a.kernel_h * a.kernel_w;
  Window<T, kWidth> window(a, shared + (taps + 1) * a.threads_c, place, a.ring, a.cols);
  const int col = place.lane % a.columns, row = place.lane / a.columns * kCount;
  const int advance = a.tile_rows * a.row_next;
  const A param = A(a.param);
  Moments<A, kWidth> moments;
  A pivot[kWidth];
  if constexpr (kStatistics) {
    __syncthreads();
    find_pivot(a, place, weights, pivot);
  }
  const Index begin = blockIdx.y * a.share, end = begin + a.share < a.items ? begin + a.share : a.items;
  for (Index number = begin; number < end; ++number) {
    const Item item(a, number);
    enter(a, place, item, window);
    T* const y = static_cast<T*>(a.y) + item.image * a.y_image + place.channel * a.y_channel +
                 (item.first_column + col * a.col_gap) * a.y_col;
    for (int first = 0; first < item.rows; first += a.tile_rows) {
      __syncthreads();  // nobody reads the rows that go
      if (first == 0)
        window.fill(place, 0, a.ring, a.ring);
      else
        window.move(place, advance, a.ring);
      __syncthreads();
      A acc[kCount][kWidth];
#pragma unroll
      for (int i = 0; i < kCount; ++i) widen_pack(weights[taps * a.threads_c], acc[i]);
      if constexpr (kSize != 0)
        convolve_unrolled<T, kWidth, kSize, kStride>(window, weights, a.threads_c, row, col, acc);
      else
        convolve(a, window, weights, row, col, acc);
      const int in_tile = a.tile_rows - row, in_strip = item.rows - first - row;
      const int there = place.known && col < item.columns ? (in_tile < in_strip ? in_tile : in_strip) : 0;
      if constexpr (!kStatistics) {
        if (a.activation != kIdentity) {
#pragma unroll 1
          for (int i = 0; i < kCount; ++i) {  // the rows take turns in acc[0]: the code is there once
            activate(a.activation, acc[0], param);
#pragma unroll
            for (int v = 0; v < kWidth; ++v) {
              const A done = acc[0][v];
#pragma unroll
              for (int k = 0; k + 1 < kCount; ++k) acc[k][v] = acc[k + 1][v];
              acc[kCount - 1][v] = done;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i >= there) continue;
        P pack;
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          pack.v[v] = narrow<T>(acc[i][v]);
          acc[i][v] = widen(pack.v[v]);
        }
        *reinterpret_cast<P*>(y + (item.first_row + (first + row + i) * a.row_gap) * a.y_row) = pack;
      }
      if constexpr (kStatistics) {
        if (there >= kCount) {
          A values[kCount * kWidth];
#pragma unroll
          for (int i = 0; i < kCount * kWidth; ++i) values[i] = acc[i / kWidth][i % kWidth] - pivot[i % kWidth];
          moments.template add<kCount, kWidth>(values);
        } else {
#pragma unroll
          for (int i = 0; i + 1 < kCount; ++i) {
            if (i >= there) continue;
#pragma unroll
            for (int v = 0; v < kWidth; ++v) acc[i][v] -= pivot[v];
            moments.template add<1, kWidth>(acc[i]);
          }
        }
      }
    }
  }
  if constexpr (kStatistics) {
    __syncthreads();
    reduce(moments, reinterpret_cast<A*>(bytes), place.lane * a.threads_c + place.pack, a.threads_c);
    if (place.lane == 0 && place.known) {
      const Index step = Index(a.splits) * a.channels;
      A* const out = static_cast<A*>(a.partial) + Index(blockIdx.y) * a.channels + place.channel;
#pragma unroll
      for (int v = 0; v < kWidth; ++v) {
        out[v] = moments.count;
        out[step + v] = moments.mean[v];
        out[2 * step + v] = moments.m2[v];
        if (blockIdx.y == 0) static_cast<A*>(a.mean)[place.channel + v] = pivot[v];
      }
    }
  }
}

// mean and var, of partial [3, splits, channels] and the pivot in mean.
template <class A>
__global__ void __launch_bounds__(kMaxThreads) merge_statistics(const Args a) {
  const int lane = int(threadIdx.x) % a.threads_c, first = int(threadIdx.x) / a.threads_c;
  const Index channel = Index(blockIdx.x) * a.threads_c + lane, step = Index(a.splits) * a.channels;
  Moments<A, 1> all;
  for (int s = first; s < a.splits && channel < a.channels; s += int(blockDim.x) / a.threads_c) {
    const A* const partial = static_cast<const A*>(a.partial) + s * Index(a.channels) + channel;
    if (!(partial[0] > A(0))) continue;
    const A total = all.count + partial[0];
    all.merge(0, partial[step], partial[2 * step], partial[0] / total);
    all.count = total;
  }
  reduce<A>(all, a.threads_c);
  if (first != 0 || channel >= a.channels) return;
  static_cast<A*>(a.mean)[channel] += all.mean[0];
  static_cast<A*>(a.var)[channel] = all.m2[0] / all.count;
}

// The input's gradient at stride 2: x is grad_y, y is grad_x. A thread has two columns of grad_x and two rows, of each
// parity one, for each of kCount rows of grad_y; a parity has its own taps.
template <class T, int kWidth, int kSize>
__global__ void __launch_bounds__(kMaxThreads, 2) input_gradient_unrolled(const Args a) {
  using A = Wide<T>;
  using P = Pack<T, kWidth>;
  constexpr int kCount = kRows<2>, kTaps = (kSize + 1) / 2;
  DLKERN_DYNAMIC_SHARED(bytes);
  const Place place(a, kWidth);
  P* const shared = reinterpret_cast<P*>(bytes);
  const P* const weights = shared + place.pack;
  load_weights<T, kWidth>(a, place, shared);
  Window<T, kWidth> window(a, shared + (kSize * kSize + 1) * a.threads_c, place, a.ring, a.cols);
  const int col = place.lane % a.columns, row = place.lane / a.columns * kCount;
  const Index begin = blockIdx.y * a.share, end = begin + a.share < a.items ? begin + a.share : a.items;
  for (Index number = begin; number < end; ++number) {
    const Item item(a, number);
    enter(a, place, item, window);
    T* const y = static_cast<T*>(a.y) + item.image * a.y_image + place.channel * a.y_channel;
    const int left = a.first_col + 2 * (item.first_column + col);
    for (int first = 0; first < item.rows; first += a.tile_rows) {
      __syncthreads();
      if (first == 0)
        window.fill(place, 0, a.ring, a.ring);
      else
        window.move(place, a.tile_rows, a.ring);
      __syncthreads();
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        A acc[kCount][2][kWidth] = {};
#pragma unroll 1
        for (int m = 0; 2 * m + p < kSize; ++m) {
          int at[kCount];
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            at[i] = window.slot(row + i + kTaps - 1 - m) + (col + kTaps - 1) * window.col_stride;
#pragma unroll
          for (int n = 0; n < kTaps; ++n) {
            A x[kCount][kWidth];
#pragma unroll
            for (int i = 0; i < kCount; ++i) widen_pack(window.own[at[i] - n * window.col_stride], x[i]);
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              if (2 * n + q >= kSize) continue;
              A w[kWidth];
              widen_pack(weights[((2 * m + p) * kSize + 2 * n + q) * a.threads_c], w);
#pragma unroll
              for (int i = 0; i < kCount; ++i) {
#pragma unroll
                for (int v = 0; v < kWidth; ++v) acc[i][q][v] = fma_(x[i][v], w[v], acc[i][q][v]);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int h = a.first_row + 2 * (item.first_row + first + row + i) + p;
          if (!place.known || col >= item.columns || first + row + i >= item.rows || h < 0 || h >= a.out_height)
            continue;
#pragma unroll
          for (int q = 0; q < 2; ++q)
            if (left + q >= 0 && left + q < a.out_width)
              store<T, kWidth>(y, h * a.y_row + (left + q) * a.y_col, acc[i][q]);
        }
      }
    }
  }
}

// The input's gradient of any convolution: x is grad_y, y is grad_x; one thread for kWidth channels of a pixel.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, 2) input_gradient(const Args a) {
  using A = Wide<T>;
  const Index channels = a.channels / a.multiplier / kWidth, taps = a.kernel_h * a.kernel_w;
  const Index pixels = Index(a.out_height) * a.out_width;
  for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < a.items; i += Index(gridDim.x) * blockDim.x) {
    const Index image = i / (channels * pixels), rest = i % (channels * pixels);
    const Index channel = (a.channels_last ? rest % channels : rest / pixels) * kWidth;
    const Index pixel = a.channels_last ? rest / channels : rest % pixels;
    const int h = int(pixel / a.out_width), w = int(pixel % a.out_width);
    A sum[kWidth] = {};
    for (int kh = 0; kh < a.kernel_h; ++kh) {
      const int up = h + a.pad_top - kh * a.dilation_h, oh = up / a.stride_h;
      if (up < 0) break;
      if (oh >= a.height || oh * a.stride_h != up) continue;
      for (int kw = 0; kw < a.kernel_w; ++kw) {
        const int along = w + a.pad_left - kw * a.dilation_w, ow = along / a.stride_w;
        if (along < 0) break;
        if (ow >= a.width || ow * a.stride_w != along) continue;
        for (int m = 0; m < a.multiplier; ++m) {
          A grad[kWidth];
          load<T, kWidth>(
              a.x, image * a.x_image + (channel * a.multiplier + m) * a.x_channel + oh * a.x_row + ow * a.x_col, grad);
#pragma unroll
          for (int v = 0; v < kWidth; ++v) {
            const Index at = ((channel + v) * a.multiplier + m) * taps + kh * a.kernel_w + kw;
            sum[v] = fma_(grad[v], A(widen(static_cast<const T*>(a.weight)[at])), sum[v]);
          }
        }
      }
    }
    store<T, kWidth>(a.y, image * a.y_image + channel * a.y_channel + h * a.y_row + w * a.y_col, sum);
  }
}

}  // namespace dlkern::cuda::depthwise

// ------------------------------------------------------------------------------------------------- host
#ifndef __CUDACC_RTC__

namespace {

using namespace dlkern::cuda;

struct Kernel {
  const char* name;
  void (*function)(DepthwiseArgs);
};

// kernels/cuda/depthwise_plan.py asks for a kernel by this name, and so does NVRTC.
#define DLKERN_NAME(...) #__VA_ARGS__
#define DLKERN_KERNEL(...) {DLKERN_NAME(dlkern::cuda::depthwise::__VA_ARGS__), dlkern::cuda::depthwise::__VA_ARGS__},
#define DLKERN_CONVOLUTION(type, width, size, stride)      \
  DLKERN_KERNEL(forward<type, width, size, stride, false>) \
  DLKERN_KERNEL(forward<type, width, size, stride, true>)
#define DLKERN_UNROLLED(type, width, size)                  \
  DLKERN_CONVOLUTION(type, width, size, 1)                  \
  DLKERN_CONVOLUTION(type, width, size, 2)                  \
  DLKERN_KERNEL(input_gradient_unrolled<type, width, size>) \
  DLKERN_KERNEL(weight_gradient<type, width, size, 1>)      \
  DLKERN_KERNEL(weight_gradient<type, width, size, 2>)
#define DLKERN_ANY(type, width)              \
  DLKERN_CONVOLUTION(type, width, 0, 0)      \
  DLKERN_KERNEL(input_gradient<type, width>) \
  DLKERN_KERNEL(weight_gradient<type, width, 4, 0>)
#define DLKERN_TYPE(type, width) DLKERN_ANY(type, width) DLKERN_ANY(type, 1)
#define DLKERN_WINDOWS(type, width) \
  DLKERN_UNROLLED(type, width, 3) DLKERN_UNROLLED(type, width, 5) DLKERN_UNROLLED(type, width, 7)
#define DLKERN_MERGES(type) DLKERN_KERNEL(merge_statistics<type>) DLKERN_KERNEL(merge_weight_gradient<type>)

const Kernel kKernels[] = {DLKERN_TYPE(float, 4) DLKERN_TYPE(double, 2) DLKERN_TYPE(__half, 8)
                               DLKERN_TYPE(__nv_bfloat16, 8) DLKERN_WINDOWS(float, 4) DLKERN_WINDOWS(__half, 8)
                                   DLKERN_WINDOWS(__nv_bfloat16, 8) DLKERN_MERGES(float) DLKERN_MERGES(double)};

}  // namespace

const char* dlkern_cuda_depthwise_kernel(int index) {
  return index >= 0 && index < int(sizeof kKernels / sizeof *kKernels) ? kKernels[index].name : nullptr;
}

int dlkern_cuda_depthwise_launch(int index, unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared_bytes,
                                 int device, void* stream, const void* args) {
  const auto& argument = *static_cast<const DepthwiseArgs*>(args);
  return DLKERN_LAUNCH(kKernels[index].function, grid_x, grid_y, threads, shared_bytes, device, stream, argument);
}

#endif
