#include "dlkern/depthwise.h"

#include <tuple>

#include "bindings/bindings.h"

namespace dlkern::bindings {
namespace {

typedef std::tuple<int64_t, int64_t> Pair;

// shape: batch, channels, height, width; output: channels, height, width.
DepthwiseGeometry geometry(bool channels_last, std::tuple<int64_t, int64_t, int64_t, int64_t> shape,
                           std::tuple<int64_t, int64_t, int64_t> output, Pair kernel, Pair stride, Pair dilation,
                           Pair padding) {
  DepthwiseGeometry g{};
  g.channels_last = channels_last;
  std::tie(g.batch, g.channels, g.height, g.width) = shape;
  std::tie(g.multiplier, g.out_height, g.out_width) = output;
  g.multiplier /= g.channels;
  std::tie(g.kernel_h, g.kernel_w) = kernel;
  std::tie(g.stride_h, g.stride_w) = stride;
  std::tie(g.dilation_h, g.dilation_w) = dilation;
  std::tie(g.pad_top, g.pad_left) = padding;
  return g;
}

void depthwise_forward(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t mean, uintptr_t var,
                       int dtype, bool channels_last, std::tuple<int64_t, int64_t, int64_t, int64_t> shape,
                       std::tuple<int64_t, int64_t, int64_t> output, Pair kernel, Pair stride, Pair dilation,
                       Pair padding, int activation, double param, int threads) {
  DepthwiseForward a{};
  a.x = at(x), a.weight = at(weight), a.bias = at(bias);
  a.y = at(y), a.mean = at(mean), a.var = at(var);
  a.dtype = DType(dtype);
  a.geometry = geometry(channels_last, shape, output, kernel, stride, dilation, padding);
  a.activation = activation, a.param = param;
  const py::gil_scoped_release release;
  cpu::depthwise_forward(a, threads);
}

void depthwise_backward(uintptr_t grad_y, uintptr_t x, uintptr_t weight, uintptr_t grad_x, uintptr_t grad_weight,
                        uintptr_t grad_bias, int dtype, bool channels_last,
                        std::tuple<int64_t, int64_t, int64_t, int64_t> shape,
                        std::tuple<int64_t, int64_t, int64_t> output, Pair kernel, Pair stride, Pair dilation,
                        Pair padding, int threads) {
  DepthwiseBackward a{};
  a.grad_y = at(grad_y), a.x = at(x), a.weight = at(weight);
  a.grad_x = at(grad_x), a.grad_weight = at(grad_weight), a.grad_bias = at(grad_bias);
  a.dtype = DType(dtype);
  a.geometry = geometry(channels_last, shape, output, kernel, stride, dilation, padding);
  const py::gil_scoped_release release;
  cpu::depthwise_backward(a, threads);
}

}  // namespace

void depthwise(py::module_& m) {
  m.def("depthwise_forward", &depthwise_forward);
  m.def("depthwise_backward", &depthwise_backward);
}

}  // namespace dlkern::bindings
