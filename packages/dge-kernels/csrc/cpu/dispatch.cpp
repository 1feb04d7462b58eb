// Which compilation of kernels.cpp this machine gets.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define DGE_DECLARE(isa)                \
  namespace isa {                       \
  extern const dge::cpu::Kernels table; \
  }

DGE_DECLARE(baseline)
#if defined(DGE_X86)
DGE_DECLARE(avx2)
DGE_DECLARE(avx512)
#endif

namespace dge::cpu {

const Kernels& kernels() {
  // DGE_CPU_CAPABILITY, a set's name, takes that one, or the baseline where this machine lacks it (Python refuses
  // that).
  static const Kernels& best = []() -> const Kernels& {
#if defined(DGE_X86)
    const char* capability = std::getenv("DGE_CPU_CAPABILITY");
    const auto wanted = [&](const char* name) { return !capability || !std::strcmp(capability, name); };
    __builtin_cpu_init();
    if (wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
      return avx512::table;
    }
    if (wanted("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return avx2::table;
    }
#endif
    return baseline::table;
  }();
  return best;
}

}  // namespace dge::cpu

// For build facts, without torch: the name of the instruction set in use.
extern "C" __attribute__((visibility("default"))) const char* dge_kernels_cpu_instruction_set() {
  return dge::cpu::kernels().name;
}
