// A small batch with everything the kernels need, its memory sized exactly, so that a sanitizer sees each step
// outside it; and the expected results, computed the plain way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/problems.h"

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

// Attention and its gradients in float64, from the definition: softmax(scale · q kᵀ) v per image and head.
struct Attention {
  int64_t heads, width, keys;
  double scale;
  std::vector<double> out, logsumexp, grad_q, grad_k, grad_v;

  template <class T>
  Attention(const Plan& plan, int64_t h, int64_t d, int64_t n, const std::vector<T>& q, const std::vector<T>& k,
            const std::vector<T>& v, const std::vector<T>& grad)
      : heads(h),
        width(d),
        keys(n),
        scale(0.3),
        out(q.size()),
        logsumexp(q.size() / d),
        grad_q(q.size()),
        grad_k(k.size()),
        grad_v(v.size()) {
    const int64_t images = static_cast<int64_t>(plan.ends.size()) - 1;
    for (int64_t b = 0; b < images; ++b) {
      for (int64_t query = plan.ends[b]; query < plan.ends[b + 1]; ++query) {
        for (int64_t head = 0; head < h; ++head) one(b, query * h + head, head, q, k, v, grad);
      }
    }
  }

 private:
  template <class T>
  void one(int64_t b, int64_t at, int64_t head, const std::vector<T>& q, const std::vector<T>& k,
           const std::vector<T>& v, const std::vector<T>& grad) {
    std::vector<double> p(keys), dp(keys);
    double top = -std::numeric_limits<double>::infinity(), total = 0, mean = 0;
    const auto row = [&](int64_t n) { return ((b * keys + n) * heads + head) * width; };
    for (int64_t n = 0; n < keys; ++n) {
      for (int64_t c = 0; c < width; ++c) p[n] += scale * double(q[at * width + c]) * double(k[row(n) + c]);
      top = std::fmax(top, p[n]);
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
