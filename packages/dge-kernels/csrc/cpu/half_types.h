// Storage types and their accumulators. Included by kernels.cpp alone.
#pragma once

#include "kernels.h"

namespace DGE_ISA {

using namespace dge;
using namespace dge::cpu;

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class To, class From>
DGE_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &value, sizeof(out));
  return out;
}

DGE_INLINE float load(float value) { return value; }
DGE_INLINE double load(double value) { return value; }
DGE_INLINE float load(BFloat value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

// Exponent and mantissa moved to their places in a float are the value times 2^-112, subnormals included;
// infinities and NaN need the float's own largest exponent instead.
DGE_INLINE float load(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  return bits_as<float>(sign | ((value.bits & 0x7c00) == 0x7c00 ? special : finite));
}

DGE_INLINE void store(float* out, float value) { *out = value; }
DGE_INLINE void store(double* out, double value) { *out = value; }

// Round to nearest, ties to even; a NaN keeps its sign and stays quiet.
DGE_INLINE void store(BFloat* out, float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t nan = bits | 0x00400000u;
  out->bits = static_cast<uint16_t>((value != value ? nan : rounded) >> 16);
}

DGE_INLINE void store(Half* out, float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 a half counts in steps of 2^-24, the spacing of floats in [0.5, 1): the addition rounds.
  const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// Calls body with a value of the storage type that `type` names.
template <class Body>
DGE_INLINE void with_type(Type type, const Body& body) {
  switch (type) {
    case Type::f32: return body(float{});
    case Type::f64: return body(double{});
    case Type::f16: return body(Half{});
    case Type::bf16: return body(BFloat{});
  }
}

}  // namespace DGE_ISA
