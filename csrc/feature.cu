// SPDX-License-Identifier: Apache-2.0
// The op `feature` on a GPU: a warp a row, a tower a blockIdx.y.
#include "common.cuh"
#include "feature.h"

namespace kdengine {
namespace {

constexpr int kRows = 8;  // of a block
// pieces of eight elements that a lane keeps in registers: rows of up to 1024
constexpr int kKept = 4;
// blocks of a multiprocessor that registers leave room for
template <int KEPT>
constexpr int kBlocks = KEPT > 0 ? 2 : 4;

template <typename S, typename T, int KEPT>
__global__ void __launch_bounds__(kRows* kWarp, kBlocks<KEPT>)
    forward_kernel(const __grid_constant__ Towers a) {
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  const int tower = blockIdx.y;
  if (row >= a.per_row.cols) return;
  const auto pair = pair_of<S, T, KEPT>(a, tower, row, WarpLanes());
  const float found = row_distance(pair, a.normalize, row_of<S>(a.at[tower].unit, row));
  if (threadIdx.x % kWarp == 0) row_of<float>(a.per_row, tower)[row] = found;
}

template <typename S, typename T, int KEPT>
__global__ void __launch_bounds__(kRows* kWarp, kBlocks<KEPT>)
    backward_kernel(const __grid_constant__ Towers a) {
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  const int tower = blockIdx.y;
  if (row >= a.per_row.cols) return;
  const auto pair = pair_of<S, T, KEPT>(a, tower, row, WarpLanes());
  row_gradient(pair, row_of<const float>(a.per_row, tower)[row],
               row_of<const S>(a.at[tower].unit, row), a.normalize,
               row_of<S>(a.at[tower].out, row));
}

// f(element of the students, of the teachers, pieces kept)
template <typename F>
void with_kernel(const Towers& a, F&& f) {
  with_element("feature", a.at[0].student, [&](auto* s) {
    with_element("feature", a.at[0].teacher, [&](auto* t) {
      if (a.at[0].student.cols <= kKept * 8 * kWarp) {
        f(s, t, std::integral_constant<int, kKept>());
      } else {
        f(s, t, std::integral_constant<int, 0>());
      }
    });
  });
}

dim3 blocks(const Towers& a) {
  return dim3(static_cast<unsigned>((a.per_row.cols + kRows - 1) / kRows), a.count);
}

}  // namespace

void feature_forward(const Matrices& students, const Matrices& teachers, const Matrix& distance,
                     const Matrices& units, bool normalize, Cuda cuda) {
  const Towers a = unpack_towers(students, teachers, distance, units, {}, normalize);
  with_kernel(a, [&](auto* s, auto* t, auto kept) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(t)>;
    launch("feature.cu", students[0], forward_kernel<S, T, decltype(kept)::value>, blocks(a),
           kRows * kWarp, 0, cuda, a);
  });
}

void feature_backward(const Matrices& students, const Matrices& teachers, const Matrix& grad,
                      const Matrices& grad_units, const Matrices& outs, bool normalize, Cuda cuda) {
  const Towers a = unpack_towers(students, teachers, grad, grad_units, outs, normalize);
  with_kernel(a, [&](auto* s, auto* t, auto kept) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(t)>;
    launch("feature.cu", students[0], backward_kernel<S, T, decltype(kept)::value>, blocks(a),
           kRows * kWarp, 0, cuda, a);
  });
}

}  // namespace kdengine
