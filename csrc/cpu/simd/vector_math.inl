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

// x = n ln 2 + r with |r| <= ln 2 / 2, and 2^n. Below the normal numbers 2^n is 0, above the largest infinity: of an
// activation nothing that small or large can be seen. NaN stays in r.
struct Reduced {
  vf r, scale;
};
DLKERN_INLINE Reduced reduce(vf x) {
  const vf high = vf{} + 89.0f, low = vf{} - 88.0f;
  x = select(high < x, high, x);  // minps and maxps, which pass their second operand on where it is NaN
  x = select(low > x, low, x);
  const vf magic = vf{} + 12583039.0f;  // 1.5 * 2^23 + 127: adding it rounds to n, and leaves the exponent of 2^n below
  const vf shifted = fma(x, vf{} + 1.44269504088896341f, magic);
  const vf n = shifted - magic;
  vf r = fma(n, vf{} - 0.693145751953125f, x);  // ln 2 in two parts, the first with few bits: exact products
  r = fma(n, vf{} - 1.42860682030941723e-6f, r);
  return {r, (vf)((vu)shifted << 23)};
}

// exp(r) - 1 by its Taylor series: the first term left out is below 2^-27 of exp(r).
DLKERN_INLINE vf exp_series(vf r) {
  vf p = vf{} + (float)(1.0 / 5040);
  p = fma(p, r, vf{} + (float)(1.0 / 720));
  p = fma(p, r, vf{} + (float)(1.0 / 120));
  p = fma(p, r, vf{} + (float)(1.0 / 24));
  p = fma(p, r, vf{} + (float)(1.0 / 6));
  p = fma(p, r, vf{} + 0.5f);
  return fma(p, r * r, r);
}

DLKERN_INLINE vf exp(vf x) {
  const Reduced e = reduce(x);
  const vf p = exp_series(e.r);
  return (p + 1.0f) * e.scale;
}

DLKERN_INLINE vf expm1(vf x) {
  const Reduced e = reduce(x);
  return fma(exp_series(e.r), e.scale, e.scale - 1.0f);
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

// Activations of several vectors at once: a call, and the choice, for all of them.
#define DLKERN_EACH(expression)        \
  for (int i = 0; i < kVectors; ++i) { \
    const V z = v[i];                  \
    v[i] = (expression);               \
  }                                    \
  return;
#define DLKERN_EACH_GRADIENT(expression) \
  for (int i = 0; i < kVectors; ++i) {   \
    const V g = v[i], z = from[i];       \
    v[i] = (expression);                 \
  }                                      \
  return;

template <class V>
DLKERN_INLINE V ramp6(V z) {  // hardsigmoid's relu6(z + 3)
  return select(z < -3, V{}, select(z > 3, V{} + 6, z + 3));
}
template <class V>
DLKERN_INLINE V relu6(V z) {
  const V low = select(z <= V{}, V{}, z);  // a NaN stays
  return select(low > 6, V{} + 6, low);
}

// v = act(v)
template <int kVectors, class V>
DLKERN_NOINLINE void activate(int code, V (&v)[kVectors], double param) {
  const V zero{}, p = splat<V>(param);
  switch (code) {
    case kRelu:
      DLKERN_EACH(select(z <= zero, zero, z))
    case kRelu6:
      DLKERN_EACH(relu6(z))
    case kLeakyRelu:
      DLKERN_EACH(select(z > zero, z, z * p))
    case kSilu:
      DLKERN_EACH(z / (1 + exp(-z)))
    case kGelu:
      DLKERN_EACH(z * normal(z).cdf)
    case kGeluTanh:
      DLKERN_EACH(splat<V>(0.5) * z * (1 + gelu_tanh_inner(z)))
    case kHardswish:
      DLKERN_EACH(z * ramp6(z) * splat<V>(1.0 / 6))
    case kHardsigmoid:
      DLKERN_EACH(ramp6(z) * splat<V>(1.0 / 6))
    case kSigmoid:
      DLKERN_EACH(sigmoid(z))
    case kTanh:
      DLKERN_EACH(tanh(z))
    case kElu:
      DLKERN_EACH(select(z > zero, z, expm1(z) * p))
    default:
      return;
  }
}

template <class V>
DLKERN_INLINE V silu_slope(V z) {
  const V s = sigmoid(z);
  return s * fma(z, 1 - s, V{} + 1);
}
template <class V>
DLKERN_INLINE V gelu_slope(V z) {
  const auto n = normal(z);
  return fma(z, n.pdf, n.cdf);
}
template <class V>
DLKERN_INLINE V gelu_tanh_slope(V z) {
  const V t = gelu_tanh_inner(z);
  const V inner = splat<V>(kGeluScale) * fma(splat<V>(3 * kGeluCubic) * z, z, V{} + 1);
  return splat<V>(0.5) * fma(z * (1 - t * t), inner, 1 + t);
}
template <class V>
DLKERN_INLINE V bell(V y) {  // of a sigmoid's output
  return y * (1 - y);
}
template <class V>
DLKERN_INLINE V one_minus_square(V y) {
  return 1 - y * y;
}

// v = v * act'(from), with PyTorch's values at the kinks and at NaN
template <int kVectors, class V>
DLKERN_NOINLINE void activation_gradient(int code, V (&v)[kVectors], const V (&from)[kVectors], double param) {
  const V zero{}, p = splat<V>(param);
  switch (code) {
    case kRelu:
      DLKERN_EACH_GRADIENT(select(z <= zero, zero, g))
    case kRelu6:
      DLKERN_EACH_GRADIENT(select((z <= zero) | (z >= 6), zero, g))
    case kLeakyRelu:
      DLKERN_EACH_GRADIENT(select(z > zero, g, g * p))
    case kSilu:
      DLKERN_EACH_GRADIENT(g * silu_slope(z))
    case kGelu:
      DLKERN_EACH_GRADIENT(g * gelu_slope(z))
    case kGeluTanh:
      DLKERN_EACH_GRADIENT(g * gelu_tanh_slope(z))
    case kHardswish:
      DLKERN_EACH_GRADIENT(select(z <= -3, zero, select(z < 3, g * fma(z, splat<V>(1.0 / 3), splat<V>(0.5)), g)))
    case kHardsigmoid:
      DLKERN_EACH_GRADIENT(select((z > -3) & (z < 3), g / 6, zero))
    case kSigmoid:
      DLKERN_EACH_GRADIENT(g * bell(sigmoid(z)))
    case kTanh:
      DLKERN_EACH_GRADIENT(g * one_minus_square(tanh(z)))
    case kElu:
      DLKERN_EACH_GRADIENT(select(z > zero, g, g * exp(select(z > zero, zero, z)) * p))
    default:
      return;
  }
}

// v = v * act'(z) from `from` = act(z), where kernels/activation.py's gradient_from_output holds
template <int kVectors, class V>
DLKERN_NOINLINE void activation_gradient_from_output(int code, V (&v)[kVectors], const V (&from)[kVectors],
                                                     double param) {
  const V zero{}, p = splat<V>(param);
  switch (code) {
    case kRelu:
      DLKERN_EACH_GRADIENT(select(z <= zero, zero, g))
    case kRelu6:
      DLKERN_EACH_GRADIENT(select((z <= zero) | (z >= 6), zero, g))
    case kLeakyRelu:
      DLKERN_EACH_GRADIENT(select(z > zero, g, g * p))
    case kHardsigmoid:
      DLKERN_EACH_GRADIENT(select((z > zero) & (z < 1), g / 6, zero))
    case kSigmoid:
      DLKERN_EACH_GRADIENT(g * bell(z))
    case kTanh:
      DLKERN_EACH_GRADIENT(g * one_minus_square(z))
    case kElu:
      DLKERN_EACH_GRADIENT(select(z > zero, g, g * (z + p)))
    default:
      return;
  }
}

#undef DLKERN_EACH
#undef DLKERN_EACH_GRADIENT
