// The smallest test framework that does: named checks, a count, an exit status.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace test {

inline int failures = 0;
inline int checks = 0;

inline void check(bool holds, const std::string& what) {
  ++checks;
  if (!holds) {
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

// Largest difference at most `tolerance` times the largest expected entry, or one; NaN never passes.
template <class A, class B>
void check_close(const std::vector<A>& actual, const std::vector<B>& expected, double tolerance,
                 const std::string& what) {
  check(actual.size() == expected.size(), what + ": sizes differ");
  double unit = 1, worst = 0;
  for (size_t i = 0; i < actual.size() && i < expected.size(); ++i) {
    unit = std::fmax(unit, std::fabs(double(expected[i])));
    const double difference = std::fabs(double(actual[i]) - double(expected[i]));
    if (!(difference <= worst)) worst = difference;  // takes a NaN too
  }
  check(worst <= tolerance * unit, what + ": off by " + std::to_string(worst));
}

inline int report(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace test
