// Elementary functions and the activations on vectors; float32 within about 2 units in the last place, float64 through
// the C library. Included once per instruction set (foreach_isa.h).

#define DLKERN_LANEWISE(name, call)                \
  DLKERN_NOINLINE static vd name(vd v) {           \
    for (int i = 0; i < 4; ++i) v[i] = call(v[i]); \
    return v;                                      \
  }
DLKERN_LANEWISE(exp, std::exp)
DLKERN_LANEWISE(expm1, std::expm1)
DLKERN_LANEWISE(tanh, std::tanh)
#undef DLKERN_LANEWISE

// x = n ln 2 + r with |r| <= ln 2 / 2; NaN stays in r. n and 2^n come split in two, so that neither overflows.
struct Reduced {
  vf r, scale, scale2;
};
DLKERN_INLINE Reduced reduce(vf x) {
  x = select(x > 89.0f, vf{} + 89.0f, x);     // exp overflows to infinity
  x = select(x < -104.0f, vf{} - 104.0f, x);  // and underflows to 0
  const vf magic = vf{} + 12582912.0f;        // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = fma(x, vf{} + 1.44269504088896341f, magic);
  const vf n = shifted - magic;
  vf r = fma(n, vf{} - 0.693145751953125f, x);  // ln 2 in two parts, the first with few bits: exact products
  r = fma(n, vf{} - 1.42860682030941723e-6f, r);
  const vi exponent = (vi)shifted - 0x4b400000;
  const vi half = exponent >> 1;
  return {r, (vf)((half + 127) << 23), (vf)((exponent - half + 127) << 23)};
}

// (exp(r) - 1 - r) / r^2 by its Taylor series: the first term left out is below 2^-27 of exp(r).
DLKERN_INLINE vf exp_series(vf r) {
  vf p = vf{} + (float)(1.0 / 5040);
  p = fma(p, r, vf{} + (float)(1.0 / 720));
  p = fma(p, r, vf{} + (float)(1.0 / 120));
  p = fma(p, r, vf{} + (float)(1.0 / 24));
  p = fma(p, r, vf{} + (float)(1.0 / 6));
  return fma(p, r, vf{} + 0.5f);
}

DLKERN_INLINE vf exp(vf x) {
  const Reduced e = reduce(x);
  const vf p = fma(exp_series(e.r), e.r * e.r, e.r) + 1.0f;
  return p * e.scale * e.scale2;
}

DLKERN_INLINE vf expm1(vf x) {
  const Reduced e = reduce(x);
  const vf p = fma(exp_series(e.r), e.r * e.r, e.r);
  // the two factors are applied apart: their product overflows where x is near 89
  const vf result = (fma(p, e.scale, e.scale) * e.scale2) - 1.0f;
  const vf scale = e.scale * e.scale2;
  return select((x > -30.0f) & (x < 30.0f), fma(p, scale, scale - 1.0f), result);
}

DLKERN_INLINE vf tanh(vf x) {
  const vi sign = (vi)x & (vi)((vu{} + 0x80000000u));
  const vf magnitude = (vf)((vi)x & 0x7fffffff);
  const vf e = expm1(2.0f * select(magnitude > 20.0f, vf{} + 20.0f, magnitude));
  return (vf)((vi)(e / (e + 2.0f)) | sign);
}

template <class V>
DLKERN_INLINE V sigmoid(V z) {
  return 1 / (1 + exp(-z));
}

struct Normal {
  vf cdf, pdf;
};
// The standard normal distribution. Below 0 the cdf is pdf(z) * t * P(t) with t = 1 / (1 + 0.35 |z|); P was fitted to
// the Mills ratio on |z| <= 15 (relative error 3.2e-8).
DLKERN_INLINE Normal normal(vf z) {
  const vf a = (vf)((vi)z & 0x7fffffff);
  const vf e = exp(-0.5f * z * z);
  const vf t = 1.0f / fma(a, vf{} + 0.35f, vf{} + 1.0f);
  vf p = vf{} - 0.029163998192333555f;
  p = fma(p, t, vf{} + 0.1440611530793207f);
  p = fma(p, t, vf{} - 0.25590258398678956f);
  p = fma(p, t, vf{} + 0.15939372828158013f);
  p = fma(p, t, vf{} - 0.023264391374027887f);
  p = fma(p, t, vf{} + 0.10557503386482012f);
  p = fma(p, t, vf{} + 0.11981544051018088f);
  p = fma(p, t, vf{} + 0.13986434385377344f);
  p = fma(p, t, vf{} + 0.13962125795690428f);
  const vf tail = e * t * p;
  return {select(z > 0.0f, 1.0f - tail, tail), e * 0.398942280401432678f};
}
struct NormalDouble {
  vd cdf, pdf;
};
DLKERN_NOINLINE static NormalDouble normal(vd z) {
  NormalDouble result;
  for (int i = 0; i < 4; ++i) {
    result.cdf[i] = 0.5 * std::erfc(-z[i] * 0.70710678118654752440);
    result.pdf[i] = std::exp(-0.5 * z[i] * z[i]) * 0.39894228040143267794;
  }
  return result;
}

constexpr double kGeluScale = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double kGeluCubic = 0.044715;

template <class V>
DLKERN_INLINE V gelu_tanh_inner(V z) {
  return tanh(splat<V>(kGeluScale) * fma(splat<V>(kGeluCubic) * z * z, z, z));
}

// act(z)
template <class V>
DLKERN_NOINLINE V activate(int code, V z, double param) {
  const V zero{};
  switch (code) {
    case kRelu:
      return select(z <= zero, zero, z);  // a NaN stays
    case kRelu6: {
      const V low = select(z <= zero, zero, z);
      return select(low > 6, zero + 6, low);
    }
    case kLeakyRelu:
      return select(z > zero, z, z * splat<V>(param));
    case kSilu:
      return z / (1 + exp(-z));
    case kGelu:
      return z * normal(z).cdf;
    case kGeluTanh:
      return splat<V>(0.5) * z * (1 + gelu_tanh_inner(z));
    case kHardswish: {
      const V ramp = select(z < -3, zero, select(z > 3, zero + 6, z + 3));
      return z * ramp / 6;
    }
    case kHardsigmoid:
      return select(z < -3, zero, select(z > 3, zero + 6, z + 3)) / 6;
    case kSigmoid:
      return sigmoid(z);
    case kTanh:
      return tanh(z);
    case kElu:
      return select(z > zero, z, expm1(z) * splat<V>(param));
    default:
      return z;
  }
}

// g * act'(z), with PyTorch's values at the kinks and at NaN
template <class V>
DLKERN_NOINLINE V activation_gradient(int code, V g, V z, double param) {
  const V zero{};
  switch (code) {
    case kRelu:
      return select(z <= zero, zero, g);
    case kRelu6:
      return select((z <= zero) | (z >= 6), zero, g);
    case kLeakyRelu:
      return select(z > zero, g, g * splat<V>(param));
    case kSilu: {
      const V s = sigmoid(z);
      return g * s * fma(z, 1 - s, zero + 1);
    }
    case kGelu: {
      const auto n = normal(z);
      return g * fma(z, n.pdf, n.cdf);
    }
    case kGeluTanh: {
      const V t = gelu_tanh_inner(z);
      const V slope = splat<V>(kGeluScale) * fma(splat<V>(3 * kGeluCubic) * z, z, zero + 1);
      return g * splat<V>(0.5) * fma(z * (1 - t * t), slope, 1 + t);
    }
    case kHardswish:
      return select(z <= -3, zero, select(z < 3, g * (z / 3 + splat<V>(0.5)), g));
    case kHardsigmoid:
      return select((z > -3) & (z < 3), g / 6, zero);
    case kSigmoid: {
      const V s = sigmoid(z);
      return g * s * (1 - s);
    }
    case kTanh: {
      const V t = tanh(z);
      return g * (1 - t * t);
    }
    case kElu:
      return select(z > zero, g, g * exp(select(z > zero, zero, z)) * splat<V>(param));
    default:
      return g;
  }
}

// g * act'(z) from y = act(z), where kernels/activation.py's gradient_from_output holds
template <class V>
DLKERN_NOINLINE V activation_gradient_from_output(int code, V g, V y, double param) {
  const V zero{};
  switch (code) {
    case kRelu:
      return select(y <= zero, zero, g);
    case kRelu6:
      return select((y <= zero) | (y >= 6), zero, g);
    case kLeakyRelu:
      return select(y > zero, g, g * splat<V>(param));
    case kHardsigmoid:
      return select((y > zero) & (y < 1), g / 6, zero);
    case kSigmoid:
      return g * y * (1 - y);
    case kTanh:
      return g * (1 - y * y);
    case kElu:
      return select(y > zero, g, g * (y + splat<V>(param)));
    default:
      return g;
  }
}
