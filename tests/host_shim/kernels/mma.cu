// D = A B + C of one 16 x 8 x 16 tile by one warp.
#include "cuda/mma_tile.h"

// a (16, 16), b (16, 8), c and d (16, 8), row-major.
template <typename T>
__global__ void mma(const T* a, const T* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](T low, T high) {
    const T both[2] = {low, high};
    return *reinterpret_cast<const unsigned*>(both);
  };
  const auto left = [&](int row, int k) { return pair(a[16 * row + k], a[16 * row + k + 1]); };
  const auto right = [&](int k) { return pair(b[8 * k + g], b[8 * (k + 1) + g]); };
  const unsigned fragment_a[4] = {left(g, 2 * t), left(g + 8, 2 * t), left(g, 2 * t + 8), left(g + 8, 2 * t + 8)};
  const unsigned fragment_b[2] = {right(2 * t), right(2 * t + 8)};
  float sums[4] = {c[8 * g + 2 * t], c[8 * g + 2 * t + 1], c[8 * (g + 8) + 2 * t], c[8 * (g + 8) + 2 * t + 1]};
  dlkern::mma_tile<T>(sums, fragment_a, fragment_b, sums);
  for (int i = 0; i < 4; ++i) d[8 * (g + i / 2 * 8) + 2 * t + i % 2] = sums[i];
}
