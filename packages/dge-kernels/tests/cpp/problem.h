// A small batch with everything the kernels need, its memory sized exactly, so that a sanitizer sees each step
// outside it; and the expected results, computed the plain way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/kernel_args.h"

namespace test {

using namespace dge;

template <class T>
constexpr Type type_of = sizeof(T) == 8 ? Type::f64 : Type::f32;

struct Setting {
  int64_t batch, height, width, prefix;
  std::vector<int32_t> splits;
  int64_t channels;

  std::string name() const {
    return std::to_string(batch) + " images of " + std::to_string(height) + " x " + std::to_string(width) + ", " +
           std::to_string(channels) + " channels, " + std::to_string(splits.size()) + " splits";
  }
};

inline std::vector<Setting> settings() {
  return {{2, 8, 8, 1, {4, 2, 1}, 32},     {3, 7, 9, 2, {4, 2, 1}, 13}, {1, 1, 1, 0, {4, 2, 1}, 4},
          {2, 5, 17, 0, {8, 4, 2, 1}, 40}, {2, 6, 6, 1, {1, 2}, 600},   {1, 3, 3, 3, {1}, 1}};
}

template <class T>
std::vector<T> random_numbers(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> numbers(count);
  for (T& number : numbers) number = T(normal(generator));
  return numbers;
}

// The plan of a random choice, written out region by region from the definition.
struct Plan {
  Grid grid;
  PlanArgs args;
  std::vector<int64_t> choice;
  std::vector<Patch> patches;
  std::vector<int32_t> ends{0};

  explicit Plan(const Setting& s) : grid{s.height, s.width, s.prefix}, args{} {
    int32_t size = 0;
    for (int32_t split : s.splits) size = split > size ? split : size;
    const int64_t rows = ceil_div(s.height, size), cols = ceil_div(s.width, size);
    args.type = Index::i64;
    args.batch = s.batch;
    args.regions = rows * cols;
    args.size = size;
    args.grid = grid;
    args.splits = static_cast<int32_t>(s.splits.size());
    for (size_t i = 0; i < s.splits.size(); ++i) args.sides[i] = size / s.splits[i];
    std::mt19937 generator(7);
    for (int64_t image = 0; image < s.batch; ++image) {
      for (int32_t t = 0; t < s.prefix; ++t) patches.push_back({int32_t(image), -1 - t, 0, 1});
      for (int64_t r = 0; r < rows * cols; ++r) {
        choice.push_back(generator() % s.splits.size());
        const int32_t side = args.sides[choice.back()];
        for (int64_t y = r / cols * size; y < (r / cols + 1) * size; y += side) {
          for (int64_t x = r % cols * size; x < (r % cols + 1) * size; x += side) {
            if (y < s.height && x < s.width) patches.push_back({int32_t(image), int32_t(y), int32_t(x), side});
          }
        }
      }
      ends.push_back(static_cast<int32_t>(patches.size()));
    }
    args.choice = choice.data();
  }

  int64_t tokens() const { return grid.prefix + grid.height * grid.width; }

  // The tokens that a patch stands for, within its image.
  std::vector<int64_t> tokens_of(const Patch& patch) const {
    if (patch.y < 0) return {-1 - int64_t(patch.y)};
    std::vector<int64_t> found;
    for (int64_t y = patch.y; y < patch.y + patch.side && y < grid.height; ++y) {
      for (int64_t x = patch.x; x < patch.x + patch.side && x < grid.width; ++x) {
        found.push_back(grid.prefix + y * grid.width + x);
      }
    }
    return found;
  }
};

// [Q, C] means or sums of x [B, N, C].
template <class T>
std::vector<double> expected_gather(const Plan& plan, const std::vector<T>& x, int64_t channels, bool mean) {
  std::vector<double> out(plan.patches.size() * channels, 0.0);
  for (size_t q = 0; q < plan.patches.size(); ++q) {
    const auto tokens = plan.tokens_of(plan.patches[q]);
    for (int64_t token : tokens) {
      for (int64_t c = 0; c < channels; ++c) {
        const double value = x[(plan.patches[q].image * plan.tokens() + token) * channels + c];
        out[q * channels + c] += mean ? value / double(tokens.size()) : value;
      }
    }
  }
  return out;
}

// residual [B, N, C] + delta [Q, C], over the patch's tokens where `mean`.
template <class T>
std::vector<double> expected_scatter(const Plan& plan, const std::vector<T>& delta, const std::vector<T>* residual,
                                     int64_t batch, int64_t channels, bool mean) {
  std::vector<double> out(batch * plan.tokens() * channels, 0.0);
  if (residual) out.assign(residual->begin(), residual->end());
  for (size_t q = 0; q < plan.patches.size(); ++q) {
    const auto tokens = plan.tokens_of(plan.patches[q]);
    for (int64_t token : tokens) {
      for (int64_t c = 0; c < channels; ++c) {
        const double value = delta[q * channels + c];
        out[(plan.patches[q].image * plan.tokens() + token) * channels + c] +=
            mean ? value / double(tokens.size()) : value;
      }
    }
  }
  return out;
}

// The keys of a batch: `longest` of each image, or packed, with the second image's part empty; with a bias or without.
// Of the biases every fifth is -inf, and all of the third image.
template <class T>
struct Keys {
  int64_t heads, longest;
  bool packed;
  std::vector<int32_t> ends{0};
  std::vector<T> bias;

  Keys(int64_t batch, int64_t h, int64_t n, bool is_packed, bool biased) : heads(h), longest(n), packed(is_packed) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t count = !packed ? n : b == 1 ? 0 : n - b;
      ends.push_back(static_cast<int32_t>(ends.back() + count));
    }
    if (!biased) return;
    bias = random_numbers<T>(rows() * heads, 9);
    for (size_t i = 0; i < bias.size(); ++i) {
      if (i % 5 == 3 || (batch > 2 && int64_t(i) >= ends[2] * heads && int64_t(i) < ends[3] * heads))
        bias[i] = -INFINITY;
    }
  }

  int64_t rows() const { return ends.back(); }
  const int32_t* packed_ends() const { return packed ? ends.data() : nullptr; }
  Heads view(const std::vector<T>& data, int64_t width) const {
    return {data.data(), packed ? 0 : longest * heads * width, heads * width, width};
  }
  Heads bias_view() const { return bias.empty() ? Heads{} : view(bias, 1); }
  std::string name() const {
    return std::to_string(longest) + (packed ? " packed" : "") + (bias.empty() ? " keys" : " biased keys");
  }
};

// Packed or not, with a bias or not.
inline std::vector<std::pair<bool, bool>> key_layouts() {
  return {{false, false}, {false, true}, {true, false}, {true, true}};
}

// -inf, the logsumexp of nothing, as a number that can be compared.
template <class T>
std::vector<T> comparable(std::vector<T> numbers) {
  for (T& number : numbers) number = number == -std::numeric_limits<T>::infinity() ? T(-1) : number;
  return numbers;
}

// Attention and its gradients in float64, from the definition: softmax(scale · q kᵀ + bias) v per image and head.
struct Attention {
  int64_t heads, width;
  double scale;
  std::vector<double> out, logsumexp, grad_q, grad_k, grad_v, grad_bias;

  template <class T>
  Attention(const Plan& plan, int64_t h, int64_t d, const Keys<T>& keys, const std::vector<T>& q,
            const std::vector<T>& k, const std::vector<T>& v, const std::vector<T>& grad)
      : heads(h),
        width(d),
        scale(0.3),
        out(q.size()),
        logsumexp(q.size() / d),
        grad_q(q.size()),
        grad_k(k.size()),
        grad_v(v.size()),
        grad_bias(keys.bias.size()) {
    const int64_t images = static_cast<int64_t>(plan.ends.size()) - 1;
    for (int64_t b = 0; b < images; ++b) {
      for (int64_t query = plan.ends[b]; query < plan.ends[b + 1]; ++query) {
        for (int64_t head = 0; head < h; ++head) one(b, query * h + head, head, keys, q, k, v, grad);
      }
    }
  }

 private:
  template <class T>
  void one(int64_t b, int64_t at, int64_t head, const Keys<T>& all, const std::vector<T>& q, const std::vector<T>& k,
           const std::vector<T>& v, const std::vector<T>& grad) {
    const int64_t keys = all.ends[b + 1] - all.ends[b];
    std::vector<double> p(keys), dp(keys);
    double top = -std::numeric_limits<double>::infinity(), total = 0, mean = 0;
    const auto row = [&](int64_t n) { return ((all.ends[b] + n) * heads + head) * width; };
    for (int64_t n = 0; n < keys; ++n) {
      p[n] = all.bias.empty() ? 0.0 : double(all.bias[row(n) / width]);
      for (int64_t c = 0; c < width; ++c) p[n] += scale * double(q[at * width + c]) * double(k[row(n) + c]);
      top = std::fmax(top, p[n]);
    }
    if (std::isinf(top)) {
      logsumexp[at] = top;
      return;
    }
    for (double& value : p) total += value = std::exp(value - top);
    logsumexp[at] = top + std::log(total);
    for (int64_t n = 0; n < keys; ++n) {
      p[n] /= total;
      for (int64_t c = 0; c < width; ++c) {
        out[at * width + c] += p[n] * double(v[row(n) + c]);
        dp[n] += double(grad[at * width + c]) * double(v[row(n) + c]);
      }
      mean += p[n] * dp[n];
    }
    for (int64_t n = 0; n < keys; ++n) {
      const double slope = p[n] * (dp[n] - mean) * scale;
      if (!all.bias.empty()) grad_bias[row(n) / width] += p[n] * (dp[n] - mean);
      for (int64_t c = 0; c < width; ++c) {
        grad_q[at * width + c] += slope * double(k[row(n) + c]);
        grad_k[row(n) + c] += slope * double(q[at * width + c]);
        grad_v[row(n) + c] += p[n] * double(grad[at * width + c]);
      }
    }
  }
};

// The most probable split of each region, and how far ahead of the next it is.
template <class T>
std::vector<int> expected_route(const Plan& plan, const std::vector<T>& x, const std::vector<T>& weight,
                                const std::vector<T>& bias, int64_t channels) {
  std::vector<int> choice;
  const int64_t cols = ceil_div(plan.grid.width, plan.args.size);
  for (int64_t i = 0; i < plan.args.batch * plan.args.regions; ++i) {
    const int64_t r = i % plan.args.regions;
    const Patch region{int32_t(i / plan.args.regions), int32_t(r / cols * plan.args.size),
                       int32_t(r % cols * plan.args.size), int32_t(plan.args.size)};
    const auto tokens = plan.tokens_of(region);
    std::vector<double> logits(bias.begin(), bias.end());
    for (size_t s = 0; s < logits.size(); ++s) {
      for (int64_t token : tokens) {
        for (int64_t c = 0; c < channels; ++c) {
          logits[s] += double(weight[s * channels + c]) *
                       double(x[(region.image * plan.tokens() + token) * channels + c]) / double(tokens.size());
        }
      }
    }
    choice.push_back(int(std::max_element(logits.begin(), logits.end()) - logits.begin()));
  }
  return choice;
}

}  // namespace test
