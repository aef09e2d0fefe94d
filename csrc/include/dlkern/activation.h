// The activations that kernels fuse. The codes are those of kernels/activation.py (CODES).
#pragma once

namespace dlkern {

enum Activation : int {
  kIdentity = 0,
  kRelu = 1,
  kRelu6 = 2,
  kLeakyRelu = 3,  // param: negative_slope
  kSilu = 4,
  kGelu = 5,
  kGeluTanh = 6,
  kHardswish = 7,
  kHardsigmoid = 8,
  kSigmoid = 9,
  kTanh = 10,
  kElu = 11,  // param: alpha
  kActivations = 12,
};

}  // namespace dlkern
