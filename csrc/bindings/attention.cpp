#include "dlkern/attention.h"

#include <tuple>

#include "bindings/bindings.h"

namespace dlkern::bindings {
namespace {

typedef std::tuple<uintptr_t, int64_t, int64_t, int64_t> Strided;  // address, strides of batch, head and row
// address, dtype, batches, strides of batch, head, query and key
typedef std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t> Added;

AttentionTensor tensor(const Strided& t) {
  return {at(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

AttentionAdded added(const Added& t) {
  return {at(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t),
          std::get<4>(t),     std::get<5>(t), std::get<6>(t)};
}

// sizes: batch, heads, key_heads, queries, keys, dim, value_dim; table: address, rows; index: address, whether int64,
// reach; slopes: address, batches; sequences: addresses of cu_queries and cu_keys, bottom_right; numbers: seed, scale,
// softcap, dropout; band: left, right, offset.
AttentionProblem problem(int dtype, std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes,
                         const Strided& query, const Strided& key, const Strided& value, const Added& mask,
                         const Added& bias, std::tuple<uintptr_t, int64_t> table,
                         std::tuple<uintptr_t, bool, int64_t> index, uintptr_t padding, uintptr_t lengths,
                         std::tuple<uintptr_t, int64_t> slopes, std::tuple<uintptr_t, uintptr_t, bool> sequences,
                         std::tuple<int64_t, double, double, double> numbers,
                         std::tuple<int64_t, int64_t, int64_t> band) {
  AttentionProblem p{};
  p.dtype = DType(dtype);
  std::tie(p.batch, p.heads, p.key_heads, p.queries, p.keys, p.dim, p.value_dim) = sizes;
  p.query = tensor(query), p.key = tensor(key), p.value = tensor(value);
  p.mask = added(mask), p.bias = added(bias);
  p.table = at(std::get<0>(table)), p.rows = std::get<1>(table);
  p.index = at(std::get<0>(index));
  std::tie(std::ignore, p.index_is_64, p.reach) = index;
  p.padding = static_cast<const uint8_t*>(at(padding)), p.lengths = static_cast<const int64_t*>(at(lengths));
  p.slopes = at(std::get<0>(slopes)), p.slope_batches = std::get<1>(slopes);
  p.cu_queries = static_cast<const int64_t*>(at(std::get<0>(sequences)));
  p.cu_keys = static_cast<const int64_t*>(at(std::get<1>(sequences)));
  p.bottom_right = std::get<2>(sequences);
  std::tie(p.seed, p.scale, p.softcap, p.dropout) = numbers;
  std::tie(p.left, p.right, p.offset) = band;
  return p;
}

template <class... Given>
void attention_forward(const Strided& out, uintptr_t lse, int threads, Given... given) {
  AttentionForward a{};
  a.problem = problem(given...);
  a.out = tensor(out), a.lse = at(lse);
  const py::gil_scoped_release release;
  cpu::attention_forward(a, threads);
}

template <class... Given>
void attention_backward(const Strided& grad_out, const Strided& out, uintptr_t grad_lse, uintptr_t lse,
                        const Strided& grad_query, const Strided& grad_key, const Strided& grad_value,
                        uintptr_t grad_table, uintptr_t grad_mask, uintptr_t grad_bias, int threads, Given... given) {
  AttentionBackward a{};
  a.problem = problem(given...);
  a.grad_out = tensor(grad_out), a.out = tensor(out), a.grad_lse = at(grad_lse), a.lse = at(lse);
  a.grad_query = tensor(grad_query), a.grad_key = tensor(grad_key), a.grad_value = tensor(grad_value);
  a.grad_table = at(grad_table), a.grad_mask = at(grad_mask), a.grad_bias = at(grad_bias);
  const py::gil_scoped_release release;
  cpu::attention_backward(a, threads);
}

// What both functions take after their own arguments: those of problem().
template <class... Given>
void add(py::module_& m, AttentionProblem (*)(Given...)) {
  m.def("attention_forward", &attention_forward<Given...>);
  m.def("attention_backward", &attention_backward<Given...>);
}

}  // namespace

void attention(py::module_& m) { add(m, &problem); }

}  // namespace dlkern::bindings
