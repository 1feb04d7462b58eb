// The CPU loops of every instruction set that this machine has, against the plain definition.
#include "../../csrc/cpu/kernels.h"

#include "check.h"
#include "problem.h"

namespace baseline {
extern const dge::cpu::Kernels table;
}
#if defined(DGE_X86)
namespace avx2 {
extern const dge::cpu::Kernels table;
}
#endif

using namespace test;
using cpu::Kernels;

template <class T>
void run_tokens(const Kernels& kernels, const Setting& s, const std::string& name) {
  const Plan plan(s);
  const int64_t queries = plan.patches.size(), tokens = plan.tokens();
  const auto x = random_numbers<T>(s.batch * tokens * s.channels, 1),
             delta = random_numbers<T>(queries * s.channels, 2);
  const Tokens view{x.data(), tokens * s.channels, s.channels};
  for (bool mean : {false, true}) {
    std::vector<T> out(queries * s.channels, T(NAN)), back(x.size(), T(NAN));
    kernels.gather({type_of<T>, queries, s.batch, view, out.data(), plan.patches.data(), s.channels, plan.grid, mean},
                   0, queries);
    check_close(out, expected_gather(plan, x, s.channels, mean), 1e-6, name + ", gather");
    kernels.scatter({type_of<T>, queries, s.batch, delta.data(), mean ? Tokens{} : view, back.data(),
                     plan.patches.data(), s.channels, plan.grid, mean},
                    0, queries);
    const auto expected = expected_scatter(plan, delta, mean ? nullptr : &x, s.batch, s.channels, mean);
    check_close(back, expected, 1e-6, name + ", scatter");
  }
  const auto weight = random_numbers<T>(s.splits.size() * s.channels, 3), bias = random_numbers<T>(s.splits.size(), 4);
  std::vector<uint8_t> choice(s.batch * plan.args.regions, 255);
  kernels.route({type_of<T>, s.batch, view, weight.data(), bias.data(), choice.data(), s.channels,
                 int64_t(s.splits.size()), plan.args.size, plan.grid},
                0, s.batch * plan.args.regions);
  check_close(choice, expected_route(plan, x, weight, bias, s.channels), 0, name + ", route");
}

// A channel's sum has the same bits whatever channels are beside it, and on every machine.
template <class T>
void run_fewer_channels(const Kernels& kernels, const Setting& s, const std::string& name) {
  const Plan plan(s);
  const int64_t queries = plan.patches.size(), tokens = plan.tokens(), channels = 150;
  const auto x = random_numbers<T>(s.batch * tokens * channels, 1);
  const Tokens view{x.data(), tokens * channels, channels};
  std::vector<T> all(queries * channels, T(NAN));
  baseline::table.gather(
      {type_of<T>, queries, s.batch, view, all.data(), plan.patches.data(), channels, plan.grid, false}, 0, queries);
  for (int64_t some : {1, 12, 36, 149, 150}) {
    std::vector<T> out(queries * some, T(NAN)), expected;
    for (int64_t q = 0; q < queries; ++q) {
      expected.insert(expected.end(), all.begin() + q * channels, all.begin() + q * channels + some);
    }
    kernels.gather({type_of<T>, queries, s.batch, view, out.data(), plan.patches.data(), some, plan.grid, false}, 0,
                   queries);
    check_close(out, expected, 0, name + ", gather of " + std::to_string(some) + " of 150 channels");
  }
}

template <class T>
void run_attention(const Kernels& kernels, const Setting& s, int64_t width, const Keys<T>& keys,
                   const std::string& setting) {
  const Plan plan(s);
  const std::string name = setting + ", heads of " + std::to_string(width) + ", " + keys.name();
  const int64_t queries = plan.patches.size(), heads = 2;
  const auto q = random_numbers<T>(queries * heads * width, 5), grad = random_numbers<T>(q.size(), 6);
  const auto k = random_numbers<T>(keys.rows() * heads * width, 7), v = random_numbers<T>(k.size(), 8);
  const Attention expected(plan, heads, width, keys, q, k, v, grad);
  std::vector<T> out(q.size(), T(NAN)), logsumexp(queries * heads, T(NAN));
  const int64_t row = heads * width;
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
  std::vector<T> grad_q(q.size(), T(NAN)), grad_k(k.size(), T(NAN)), grad_v(v.size(), T(NAN));
  std::vector<T> grad_bias(keys.bias.size(), T(NAN));
  const AttentionBackwardArgs backward{
      args, {grad.data(), 0, row, width}, grad_q.data(), grad_k.data(), grad_v.data(), grad_bias.data()};
  std::vector<char> scratch(kernels.attention_scratch(args)), more(kernels.attention_backward_scratch(backward));
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t head = 0; head < heads; ++head) {
      kernels.attention(args, {image, head, plan.ends[image], plan.ends[image + 1]}, scratch.data());
      kernels.attention_backward(backward, {image, head, plan.ends[image], plan.ends[image + 1]}, more.data());
    }
  }
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-5;
  check_close(out, expected.out, tolerance, name + ", attention");
  check_close(comparable(logsumexp), comparable(expected.logsumexp), tolerance, name + ", logsumexp");
  check_close(grad_q, expected.grad_q, tolerance, name + ", grad q");
  check_close(grad_k, expected.grad_k, tolerance, name + ", grad k");
  check_close(grad_v, expected.grad_v, tolerance, name + ", grad v");
  check_close(grad_bias, expected.grad_bias, tolerance, name + ", grad bias");
}

int main() {
  std::vector<const Kernels*> tables{&cpu::kernels(), &baseline::table};
#if defined(DGE_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2::table);
#endif
  for (const Kernels* kernels : tables) {
    for (const Setting& s : settings()) {
      const std::string name = std::string(kernels->name) + ", " + s.name();
      run_tokens<float>(*kernels, s, name);
      run_tokens<double>(*kernels, s, name);
      run_fewer_channels<float>(*kernels, s, name);
      run_fewer_channels<double>(*kernels, s, name);
      for (int64_t width : {1, 20, 64}) {
        for (const auto& [packed, biased] : key_layouts()) {
          run_attention<float>(*kernels, s, width, Keys<float>(s.batch, 2, 33, packed, biased), name);
          run_attention<double>(*kernels, s, width, Keys<double>(s.batch, 2, 5, packed, biased), name);
        }
      }
    }
  }
  return test::report("cpu kernels");
}
