// The bodies of the CUDA kernels, compiled for the host and run over a whole launch, against the plain definition.
#include "../../csrc/cuda/attention_body.h"
#include "../../csrc/cuda/plan_body.h"
#include "../../csrc/cuda/pool_route_body.h"
#include "check.h"
#include "problem.h"

using namespace test;
using namespace dge::cuda;

// All 32 lanes of a warp in one thread; what cuda::Warp does by shuffles is done by loops.
template <class State>
struct HostWarp {
  State states[kWarp] = {};

  template <class Do>
  void each(const Do& action) {
    for (int lane = 0; lane < kWarp; ++lane) action(lane, states[lane]);
  }
  template <class Get>
  auto sum(const Get& get) const {
    auto total = get(states[0]);
    for (int lane = 1; lane < kWarp; ++lane) total += get(states[lane]);
    return total;
  }
  template <class Get>
  auto max(const Get& get) const {
    auto top = get(states[0]);
    for (int lane = 1; lane < kWarp; ++lane) top = std::max(top, get(states[lane]));
    return top;
  }
  template <class Get>
  auto from(int lane, const Get& get) const {
    return get(states[lane]);
  }
};

void run_plan(const Setting& s) {
  const Plan plan(s);
  const int64_t regions = s.batch * plan.args.regions;
  std::vector<int32_t> counts(regions, -1), ends(s.batch + 1, -1);
  for (int64_t i = 0; i < regions; ++i) count_region(plan.args, i, counts.data());
  std::vector<int64_t> sums(regions);
  for (int64_t i = 0, total = 0; i < regions; ++i) sums[i] = total += counts[i];
  for (int64_t i = 0; i <= s.batch; ++i) write_end(plan.args, i, sums.data(), ends.data());
  check(ends == plan.ends, s.name() + ", cu_seqlens");
  std::vector<Patch> patches(plan.patches.size());
  for (int64_t i = 0; i < regions; ++i) write_region(plan.args, i, sums.data(), patches.data(), patches.size());
  check(std::memcmp(patches.data(), plan.patches.data(), patches.size() * sizeof(Patch)) == 0, s.name() + ", patches");
}

// A choice out of range must be clamped, not followed.
void run_plan_with_bad_choices() {
  Plan plan(settings()[0]);
  for (size_t i = 0; i < plan.choice.size(); ++i) plan.choice[i] = i % 2 ? 1000 : -1000;
  std::vector<int32_t> counts(plan.choice.size());
  for (size_t i = 0; i < counts.size(); ++i) count_region(plan.args, i, counts.data());
  for (size_t i = 0; i < counts.size(); ++i) {
    const int prefix = int64_t(i) % plan.args.regions == 0 ? int(plan.grid.prefix) : 0;
    check(counts[i] == prefix + (i % 2 ? 1 : 16), "a choice out of range is clamped");
  }
}

// Sums that belong to another choice must not make a thread write outside `total` rows: ASan sees if one does.
void run_plan_with_bad_sums() {
  Plan plan(settings()[0]);
  const int64_t total = 7;
  for (int64_t sum : {int64_t(-5), int64_t(0), int64_t(6), int64_t(7), INT64_MAX - 100}) {
    std::vector<Patch> patches(total);
    const std::vector<int64_t> sums(plan.choice.size(), sum);
    for (size_t i = 0; i < sums.size(); ++i) write_region(plan.args, i, sums.data(), patches.data(), total);
  }
}

template <class T, int V>
void run_tokens(const Setting& s) {
  if (s.channels % V) return;
  const Plan plan(s);
  const std::string name = s.name() + ", " + std::to_string(V) + " at a time";
  const int64_t queries = plan.patches.size(), tokens = plan.tokens();
  const auto x = random_numbers<T>(s.batch * tokens * s.channels, 1),
             delta = random_numbers<T>(queries * s.channels, 2);
  const Tokens view{x.data(), tokens * s.channels, s.channels};
  for (bool mean : {false, true}) {
    std::vector<T> out(queries * s.channels, T(NAN)), back(x.size(), T(NAN));
    const GatherArgs gather{type_of<T>,          queries,    s.batch,   view, out.data(),
                            plan.patches.data(), s.channels, plan.grid, mean};
    const ScatterArgs scatter{
        type_of<T>,          queries,    s.batch,   delta.data(), mean ? Tokens{} : view, back.data(),
        plan.patches.data(), s.channels, plan.grid, mean};
    for (int64_t q = 0; q < queries; ++q) {
      for (int lane = 0; lane < kWarp; ++lane) {
        gather_lane<T, V>(gather, q, lane, kWarp);
        scatter_lane<T, V>(scatter, q, lane, kWarp);
      }
    }
    check_close(out, expected_gather(plan, x, s.channels, mean), 1e-6, name + ", gather");
    const auto expected = expected_scatter(plan, delta, mean ? nullptr : &x, s.batch, s.channels, mean);
    check_close(back, expected, 1e-6, name + ", scatter");
  }
  const auto weight = random_numbers<T>(s.splits.size() * s.channels, 3), bias = random_numbers<T>(s.splits.size(), 4);
  std::vector<uint8_t> choice(s.batch * plan.args.regions, 255);
  const RouteArgs route{type_of<T>,     s.batch,       view,       weight.data(),
                        bias.data(),    choice.data(), s.channels, int64_t(s.splits.size()),
                        plan.args.size, plan.grid};
  for (int64_t i = 0; i < s.batch * plan.args.regions; ++i) {
    HostWarp<RouteLane<T>> warp;
    route_region<T, V>(warp, route, i);
  }
  check_close(choice, expected_route(plan, x, weight, bias, s.channels), 0, name + ", route");
}

// Patches outside the batch are skipped: nothing outside the memory is read or written.
void run_patches_outside() {
  const Setting s = settings()[0];
  Plan plan(s);
  plan.patches[0] = {100, 0, 0, 4};
  plan.patches[1] = {0, 100, 0, 4};
  plan.patches[2] = {0, -9, 0, 1};
  const int64_t queries = plan.patches.size();
  const std::vector<float> x(s.batch * plan.tokens() * s.channels, 1.0f);
  std::vector<float> out(queries * s.channels, NAN), back(x.size(), 0.0f);
  const Tokens view{x.data(), plan.tokens() * s.channels, s.channels};
  for (int64_t q = 0; q < queries; ++q) {
    gather_lane<float, 1>(
        {Type::f32, queries, s.batch, view, out.data(), plan.patches.data(), s.channels, plan.grid, true}, q, 0, 1);
    scatter_lane<float, 1>(
        {Type::f32, queries, s.batch, out.data(), view, back.data(), plan.patches.data(), s.channels, plan.grid, false},
        q, 0, 1);
  }
  for (int64_t c = 0; c < 3 * s.channels; ++c) check(out[c] == 0.0f, "a query outside pools nothing");
}

template <class T, int R>
void run_attention(const Setting& s, int64_t width, const Keys<T>& keys) {
  const Plan plan(s);
  const std::string name = s.name() + ", heads of " + std::to_string(width) + ", " + keys.name();
  const int64_t queries = plan.patches.size(), heads = 2, row = heads * width;
  const auto q = random_numbers<T>(queries * row, 5), grad = random_numbers<T>(q.size(), 6);
  const auto k = random_numbers<T>(keys.rows() * row, 7), v = random_numbers<T>(k.size(), 8);
  const Attention expected(plan, heads, width, keys, q, k, v, grad);
  std::vector<T> out(q.size(), T(NAN)), logsumexp(queries * heads, T(NAN)), overlap(queries * heads, T(NAN));
  std::vector<T> grad_q(q.size(), T(NAN)), grad_k(k.size(), T(NAN)), grad_v(v.size(), T(NAN));
  std::vector<T> grad_bias(keys.bias.size(), T(NAN));
  const AttentionArgs args{type_of<T>,
                           queries,
                           s.batch,
                           keys.longest,
                           heads,
                           width,
                           plan.ends.data(),
                           expected.scale,
                           {q.data(), 0, row, width},
                           keys.view(k, width),
                           keys.view(v, width),
                           out.data(),
                           logsumexp.data(),
                           keys.packed_ends(),
                           keys.rows(),
                           keys.bias_view()};
  for (int64_t i = 0; i < queries * heads; ++i) {
    HostWarp<AttentionLane<T, R>> warp;
    attend<T, R>(warp, args, i);
  }
  const AttentionBackwardArgs backward{
      args, {grad.data(), 0, row, width}, grad_q.data(), grad_k.data(), grad_v.data(), grad_bias.data()};
  for (int64_t i = 0; i < queries * heads; ++i) {
    HostWarp<GradQueryLane<T, R>> warp;
    attend_grad_query<T, R>(warp, backward, overlap.data(), i);
  }
  for (int64_t i = 0; i < keys.rows() * heads; ++i) {
    HostWarp<GradKeyLane<T, R>> warp;
    attend_grad_key<T, R>(warp, backward, overlap.data(), i);
  }
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-5;
  check_close(out, expected.out, tolerance, name + ", attention");
  check_close(comparable(logsumexp), comparable(expected.logsumexp), tolerance, name + ", logsumexp");
  check_close(grad_q, expected.grad_q, tolerance, name + ", grad q");
  check_close(grad_k, expected.grad_k, tolerance, name + ", grad k");
  check_close(grad_v, expected.grad_v, tolerance, name + ", grad v");
  check_close(grad_bias, expected.grad_bias, tolerance, name + ", grad bias");
}

// Ends of keys that were made by hand: nothing outside the memory is read, and a key of no image has no gradient.
void run_bad_key_ends() {
  const std::vector<float> rows(4, 1.0f);
  const std::vector<int32_t> ends{0, 2, 4};
  for (const std::vector<int32_t>& key_ends : {std::vector<int32_t>{-9, 1, 3}, {0, 900, 4}, {3, 1, 1}, {7, 8, 9}}) {
    std::vector<float> out(4), logsumexp(4), overlap(4), grad_q(4), grad_k(4, NAN), grad_v(4), grad_bias(4);
    const Heads view{rows.data(), 0, 1, 1};
    const AttentionArgs args{
        Type::f32,       4, 2,   0, 1, 1, ends.data(), 1.0, view, view, view, out.data(), logsumexp.data(),
        key_ends.data(), 4, view};
    const AttentionBackwardArgs backward{args, view, grad_q.data(), grad_k.data(), grad_v.data(), grad_bias.data()};
    for (int64_t i = 0; i < 4; ++i) {
      HostWarp<AttentionLane<float, 1>> warp;
      attend<float, 1>(warp, args, i);
      HostWarp<GradQueryLane<float, 1>> query_warp;
      attend_grad_query<float, 1>(query_warp, backward, overlap.data(), i);
    }
    for (int64_t i = 0; i < 4; ++i) {
      HostWarp<GradKeyLane<float, 1>> warp;
      attend_grad_key<float, 1>(warp, backward, overlap.data(), i);
    }
    check(grad_k[3] == 0.0f || key_ends[2] == 4, "a key of no image has no gradient");
  }
}

int main() {
  for (const Setting& s : settings()) {
    run_plan(s);
    run_tokens<float, 1>(s);
    run_tokens<float, 4>(s);
    run_tokens<double, 2>(s);
    for (const auto& [packed, biased] : key_layouts()) {
      run_attention<float, 1>(s, 20, Keys<float>(s.batch, 2, 33, packed, biased));
      run_attention<float, 2>(s, 64, Keys<float>(s.batch, 2, 5, packed, biased));
      run_attention<double, 4>(s, 100, Keys<double>(s.batch, 2, 40, packed, biased));
    }
  }
  run_plan_with_bad_choices();
  run_plan_with_bad_sums();
  run_patches_outside();
  run_bad_key_ends();
  return test::report("cuda bodies");
}
