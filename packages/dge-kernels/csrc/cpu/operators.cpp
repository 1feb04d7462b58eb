// The CPU side of every operator but the plan: work spread over torch's threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "../operators/attention.h"
#include "../operators/pool.h"
#include "../operators/route.h"
#include "kernels.h"

namespace dge::cpu {
namespace {

// Rows per thread that are worth handing to another thread, for rows of `elements`.
int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// Cache-line aligned memory for one thread's blocks, uninitialised.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(::operator new(bytes + 64, std::align_val_t{64})) {}
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<void, Free> data_;
};

// Calls body(item, scratch) once for each of `items`; a thread that is done takes the next item, so that items
// of unequal size do not leave threads idle.
template <class Body>
void for_each_item(int64_t items, size_t scratch_bytes, const Body& body) {
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Scratch scratch(scratch_bytes);
      for (int64_t item = next++; item < items; item = next++) body(item, scratch.get());
    }
  });
}

// Pieces that each head of an image is cut into, so that every thread has work when there are few of them.
int64_t pieces_per_head(const AttentionArgs& args) {
  const int64_t heads = std::max<int64_t>(1, args.batch * args.heads);
  const int64_t wanted = ceil_div(4 * static_cast<int64_t>(torch::stable::get_num_threads()), heads);
  const int64_t possible = ceil_div(args.queries, kernels().query_block * std::max<int64_t>(1, args.batch));
  return std::max<int64_t>(1, std::min(wanted, possible));
}

// Looks at a plan's rows where they are used, in the thread that uses them: none may name what is not in the batch,
// and those that are written through must have as many tokens together as the batch, or memory would stay unwritten.
class PatchCheck {
 public:
  PatchCheck(const Patch* patches, int64_t queries, const Grid& grid, int64_t batch)
      : patches_(patches), first_bad_(queries), queries_(queries), grid_(grid), batch_(batch) {}

  // Whether rows begin..end are inside.
  bool look(int64_t begin, int64_t end) {
    int64_t tokens = 0;
    for (int64_t q = begin; q < end; ++q) {
      if (!is_inside(patches_[q], grid_, batch_)) {
        int64_t known = first_bad_;
        while (q < known && !first_bad_.compare_exchange_weak(known, q)) {
        }
        return false;
      }
      const Span span = span_of(patches_[q], grid_);
      tokens += static_cast<int64_t>(span.rows) * span.cols;
    }
    tokens_ += tokens;
    return true;
  }

  // Throws unless all rows were inside, once all have been looked at.
  void require_inside() const {
    const int64_t q = first_bad_;
    if (q == queries_) return;
    const Patch& patch = patches_[q];
    check(false, "patches row ", q, " lies outside the batch: image ", patch.image, ", y ", patch.y, ", x ", patch.x,
          ", side ", patch.side);
  }

  void require_covering() const {
    require_inside();
    const int64_t wanted = batch_ * num_tokens(grid_);
    check(tokens_ == wanted, "patches must cover each of the ", wanted, " tokens once, they cover ", tokens_.load());
  }

 private:
  const Patch* patches_;
  std::atomic<int64_t> first_bad_, tokens_{0};
  int64_t queries_;
  Grid grid_;
  int64_t batch_;
};

struct Device {
  // The most rows that one image has.
  static int64_t check_ends(const int32_t* ends, int64_t batch, int64_t rows, const char* name, const char* what) {
    bool rising = ends[0] == 0 && ends[batch] == rows;
    int64_t longest = 0;
    for (int64_t b = 0; b < batch; ++b) {
      rising = rising && ends[b] <= ends[b + 1];
      longest = std::max<int64_t>(longest, int64_t{ends[b + 1]} - ends[b]);
    }
    check(rising, name, " must rise from 0 to the ", rows, what);
    return longest;
  }

  static void gather(const GatherArgs& args, const Tensor&) {
    PatchCheck check(args.patches, args.queries, args.grid, args.batch);
    torch::stable::parallel_for(0, args.queries, grain_of(args.channels), [&](int64_t begin, int64_t end) {
      if (check.look(begin, end)) kernels().gather(args, begin, end);
    });
    check.require_inside();
  }

  static void scatter(const ScatterArgs& args, const Tensor&) {
    PatchCheck check(args.patches, args.queries, args.grid, args.batch);
    torch::stable::parallel_for(0, args.queries, grain_of(args.channels), [&](int64_t begin, int64_t end) {
      if (check.look(begin, end)) kernels().scatter(args, begin, end);
    });
    check.require_covering();
  }

  static void route(const RouteArgs& args, const Tensor&) {
    torch::stable::parallel_for(0, args.batch * count_regions(args.region, args.grid),
                                grain_of(args.channels * args.region * args.region),
                                [&](int64_t begin, int64_t end) { kernels().route(args, begin, end); });
  }

  static void attention(const AttentionArgs& args, const Tensor&) {
    const int64_t pieces = pieces_per_head(args), block = kernels().query_block;
    for_each_item(args.batch * args.heads * pieces, kernels().attention_scratch(args), [&](int64_t i, void* scratch) {
      const int64_t head = i / pieces % args.heads, image = i / pieces / args.heads;
      const int64_t first = args.ends[image], last = args.ends[image + 1];
      const int64_t share = ceil_div(ceil_div(last - first, block), pieces) * block;
      const int64_t begin = smaller(first + i % pieces * share, last), end = smaller(begin + share, last);
      if (begin < end) kernels().attention(args, {image, head, begin, end}, scratch);
    });
  }

  static void attention_backward(const AttentionBackwardArgs& args, const Tensor&) {
    const AttentionArgs& forward = args.forward;
    for_each_item(forward.batch * forward.heads, kernels().attention_backward_scratch(args),
                  [&](int64_t i, void* scratch) {
                    const int64_t image = i / forward.heads;
                    kernels().attention_backward(
                        args, {image, i % forward.heads, forward.ends[image], forward.ends[image + 1]}, scratch);
                  });
  }
};

}  // namespace
}  // namespace dge::cpu

STABLE_TORCH_LIBRARY_IMPL(dge_kernels, CPU, m) {
  using dge::cpu::Device;
  m.impl("pool_queries", TORCH_BOX(&dge::pool_queries<Device>));
  m.impl("pool_queries_backward", TORCH_BOX(&dge::pool_queries_backward<Device>));
  m.impl("unpool_queries", TORCH_BOX(&dge::unpool_queries<Device>));
  m.impl("unpool_queries_backward", TORCH_BOX(&dge::unpool_queries_backward<Device>));
  m.impl("route", TORCH_BOX(&dge::route<Device>));
  m.impl("ragged_attention", TORCH_BOX(&dge::ragged_attention<Device>));
  m.impl("ragged_attention_backward", TORCH_BOX(&dge::ragged_attention_backward<Device>));
}
