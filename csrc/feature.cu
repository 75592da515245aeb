// SPDX-License-Identifier: Apache-2.0
// The op `feature` on a GPU: a warp a row.
#include "common.cuh"
#include "feature.h"

namespace kdengine {
namespace {

constexpr int kRows = 8;  // of a block
// pieces of eight elements that a lane keeps in registers: rows of up to 1024
constexpr int kKept = 4;

template <typename S, typename T, int KEPT>
__global__ void __launch_bounds__(kRows* kWarp)
    forward_kernel(const S* student, const T* teacher, float* distance, S* unit, int64_t rows,
                   int64_t width, int64_t student_stride, int64_t teacher_stride,
                   int64_t unit_stride, bool aligned, bool normalize) {
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (row >= rows) return;
  const Pair<S, T, WarpLanes, KEPT> pair(student + row * student_stride,
                                         teacher + row * teacher_stride, width, aligned, {});
  const float found = row_distance(pair, normalize, row_of(unit, row, unit_stride), aligned);
  if (threadIdx.x % kWarp == 0) distance[row] = found;
}

template <typename S, typename T, int KEPT>
__global__ void __launch_bounds__(kRows* kWarp)
    backward_kernel(const S* student, const T* teacher, const float* grad, const S* grad_unit,
                    S* out, int64_t rows, int64_t width, int64_t student_stride,
                    int64_t teacher_stride, int64_t grad_stride, int64_t out_stride, bool aligned,
                    bool normalize) {
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (row >= rows) return;
  const Pair<S, T, WarpLanes, KEPT> pair(student + row * student_stride,
                                         teacher + row * teacher_stride, width, aligned, {});
  row_gradient(pair, grad[row], row_of(grad_unit, row, grad_stride), normalize,
               out + row * out_stride, aligned);
}

// f(element of the student, of the teacher, pieces kept)
template <typename F>
void with_kernel(const Matrix& student, const Matrix& teacher, F&& f) {
  with_element("feature", student, [&](auto* s) {
    with_element("feature", teacher, [&](auto* t) {
      if (student.cols <= kKept * 8 * kWarp) {
        f(s, t, std::integral_constant<int, kKept>());
      } else {
        f(s, t, std::integral_constant<int, 0>());
      }
    });
  });
}

unsigned num_blocks(int64_t rows) { return static_cast<unsigned>((rows + kRows - 1) / kRows); }

}  // namespace

void feature_forward(const Matrix& student, const Matrix& teacher, const Matrix& distance,
                     const Matrix& unit, bool normalize, Cuda cuda) {
  check_feature(student, teacher, distance);
  if (!is_absent(unit)) check_like(student, "unit rows", unit);
  if (student.rows == 0) return;
  with_kernel(student, teacher, [&](auto* s, auto* t, auto kept) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(t)>;
    const bool aligned = is_aligned(student, sizeof(S)) && is_aligned(teacher, sizeof(T)) &&
                         (is_absent(unit) || is_aligned(unit, sizeof(S)));
    forward_kernel<S, T, decltype(kept)::value><<<num_blocks(student.rows), kRows * kWarp, 0,
                                                  reinterpret_cast<cudaStream_t>(cuda.stream)>>>(
        static_cast<const S*>(student.data), static_cast<const T*>(teacher.data),
        static_cast<float*>(distance.data), is_absent(unit) ? nullptr : static_cast<S*>(unit.data),
        student.rows, student.cols, student.stride, teacher.stride, unit.stride, aligned,
        normalize);
  });
  check_launch("feature", student);
}

void feature_backward(const Matrix& student, const Matrix& teacher, const Matrix& grad,
                      const Matrix& grad_unit, const Matrix& out, bool normalize, Cuda cuda) {
  check_feature(student, teacher, grad);
  if (!is_absent(grad_unit)) check_like(student, "unit rows", grad_unit);
  check_like(student, "a gradient", out);
  if (student.rows == 0) return;
  with_kernel(student, teacher, [&](auto* s, auto* t, auto kept) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(t)>;
    const bool aligned = is_aligned(student, sizeof(S)) && is_aligned(teacher, sizeof(T)) &&
                         is_aligned(out, sizeof(S)) &&
                         (is_absent(grad_unit) || is_aligned(grad_unit, sizeof(S)));
    backward_kernel<S, T, decltype(kept)::value><<<num_blocks(student.rows), kRows * kWarp, 0,
                                                   reinterpret_cast<cudaStream_t>(cuda.stream)>>>(
        static_cast<const S*>(student.data), static_cast<const T*>(teacher.data),
        static_cast<const float*>(grad.data),
        is_absent(grad_unit) ? nullptr : static_cast<const S*>(grad_unit.data),
        static_cast<S*>(out.data), student.rows, student.cols, student.stride, teacher.stride,
        grad_unit.stride, out.stride, aligned, normalize);
  });
  check_launch("feature", student);
}

}  // namespace kdengine
