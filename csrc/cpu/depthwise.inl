// What the kernels of depthwise share. Included once per instruction set (foreach_isa.h).

namespace depthwise {

constexpr int64_t kMaxKernel = 31;

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

template <class T>
DLKERN_INLINE wide_t<T> read(const T* p) {
  if constexpr (sizeof(T) == sizeof(wide_t<T>))
    return *p;
  else
    return load<true>(p, 1)[0];
}
template <class T>
DLKERN_INLINE void write(T* p, double value) {
  if constexpr (sizeof(T) == sizeof(wide_t<T>))
    *p = (T)value;
  else
    store<true>(p, splat<vec_t<T>>(value), 1);
}

// The first n lanes of p[index[0]], p[index[1]], ...
template <class T>
DLKERN_INLINE vec_t<T> gather(const T* p, const int64_t* index, int n) {
  T lanes[kLanes<T>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[index[i]];
  if constexpr (sizeof(T) == 2) {
    vh v;
    std::memcpy(&v, lanes, sizeof v);
    return widen(v, (T*)nullptr);
  } else {
    vec_t<T> v;
    std::memcpy(&v, lanes, sizeof v);
    return v;
  }
}

// The first n lanes, all of them too: load and store with a tail take fewer.
template <class T>
DLKERN_INLINE vec_t<T> load_some(const T* p, int n) {
  return n == kLanes<T> ? load<false>(p, n) : load<true>(p, n);
}
template <class T>
DLKERN_INLINE void store_some(T* p, vec_t<T> v, int n) {
  if (n == kLanes<T>)
    store<false>(p, v, n);
  else
    store<true>(p, v, n);
}

// Loops over vectors in registers: one that is not unrolled puts them into memory.
#ifdef __clang__
#define DLKERN_UNROLL _Pragma("unroll")
#else
#define DLKERN_UNROLL _Pragma("GCC unroll 32")
#endif

template <int kVectors, class V>
DLKERN_INLINE void finish(V (&v)[kVectors], int activation, double param) {
  if (activation == kIdentity) return;
  if (activation == kRelu) {
    DLKERN_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = select(v[i] <= V{}, V{}, v[i]);
  } else if (activation == kRelu6) {
    DLKERN_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = relu6(v[i]);
  } else {
    V called[kVectors];  // a copy: vectors whose address is taken would never be in registers
    DLKERN_UNROLL
    for (int i = 0; i < kVectors; ++i) called[i] = v[i];
    activate<kVectors>(activation, called, param);
    DLKERN_UNROLL
    for (int i = 0; i < kVectors; ++i) v[i] = called[i];
  }
}

// Moments of a channel that were made in blocks of rows, one after the other.
template <class A>
inline void finish_moments(const DepthwiseForward& a, const DepthwisePlan& plan, const double* partial, int64_t o) {
  const int64_t width = a.geometry.out_width;
  Moments total{0, 0, 0};
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const double* mine = partial + 2 * plan.outputs * b;
    const int64_t rows = std::min(plan.row_count, (b + 1) * plan.rows_per_block) - b * plan.rows_per_block;
    total.merge((double)(rows * width), mine[o], mine[plan.outputs + o]);
  }
  static_cast<A*>(a.mean)[o] = (A)total.mean;
  static_cast<A*>(a.var)[o] = (A)(total.m2 / total.count);
}

#include "depthwise_planes.inl"
#include "depthwise_planes_gradient.inl"
#include "depthwise_rows.inl"
#include "depthwise_rows_forward.inl"
#include "depthwise_rows_gradient.inl"

inline void forward_body(const DepthwiseForwardContext& f, Team team) {
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

inline void backward_body(const DepthwiseBackwardContext& b, Team team) {
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

#undef DLKERN_UNROLL

}  // namespace depthwise
