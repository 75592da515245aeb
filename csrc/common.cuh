// SPDX-License-Identifier: Apache-2.0
// What kernels share: a warp as the lanes of a row, and launches that are checked.
#pragma once

#include <cuda_runtime.h>

#include "matrix.h"

namespace kdengine {

constexpr int kWarp = 32;

struct WarpLanes {
  using R = float;
  __device__ int64_t first() const { return threadIdx.x % kWarp; }
  __device__ int64_t step() const { return kWarp; }
  // in an order that is the same in every run
  __device__ float sum(float x) const {
    KD_UNROLL
    for (int apart = kWarp / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
    return x;
  }
};

inline bool is_aligned(const Matrix& x, int64_t itemsize) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * itemsize % 16 == 0;
}

// Raises RuntimeError in Python where the last launch failed.
inline void check_launch(const char* who, const Matrix& x) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(who) + ": a CUDA kernel over " + shape_of(x) +
                           " could not be launched (" + cudaGetErrorString(error) +
                           "); use backend='triton' or 'torch'");
}

}  // namespace kdengine
