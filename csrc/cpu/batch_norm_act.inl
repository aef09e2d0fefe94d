// What the kernels for planes and for rows share. Included once per instruction set (foreach_isa.h).

// What is compiled apart: the activations that cost less than a call.
enum Shape : int { kPlainIdentity, kPlainRelu, kAny };
inline Shape shape_of(int activation) {
  return activation == kIdentity ? kPlainIdentity : activation == kRelu ? kPlainRelu : kAny;
}

// Where a backward kernel takes the activation's derivative from.
enum Source : int { kFromInput, kFromInputAndResidual, kFromOutput };

template <class A>
struct Affine {
  A mean, scale, bias;  // z = (x - mean) * scale + bias
};

// How many values, their mean, and the sum of squares about it.
struct Moments {
  double count, mean, m2;

  // Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
  DLKERN_INLINE void merge(double other_count, double other_mean, double other_m2) {
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    m2 += other_m2 + delta * delta * (count * other_count / total);
    count = total;
  }
};

// ----------------------------------------------------------------------- per-channel parameters
inline double read(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case kFloat32:
      return static_cast<const float*>(p)[i];
    case kFloat64:
      return static_cast<const double*>(p)[i];
    case kBFloat16:
      return load<true>(static_cast<const bf16*>(p) + i, 1)[0];
    default:
      return load<true>(static_cast<const f16*>(p) + i, 1)[0];
  }
}

inline void write(void* p, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case kFloat32:
      static_cast<float*>(p)[i] = (float)value;
      break;
    case kFloat64:
      static_cast<double*>(p)[i] = value;
      break;
    case kBFloat16:
      store<true>(static_cast<bf16*>(p) + i, splat<vf>(value), 1);
      break;
    default:
      store<true>(static_cast<f16*>(p) + i, splat<vf>(value), 1);
  }
}

// Both directions come here, so that they normalise by the same numbers.
template <class A>
inline Affine<A> affine(A mean, A invstd, const void* weight, const void* bias, DType dtype, int64_t c) {
  return {mean, weight ? invstd * (A)read(weight, dtype, c) : invstd, bias ? (A)read(bias, dtype, c) : (A)0};
}

// Writes the channel's mean, invstd and running statistics; `moments` are its own, unused without batch statistics.
template <class A>
inline Affine<A> finish_channel(const BatchNormActForward& a, int64_t c, const Moments& moments) {
  double mean, variance;
  if (a.batch_stats) {
    mean = moments.mean;
    variance = moments.m2 / moments.count;
    if (a.running_mean) {
      const double unbiased = moments.m2 / (moments.count > 1 ? moments.count - 1 : 1);
      const double old_mean = read(a.running_mean, a.param_dtype, c), old_var = read(a.running_var, a.param_dtype, c);
      write(a.running_mean, a.param_dtype, c, (1 - a.momentum) * old_mean + a.momentum * mean);
      write(a.running_var, a.param_dtype, c, (1 - a.momentum) * old_var + a.momentum * unbiased);
    }
  } else {
    mean = read(a.running_mean, a.param_dtype, c);
    variance = read(a.running_var, a.param_dtype, c);
  }
  const A m = (A)mean, invstd = (A)(1 / std::sqrt(variance + a.eps));
  static_cast<A*>(a.mean)[c] = m;
  static_cast<A*>(a.invstd)[c] = invstd;
  return affine<A>(m, invstd, a.weight, a.bias, a.param_dtype, c);
}

// grad_x = scale * (dz - sum(dz) / count - d * invstd^2 * sum(dz * d) / count) with d = x - mean
//        = scale * dz - d * slope - offset
template <class A>
struct Centring {
  A slope, offset;
};

// Writes the channel's gradients of weight and bias from sum = sum(dz) and dot = sum(dz * d).
template <class A>
inline Centring<A> finish_gradient(const BatchNormActBackward& a, int64_t c, A scale, double sum, double dot) {
  const double invstd = static_cast<const A*>(a.invstd)[c], count = (double)values_per_channel(a.geometry);
  const DType wide = sizeof(A) == 8 ? kFloat64 : kFloat32;
  if (a.grad_weight) write(a.grad_weight, a.weight ? a.param_dtype : wide, c, dot * invstd);
  if (a.grad_bias) write(a.grad_bias, a.bias ? a.param_dtype : wide, c, sum);
  return {(A)(scale * (invstd * invstd * dot / count)), (A)(scale * (sum / count))};
}

// ------------------------------------------------------------------------------- on vectors
template <int kShape, int kVectors, class V>
DLKERN_INLINE void apply_activation(V (&z)[kVectors], int activation, double param) {
  if constexpr (kShape == kPlainRelu)
    for (V& v : z) v = select(v <= V{}, V{}, v);
  else if constexpr (kShape == kAny)
    activate<kVectors>(activation, z, param);
}

// What the derivative is taken from, of one vector: act's input, as the forward pass computes it, or its output.
// d = x - mean; `other` is where the residual or the output is read.
template <bool kTail, int kShape, int kSource, class T, class V>
DLKERN_INLINE V derivative_argument(V d, V scale, V bias, const T* other, int n) {
  if constexpr (kShape == kPlainIdentity) {
    return V{};
  } else if constexpr (kSource == kFromOutput) {
    return load<kTail>(other, n);
  } else {
    V z = fma(d, scale, bias);
    if constexpr (kSource == kFromInputAndResidual) z += load<kTail>(other, n);
    return z;
  }
}

// v, the gradient of the output, becomes that of act's input.
template <int kShape, int kSource, int kVectors, class V>
DLKERN_INLINE void input_gradient(V (&v)[kVectors], const V (&from)[kVectors], int activation, double param) {
  if constexpr (kShape == kPlainRelu)
    for (int i = 0; i < kVectors; ++i) v[i] = select(from[i] <= V{}, V{}, v[i]);
  else if constexpr (kShape == kAny && kSource == kFromOutput)
    activation_gradient_from_output<kVectors>(activation, v, from, param);
  else if constexpr (kShape == kAny)
    activation_gradient<kVectors>(activation, v, from, param);
}

// Calls Pick::get<shape, source>() for the values at run time: kernels are chosen once a block, not once a vector.
template <class Pick>
inline auto pick_backward(int activation, Source source) {
  const Shape shape = shape_of(activation);
  if (shape == kPlainIdentity) return Pick::template get<kPlainIdentity, kFromInput>();
  if (source == kFromOutput)
    return shape == kPlainRelu ? Pick::template get<kPlainRelu, kFromOutput>()
                               : Pick::template get<kAny, kFromOutput>();
  if (source == kFromInputAndResidual)
    return shape == kPlainRelu ? Pick::template get<kPlainRelu, kFromInputAndResidual>()
                               : Pick::template get<kAny, kFromInputAndResidual>();
  return shape == kPlainRelu ? Pick::template get<kPlainRelu, kFromInput>() : Pick::template get<kAny, kFromInput>();
}

template <class Pick>
inline auto pick_forward(int activation, bool residual) {
  switch (shape_of(activation)) {
    case kPlainIdentity:
      return residual ? Pick::template get<kPlainIdentity, true>() : Pick::template get<kPlainIdentity, false>();
    case kPlainRelu:
      return residual ? Pick::template get<kPlainRelu, true>() : Pick::template get<kPlainRelu, false>();
    default:
      return residual ? Pick::template get<kAny, true>() : Pick::template get<kAny, false>();
  }
}

// What the passes of one backward call do. dz, the gradient of act's input, is the gradient of the residual. Where its
// derivative costs more than a store and a load, the first pass stores dz (where grad_x will be, if no residual has to
// have it) and the second one reads it; elsewhere the second makes it again and stores it beside grad_x: all that is
// stored can then go past the caches, which keep what the second pass reads.
struct BackwardPasses {
  // The first makes the sums; and grad_x where nothing has to be centred.
  Source source;      // where it takes the derivative from
  const void* other;  // the residual or the output that takes
  void* first_dz;     // where it stores dz, or null
  bool first_writes_x;
  // The second makes the centred grad_x.
  bool second;
  const void* grad;    // what it reads: dz, or the gradient of the output
  int64_t grad_step;   // (see BatchNormActBackward)
  bool differentiate;  // whether that is the gradient of the output
  void* second_dz;     // where it stores dz, or null
};
inline BackwardPasses passes_of(const BatchNormActBackward& a) {
  BackwardPasses p{};
  p.source = a.y ? kFromOutput : a.residual ? kFromInputAndResidual : kFromInput;
  p.other = a.y ? a.y : a.residual;
  p.second = a.grad_x && a.batch_stats;
  p.first_writes_x = a.grad_x && !a.batch_stats;
  const bool costly = a.activation == kSilu || a.activation == kGelu || a.activation == kGeluTanh ||
                      ((a.activation == kSigmoid || a.activation == kTanh || a.activation == kElu) && !a.y);
  if (!p.second)
    p.first_dz = a.grad_residual;
  else if (costly)
    p.first_dz = a.grad_residual ? a.grad_residual : a.grad_x;
  else
    p.second_dz = a.grad_residual;
  p.differentiate = !(p.second && p.first_dz);
  p.grad = p.differentiate ? a.grad_y : p.first_dz;
  p.grad_step = p.differentiate ? a.grad_y_step : a.geometry.channels * a.geometry.inner;
  return p;
}

#include "batch_norm_act_planes.inl"
#include "batch_norm_act_rows.inl"

inline void forward_body(const ForwardContext& f, Team team) {
  const bool rows = f.args.geometry.channels_last;
  switch (f.args.dtype) {
    case kFloat32:
      return rows ? forward_rows<float>(f, team) : forward_planes<float>(f, team);
    case kFloat64:
      return rows ? forward_rows<double>(f, team) : forward_planes<double>(f, team);
    case kBFloat16:
      return rows ? forward_rows<bf16>(f, team) : forward_planes<bf16>(f, team);
    default:
      return rows ? forward_rows<f16>(f, team) : forward_planes<f16>(f, team);
  }
}

inline void backward_body(const BackwardContext& b, Team team) {
  const bool rows = b.args.geometry.channels_last;
  switch (b.args.dtype) {
    case kFloat32:
      return rows ? backward_rows<float>(b, team) : backward_planes<float>(b, team);
    case kFloat64:
      return rows ? backward_rows<double>(b, team) : backward_planes<double>(b, team);
    case kBFloat16:
      return rows ? backward_rows<bf16>(b, team) : backward_planes<bf16>(b, team);
    default:
      return rows ? backward_rows<f16>(b, team) : backward_planes<f16>(b, team);
  }
}
