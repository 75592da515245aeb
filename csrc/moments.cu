// SPDX-License-Identifier: Apache-2.0
// The op `moments` on a GPU: 32 lanes of rows and eight pieces of columns a block; one launch
// where a chunk holds all rows, else a second one that merges the chunks.
#include "common.cuh"
#include "moments.h"

namespace kdengine {
namespace {

constexpr int kPieces = 8;  // of eight columns: of 16 bits they fill a line of 128 bytes
constexpr int kThreads = kMomentLanes * kPieces;
// 17 floats each, so that neighbours meet no conflict of banks
using Shared = Moments<float>[kMomentLanes][kPieces];

struct Place {
  int64_t piece;
  int lane, slot;
};

__device__ Place place() {
  const int slot = threadIdx.x % kPieces;
  return {int64_t(blockIdx.x) * kPieces + slot, static_cast<int>(threadIdx.x) / kPieces, slot};
}

// Lane 0 has the whole at the end. All threads of a block call it.
__device__ void merge_lanes(Moments<float>& mine, Place at, Shared& shared) {
  KD_UNROLL
  for (int apart = kMomentLanes / 2; apart > 0; apart /= 2) {
    if (at.lane >= apart && at.lane < 2 * apart) shared[at.lane][at.slot] = mine;
    __syncthreads();
    if (at.lane < apart) merge(mine, shared[at.lane + apart][at.slot]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) moments_kernel(const __grid_constant__ MomentsOf a) {
  __shared__ Shared shared;
  const Place at = place();
  const int side = blockIdx.z;
  Moments<float> mine = a.of_rows<T, float>(side, blockIdx.y, at.piece, at.lane);
  merge_lanes(mine, at, shared);
  if (at.lane > 0) return;
  if (a.chunks > 1) {
    a.put_part(side, blockIdx.y, at.piece, mine);
  } else {
    a.put(side, at.piece, mine);
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    moments_merge_kernel(const __grid_constant__ MomentsOf a) {
  __shared__ Shared shared;
  const Place at = place();
  Moments<float> mine = a.of_parts<float>(blockIdx.z, at.piece, at.lane);
  merge_lanes(mine, at, shared);
  if (at.lane == 0) a.put(blockIdx.z, at.piece, mine);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    moments_gradient_kernel(const __grid_constant__ MomentsGradient a) {
  const Place at = place();
  a.rows<T, float>(blockIdx.y, at.piece, at.lane);
}

dim3 blocks(int64_t cols, int64_t chunks, int sides) {
  const int64_t of_pieces = (num_pieces(cols) + kPieces - 1) / kPieces;
  expect(chunks < 1 << 16, "moments: expected fewer than 2^24 rows; ", chunks, " chunks of ",
         kChunk, " came");
  return dim3(static_cast<unsigned>(of_pieces), static_cast<unsigned>(chunks), sides);
}

}  // namespace

void moments_forward(const Matrices& sides, const Matrix& parts, const Matrix& out, Cuda cuda) {
  const MomentsOf a = unpack_moments(sides, parts, out);
  const Matrix& x = sides[0];
  with_element("moments", x, [&](auto* element) {
    launch("moments.cu", x, moments_kernel<std::remove_pointer_t<decltype(element)>>,
           blocks(a.cols, a.chunks, 2), kThreads, 0, cuda, a);
  });
  if (a.chunks > 1)
    launch("moments.cu", x, moments_merge_kernel, blocks(a.cols, 1, 2), kThreads, 0, cuda, a);
}

void moments_backward(const Matrix& student, const Matrix& mean, const Matrix& grad,
                      const Matrix& out, Cuda cuda) {
  const MomentsGradient a = unpack_moments_gradient(student, mean, grad, out);
  with_element("moments", student, [&](auto* element) {
    launch("moments.cu", student, moments_gradient_kernel<std::remove_pointer_t<decltype(element)>>,
           blocks(student.cols, num_chunks(student.rows), 1), kThreads, 0, cuda, a);
  });
}

}  // namespace kdengine
