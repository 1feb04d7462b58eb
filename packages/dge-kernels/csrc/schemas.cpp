// Every operator of the package, in one place. The kernels are registered beside their code in cpu/ and
// cuda/; fake kernels and autograd formulas are registered from Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dge_kernels, m) {
  m.def(
      "plan_queries(Tensor choice, int[] splits, SymInt height, SymInt width, SymInt num_prefix_tokens)"
      " -> (Tensor patches, Tensor cu_seqlens, SymInt max_seqlen)");
  m.def(
      "count_queries(Tensor choice, int[] splits, SymInt height, SymInt width, SymInt num_prefix_tokens)"
      " -> (Tensor sums, Tensor cu_seqlens)");
  m.def(
      "write_patches(Tensor choice, Tensor sums, int[] splits, SymInt height, SymInt width,"
      " SymInt num_prefix_tokens, SymInt total) -> Tensor");
  m.def(
      "pool_queries(Tensor x, Tensor patches, SymInt height, SymInt width, SymInt num_prefix_tokens)"
      " -> Tensor");
  m.def(
      "pool_queries_backward(Tensor grad, Tensor patches, SymInt batch, SymInt height, SymInt width,"
      " SymInt num_prefix_tokens) -> Tensor");
  m.def(
      "unpool_queries(Tensor delta, Tensor patches, Tensor residual, SymInt height, SymInt width,"
      " SymInt num_prefix_tokens) -> Tensor");
  m.def(
      "unpool_queries_backward(Tensor grad, Tensor patches, SymInt height, SymInt width,"
      " SymInt num_prefix_tokens) -> Tensor");
  m.def(
      "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale,"
      " Tensor? cu_seqlens_k=None, Tensor? bias=None) -> (Tensor out, Tensor logsumexp)");
  m.def(
      "ragged_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,"
      " Tensor cu_seqlens, SymInt max_seqlen, float scale, Tensor? cu_seqlens_k=None, Tensor? bias=None)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "route(Tensor x, Tensor weight, Tensor bias, int region, SymInt height, SymInt width,"
      " SymInt num_prefix_tokens) -> Tensor");
}
