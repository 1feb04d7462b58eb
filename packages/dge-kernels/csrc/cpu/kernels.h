// The border between the operators, which know torch, and the loops, which know vector instructions.
//
// kernels.cpp is compiled once per instruction set and includes nothing but this header and its own loops:
// an inline function shared with other files could otherwise be linked in a form the machine cannot run.
#pragma once

#include <cstddef>

#include "../kernel_args.h"

namespace dge::cpu {

// One head of one image, for its queries first..last of the packed order.
struct AttentionItem {
  int64_t image, head, first, last;
};

struct Kernels {
  const char* name;
  int64_t query_block;  // queries that the attention loop works on at once, for float32
  void (*gather)(const GatherArgs&, int64_t begin, int64_t end);
  void (*scatter)(const ScatterArgs&, int64_t begin, int64_t end);
  void (*route)(const RouteArgs&, int64_t begin, int64_t end);
  size_t (*attention_scratch)(const AttentionArgs&);
  void (*attention)(const AttentionArgs&, const AttentionItem&, void* scratch);
  size_t (*attention_backward_scratch)(const AttentionBackwardArgs&);
  void (*attention_backward)(const AttentionBackwardArgs&, const AttentionItem&, void* scratch);
};

// The kernels for the best instruction set that this machine has.
const Kernels& kernels();

}  // namespace dge::cpu
