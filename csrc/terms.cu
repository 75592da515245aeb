// SPDX-License-Identifier: Apache-2.0
// The op `terms` on a GPU: forward a block a side, which no other needs to be merged with, and so
// one launch; backward an item a thread.
#include "common.cuh"
#include "terms.h"

namespace kdengine {
namespace {

static_assert(kTermGroup == kWarp);
constexpr int kThreads = 256;  // of the backward

__device__ Losses<float> sum_warp(const Losses<float>& x) {
  const WarpLanes lanes;
  return {lanes.sum(x.hard), lanes.sum(x.soft), lanes.sum(x.entropy)};
}

__global__ void __launch_bounds__(kTermLanes) terms_kernel(const __grid_constant__ Terms a) {
  __shared__ Losses<float> groups[kTermGroup];
  const TermSide& side = a.sides[blockIdx.x];
  const int lane = threadIdx.x;
  const Losses<float> mine = sum_warp(side.of_lane<float>(lane));
  if (lane % kTermGroup == 0) groups[lane / kTermGroup] = mine;
  __syncthreads();
  if (lane >= kTermGroup) return;
  const Losses<float> sum = sum_warp(groups[lane]);
  if (lane == 0) side.put(sum, a.values, a.entropies);
}

__global__ void __launch_bounds__(kThreads, 4)
    terms_gradient_kernel(const __grid_constant__ Terms a) {
  const TermSide& side = a.sides[blockIdx.y];
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item < side.items) side.put_gradients<float>(item, a.values);
}

void check_float(const Matrix& x) {
  expect(x.dtype == Dtype::f32, "terms: expected float32 on a GPU; ", shape_of(x), " came");
}

}  // namespace

void terms_forward(const TermsOf& given, const Matrix& values, const Matrix& entropies, Cuda cuda) {
  check_float(values);
  const Terms a = unpack_terms(given, values, entropies, {});
  launch("terms.cu", a.longest(), terms_kernel, 2, kTermLanes, 0, cuda, a);
}

void terms_backward(const Matrix& grads, const TermsOf& given, const Matrices& outs, Cuda cuda) {
  check_float(grads);
  const Terms a = unpack_terms(given, grads, {}, outs);
  const Matrix& longest = a.longest();
  const dim3 blocks(static_cast<unsigned>((longest.cols + kThreads - 1) / kThreads), 2);
  launch("terms.cu", longest, terms_gradient_kernel, blocks, kThreads, 0, cuda, a);
}

}  // namespace kdengine
