// SPDX-License-Identifier: Apache-2.0
// The op `similarity` on a GPU: a tile a block.
#include "block.cuh"
#include "similarity_dispatch.h"

namespace kdengine {
namespace {

// two blocks a multiprocessor where one accumulator, and no split of float, leave the registers
template <typename S, typename T>
constexpr int kBlocks = std::is_void_v<T> && sizeof(S) == 2 ? 2 : 1;

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<S, T>)
    statistics_kernel(const __grid_constant__ Statistics<float> a) {
  extern __shared__ __align__(128) char shared[];
  Block block;
  int row, col;
  tile_at(blockIdx.x, (a.rows + kTile - 1) / kTile, (a.cols + kTile - 1) / kTile, row, col);
  statistics_tile<S, T>(block, a, row, col, shared);
}

template <typename S, typename T, typename O>
__global__ void __launch_bounds__(kThreads, kBlocks<S, T>)
    gradient_kernel(const __grid_constant__ Gradient<float> a) {
  extern __shared__ __align__(128) char shared[];
  Block block;
  int row, col;
  tile_at(blockIdx.x, (a.rows + kTile - 1) / kTile, (a.cols + kTile - 1) / kTile, row, col);
  gradient_tile<S, T, O>(block, a, row, col, shared);
}

// 32 items a block, whose parts kGroups threads share; blockIdx.y is the side
__global__ void __launch_bounds__(kWarp* kGroups)
    finalise_kernel(const __grid_constant__ Finalise a) {
  __shared__ Sums<float> found[kGroups][kWarp];
  const int side = blockIdx.y, lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t item = int64_t(blockIdx.x) * kWarp + lane;
  const bool is_here = item < a.sides[side].items;
  if (is_here) found[group][lane] = a.group(side, item, group);
  __syncthreads();
  if (is_here && group == 0) a.finish(side, item, [&](int i) { return found[i][lane]; });
}

// A tile a block.
template <typename A>
void launch_tiles(void (*kernel)(A), const A& a, const Matrix& x, Cuda cuda) {
  const int64_t tiles = num_tiles(a.rows) * num_tiles(a.cols);
  expect(tiles < int64_t(1) << 31, "similarity: expected fewer tiles than 2^31; ", shape_of(x),
         " came");
  launch("similarity.cu", x, kernel, static_cast<unsigned>(tiles), kThreads, kSharedBytes, cuda, a);
}

}  // namespace

void similarity_statistics(const Matrices& logits, const Matrices& labels, const Matrices& parts,
                           const Matrices& outs, Cuda cuda) {
  const Statistics<float> a = unpack_statistics<float>(logits, labels, parts, outs);
  with_elements(logits, [&](auto* s, auto* t) {
    launch_tiles(
        statistics_kernel<std::remove_pointer_t<decltype(s)>, std::remove_pointer_t<decltype(t)>>,
        a, logits[0], cuda);
  });
}

void similarity_finalise(const Matrices& parts, const Matrices& outs, bool fresh, Cuda cuda) {
  const Finalise a = unpack_finalise(parts, outs, fresh);
  int64_t items = 0;
  for (const Side<float>& side : a.sides) items = std::max(items, side.items);
  const dim3 blocks(static_cast<unsigned>((items + kWarp - 1) / kWarp), 4);
  launch("similarity.cu", outs[0], finalise_kernel, blocks, kWarp * kGroups, 0, cuda, a);
}

void similarity_gradient(const Matrices& logits, const Matrices& labels, const Matrices& pulls,
                         const Matrix& residual, const Matrix& unit, const Matrix& out, Cuda cuda) {
  const Gradient<float> a = unpack_gradient<float>(logits, labels, pulls, residual, unit, out);
  with_strip(logits, out, [&](auto* s, auto* t, auto* o) {
    launch_tiles(
        gradient_kernel<std::remove_pointer_t<decltype(s)>, std::remove_pointer_t<decltype(t)>,
                        std::remove_pointer_t<decltype(o)>>,
        a, logits[0], cuda);
  });
}

}  // namespace kdengine
