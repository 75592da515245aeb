// SPDX-License-Identifier: Apache-2.0
// A block of a GPU as one of its threads sees it; emulated.h is the same on the host.
#pragma once

#include "common.cuh"
#include "tile.h"

namespace kdengine {

struct Block {
  template <typename T>
  struct Own {
    T own;
    __device__ __forceinline__ T& operator[](int) { return own; }
    __device__ __forceinline__ const T& operator[](int) const { return own; }
  };

  template <typename F>
  KD_BLOCK void each(F&& f) {
    f(static_cast<int>(threadIdx.x));
  }

  KD_BLOCK void sync() { __syncthreads(); }

  template <typename F>
  KD_BLOCK bool any(F&& f) {
    return __syncthreads_or(f(static_cast<int>(threadIdx.x)));
  }

  KD_BLOCK void copy(char* to, const char* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared(to)), "l"(from),
                 "r"(is_there ? 16 : 0)
                 : "memory");
  }
  KD_BLOCK void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int LEFT>
  KD_BLOCK void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
  }

  template <typename From, typename To>
  KD_BLOCK void ldmatrix(From&& from, To&& to) {
    const int thread = static_cast<int>(threadIdx.x);
    Quad& x = to(thread);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x[0]), "=r"(x.x[1]), "=r"(x.x[2]), "=r"(x.x[3])
                 : "r"(shared(from(thread)))
                 : "memory");
  }

#define KD_MMA(shape, type)                                                           \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  template <typename S, typename C, typename A, typename E>
  KD_BLOCK void mma(C&& sum, A&& left, E&& right) {
    const int thread = static_cast<int>(threadIdx.x);
    float (&c)[4] = sum(thread);
    const uint32_t (&a)[4] = left(thread).x;
    const uint32_t* b = right(thread);
    if constexpr (std::is_same_v<S, Bf16>) {
      KD_MMA("m16n8k16", "bf16");
    } else if constexpr (std::is_same_v<S, Fp16>) {
      KD_MMA("m16n8k16", "f16");
    } else {
      KD_MMA("m16n8k8", "tf32");
    }
  }
#undef KD_MMA

  template <int MASK, typename X, typename Op>
  KD_BLOCK void combine(X&& x, Op&& op) {
    float& own = x(static_cast<int>(threadIdx.x));
    KD_UNROLL
    for (int bit = 1; bit < 32; bit *= 2)
      if (MASK & bit) own = op(own, __shfl_xor_sync(~0u, own, bit));
  }

 private:
  static __device__ __forceinline__ uint32_t shared(const void* x) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(x));
  }
};

}  // namespace kdengine
