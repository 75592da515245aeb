// SPDX-License-Identifier: Apache-2.0
// What kernels share: a warp as the lanes of a row, and how a kernel is launched.
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

// Raises RuntimeError in Python, which names the file, the shape and the reason.
inline void check(cudaError_t error, const char* file, const Matrix& x) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch is not blamed
  throw std::runtime_error(std::string(file) + ": a CUDA kernel over " + shape_of(x) +
                           " could not be launched (" + cudaGetErrorString(error) +
                           "); use backend='triton' or 'torch'");
}

// A device, and at the end the one before. This library has a CUDA runtime of its own, which is
// told here.
class OnDevice {
 public:
  OnDevice(int device, const char* file, const Matrix& x) {
    check(cudaGetDevice(&before_), file, x);
    check(cudaSetDevice(device), file, x);
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Every launch: on the stream and its device, with the shared memory it asks for, and checked.
// Without blocks it does nothing.
template <typename A>
void launch(const char* file, const Matrix& x, void (*kernel)(A), dim3 blocks, int threads,
            int shared_bytes, Cuda cuda, const A& a) {
  if (blocks.x == 0) return;
  const OnDevice guard(cuda.device, file, x);
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          file, x);
  kernel<<<blocks, threads, shared_bytes, reinterpret_cast<cudaStream_t>(cuda.stream)>>>(a);
  check(cudaGetLastError(), file, x);
}

}  // namespace kdengine
