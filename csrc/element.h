// SPDX-License-Identifier: Apache-2.0
// Elements of a matrix, on host and device: float, double, and two of 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KD_HD __host__ __device__ __forceinline__
#define KD_UNROLL _Pragma("unroll")
#else
#define KD_HD inline
#define KD_UNROLL _Pragma("GCC unroll 8")
#endif

namespace kdengine {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// What sums of an element type are kept in.
template <typename T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <typename T>
using Real = typename RealOf<T>::type;

template <typename To, typename From>
KD_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

KD_HD double to_real(double x) { return x; }
KD_HD float to_real(float x) { return x; }
KD_HD float to_real(Bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
KD_HD float to_real(Fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // rebased by a product, which makes subnormal numbers normal: 2^(127 - 15)
  const float size = bit_cast<float>(rest << 13) * 0x1p112f;
  const uint32_t special = rest >= 0x7c00u ? 0x7f800000u : 0;  // infinite, or not a number
  return bit_cast<float>(sign | special | bit_cast<uint32_t>(size));
#endif
}

// The nearest element, of two as near the even one.
KD_HD void from_real(double x, double& out) { out = x; }
KD_HD void from_real(float x, float& out) { out = x; }
KD_HD void from_real(float x, Bf16& out) {
  uint32_t bits = bit_cast<uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  bits += 0x7fffu + ((bits >> 16) & 1);
  out.bits = is_nan ? 0x7fffu : static_cast<uint16_t>(bits >> 16);
}
KD_HD void from_real(float x, Fp16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  const float size = bit_cast<float>(bits & 0x7fffffffu);
  uint32_t half;
  if (!(size < 65520.0f)) {
    half = size > 0 ? 0x7c00u : 0x7e00u;  // too large, or not a number
  } else if (size < 0x1p-14f) {
    // subnormal: the last place of 0.5 is 2^-24, and adding rounds to it
    half = bit_cast<uint32_t>(size + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t whole = bit_cast<uint32_t>(size) - (112u << 23);
    half = (whole + 0xfffu + ((whole >> 13) & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// `count` (at most 8) neighbours as real numbers, 0 behind them; `aligned` to 16 bytes.
template <typename T, typename R>
KD_HD void load8(const T* from, int count, bool aligned, R (&to)[8]) {
  alignas(16) T piece[8];
#ifdef __CUDA_ARCH__
  if (aligned && count == 8) {
    KD_UNROLL
    for (unsigned i = 0; i < sizeof piece / 16; ++i)
      reinterpret_cast<uint4*>(piece)[i] = reinterpret_cast<const uint4*>(from)[i];
    KD_UNROLL
    for (int i = 0; i < 8; ++i) to[i] = to_real(piece[i]);
    return;
  }
#else
  (void)aligned;
  if (count == 8) {
    memcpy(piece, from, sizeof piece);
    for (int i = 0; i < 8; ++i) to[i] = to_real(piece[i]);
    return;
  }
#endif
  KD_UNROLL
  for (int i = 0; i < 8; ++i) to[i] = i < count ? to_real(from[i]) : R(0);
}

template <typename T, typename R>
KD_HD void store8(T* to, int count, bool aligned, const R (&from)[8]) {
  alignas(16) T piece[8];
  KD_UNROLL
  for (int i = 0; i < 8; ++i) from_real(from[i], piece[i]);
#ifdef __CUDA_ARCH__
  if (aligned && count == 8) {
    KD_UNROLL
    for (unsigned i = 0; i < sizeof piece / 16; ++i)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(piece)[i];
    return;
  }
#else
  (void)aligned;
#endif
  KD_UNROLL
  for (int i = 0; i < 8; ++i)
    if (i < count) to[i] = piece[i];
}

}  // namespace kdengine
