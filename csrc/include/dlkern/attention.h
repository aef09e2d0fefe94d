// softmax(scores + what is added) @ value and its gradients, on the CPU, without a tensor of queries x keys.
//
// What each argument means is said in kernels/reference/attention.py. "Wide" is float64 where dtype is float64, else
// float32. A null pointer stands for "not given" or "not wanted". Rows (the last dimension) of query, key, value,
// outputs and their gradients are dense; strides are in elements.
#pragma once

#include <cstdint>

#include "dlkern/batch_norm_act.h"  // DType

namespace dlkern {

// (batch, heads, length, dim) of the problem's dtype.
struct AttentionTensor {
  void* data;
  int64_t batch, head, row;
};

constexpr int kAttentionBool = 4;  // beside DType's codes

// A mask or bias (batches, 1 or heads, 1 or queries, 1 or keys), stride 0 where it is broadcast; batch b reads
// b % batches. The stride of keys is 0 or 1.
struct AttentionAdded {
  const void* data;
  int dtype;
  int64_t batches, batch, head, query, key;
};

struct AttentionProblem {
  DType dtype;
  int64_t batch, heads, key_heads, queries, keys, dim, value_dim;
  AttentionTensor query, key, value;
  AttentionAdded mask, bias;
  const void* table;  // (heads, rows), wide: transposed
  int64_t rows;
  const void* index;  // int64 or int32: (queries, keys) where reach is negative, else (2 reach + 1,) by distance
  bool index_is_64;
  int64_t reach;
  const uint8_t* padding;  // (batch, keys)
  const int64_t* lengths;  // (batch,)
  const void* slopes;      // (slope_batches, heads), wide
  int64_t slope_batches;
  // Sequences laid end to end: sequence b is rows cu_queries[b] to cu_queries[b + 1] of query and cu_keys of key. The
  // batch strides are then 0, queries and keys the totals, and with `bottom_right` the offset is each sequence's own.
  const int64_t *cu_queries, *cu_keys;
  bool bottom_right;
  int64_t seed;
  double scale, softcap, dropout;
  int64_t left, right, offset;  // INT64_MIN and INT64_MAX: no limit
};

struct AttentionForward {
  AttentionProblem problem;
  AttentionTensor out;  // written
  void* lse;            // (batch, heads, queries), (heads, queries) of sequences: wide, written
};

struct AttentionBackward {
  AttentionProblem problem;
  AttentionTensor grad_out, out;
  const void *grad_lse, *lse;  // as forward's lse
  AttentionTensor grad_query, grad_key, grad_value;
  // Wide and dense: grad_table (rows, heads); the others have their tensor's own shape, and come in as zeros.
  void *grad_table, *grad_mask, *grad_bias;
};

namespace cpu {

// At most `threads` threads run. Results do not depend on the number of threads, bit for bit.
void attention_forward(const AttentionForward& args, int threads);
void attention_backward(const AttentionBackward& args, int threads);

}  // namespace cpu
}  // namespace dlkern
