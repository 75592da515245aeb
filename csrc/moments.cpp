// SPDX-License-Identifier: Apache-2.0
// The op `moments` on a CPU: the GPU's lanes one after another, pieces of columns over threads.
#include "moments.h"

namespace kdengine {
namespace {

// f(element, real number)
template <typename F>
void with_elements(const Matrix& x, F&& f) {
  if (x.dtype == Dtype::f64) return f(static_cast<double*>(nullptr), double());
  with_element("moments", x, [&](auto* element) { f(element, float()); });
}

// of_lane(lane) of all lanes, merged in the order of the GPU's
template <typename R, typename F>
Moments<R> merged(F&& of_lane) {
  Moments<R> found[kMomentLanes];
  for (int lane = 0; lane < kMomentLanes; ++lane) found[lane] = of_lane(lane);
  for (int apart = kMomentLanes / 2; apart > 0; apart /= 2)
    for (int lane = 0; lane < apart; ++lane) merge(found[lane], found[lane + apart]);
  return found[0];
}

}  // namespace

void moments_forward(const Matrices& sides, const Matrix& parts, const Matrix& out, Cpu cpu) {
  const MomentsOf a = unpack_moments(sides, parts, out);
  const int64_t pieces = num_pieces(a.cols);
  with_elements(sides[0], [&](auto* element, auto number) {
    using T = std::remove_pointer_t<decltype(element)>;
    using R = decltype(number);
#pragma omp parallel for collapse(2) num_threads(cpu.threads)
    for (int side = 0; side < 2; ++side) {
      for (int64_t piece = 0; piece < pieces; ++piece) {
        for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
          const auto found =
              merged<R>([&](int lane) { return a.of_rows<T, R>(side, chunk, piece, lane); });
          a.chunks > 1 ? a.put_part(side, chunk, piece, found) : a.put(side, piece, found);
        }
        if (a.chunks > 1)
          a.put(side, piece, merged<R>([&](int lane) { return a.of_parts<R>(side, piece, lane); }));
      }
    }
  });
}

void moments_backward(const Matrix& student, const Matrix& mean, const Matrix& grad,
                      const Matrix& out, Cpu cpu) {
  const MomentsGradient a = unpack_moments_gradient(student, mean, grad, out);
  const int64_t chunks = num_chunks(student.rows), pieces = num_pieces(student.cols);
  with_elements(student, [&](auto* element, auto number) {
    using T = std::remove_pointer_t<decltype(element)>;
    using R = decltype(number);
#pragma omp parallel for collapse(2) num_threads(cpu.threads)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t piece = 0; piece < pieces; ++piece)
        for (int lane = 0; lane < kMomentLanes; ++lane) a.rows<T, R>(chunk, piece, lane);
  });
}

}  // namespace kdengine
