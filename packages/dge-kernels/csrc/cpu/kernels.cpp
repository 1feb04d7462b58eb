// The loops of every CPU operator, compiled once per instruction set: CMake gives DGE_ISA, the namespace and
// name of the set, and DGE_VECTOR_BYTES, the width of its vectors.
#include "attention_backward.h"
#include "pool_route_loops.h"

namespace DGE_ISA {

void gather(const GatherArgs& args, int64_t begin, int64_t end) {
  with_type(args.type, [&](auto type) { gather_rows<decltype(type)>(args, begin, end); });
}

void scatter(const ScatterArgs& args, int64_t begin, int64_t end) {
  with_type(args.type, [&](auto type) { scatter_rows<decltype(type)>(args, begin, end); });
}

void route(const RouteArgs& args, int64_t begin, int64_t end) {
  with_type(args.type, [&](auto type) { route_regions<decltype(type)>(args, begin, end); });
}

size_t attention_scratch(const AttentionArgs& args) {
  size_t bytes = 0;
  with_type(args.type, [&](auto type) {
    using A = Acc<decltype(type)>;
    bytes = sizeof(A) * ForwardScratch<A>(args, nullptr).size;
  });
  return bytes;
}

void attention(const AttentionArgs& args, const AttentionItem& item, void* scratch) {
  with_type(args.type, [&](auto type) {
    using T = decltype(type);
    attention_item<T>(args, item, static_cast<Acc<T>*>(scratch));
  });
}

size_t attention_backward_scratch(const AttentionBackwardArgs& args) {
  size_t bytes = 0;
  with_type(args.forward.type, [&](auto type) {
    using A = Acc<decltype(type)>;
    bytes = sizeof(A) * BackwardScratch<A>(args.forward, nullptr).size;
  });
  return bytes;
}

void attention_backward(const AttentionBackwardArgs& args, const AttentionItem& item, void* scratch) {
  with_type(args.forward.type, [&](auto type) {
    using T = decltype(type);
    attention_backward_item<T>(args, item, static_cast<Acc<T>*>(scratch));
  });
}

#define DGE_TEXT(name) #name
#define DGE_NAME(name) DGE_TEXT(name)
extern const Kernels table;
const Kernels table = {
    DGE_NAME(DGE_ISA),          kBlock<float>,      gather, scatter, route, attention_scratch, attention,
    attention_backward_scratch, attention_backward,
};

}  // namespace DGE_ISA
