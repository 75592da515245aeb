// SPDX-License-Identifier: Apache-2.0
// The op `feature` on a CPU, rows over threads.
#include "feature.h"

namespace kdengine {
namespace {

template <typename Number>
struct OneLane {
  using R = Number;
  int64_t first() const { return 0; }
  int64_t step() const { return 1; }
  R sum(R x) const { return x; }
};

// f(element of the student, element of the teacher, real number)
template <typename F>
void with_elements(const Matrix& student, const Matrix& teacher, F&& f) {
  if (student.dtype == Dtype::f64 && teacher.dtype == Dtype::f64)
    return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr), double());
  with_element("feature", student, [&](auto* s) {
    with_element("feature", teacher, [&](auto* t) { f(s, t, float()); });
  });
}

template <typename S, typename T, typename R>
Pair<S, T, OneLane<R>, 0> pair_of(const Matrix& student, const Matrix& teacher, int64_t row) {
  return {static_cast<const S*>(student.data) + row * student.stride,
          static_cast<const T*>(teacher.data) + row * teacher.stride,
          student.cols,
          false,
          {}};
}

}  // namespace

void feature_forward(const Matrix& student, const Matrix& teacher, const Matrix& distance,
                     const Matrix& unit, bool normalize, Cpu cpu) {
  check_feature(student, teacher, distance);
  if (!is_absent(unit)) check_like(student, "unit rows", unit);
  with_elements(student, teacher, [&](auto* s, auto* t, auto number) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(t)>;
    using R = decltype(number);
    S* const units = is_absent(unit) ? nullptr : static_cast<S*>(unit.data);
#pragma omp parallel for num_threads(cpu.threads)
    for (int64_t row = 0; row < student.rows; ++row)
      static_cast<R*>(distance.data)[row] =
          row_distance(pair_of<S, T, R>(student, teacher, row), normalize,
                       row_of(units, row, unit.stride), false);
  });
}

void feature_backward(const Matrix& student, const Matrix& teacher, const Matrix& grad,
                      const Matrix& grad_unit, const Matrix& out, bool normalize, Cpu cpu) {
  check_feature(student, teacher, grad);
  if (!is_absent(grad_unit)) check_like(student, "unit rows", grad_unit);
  check_like(student, "a gradient", out);
  with_elements(student, teacher, [&](auto* s, auto* t, auto number) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(t)>;
    using R = decltype(number);
    const S* const more = is_absent(grad_unit) ? nullptr : static_cast<const S*>(grad_unit.data);
#pragma omp parallel for num_threads(cpu.threads)
    for (int64_t row = 0; row < student.rows; ++row)
      row_gradient(pair_of<S, T, R>(student, teacher, row), static_cast<const R*>(grad.data)[row],
                   row_of(more, row, grad_unit.stride), normalize,
                   static_cast<S*>(out.data) + row * out.stride, false);
  });
}

}  // namespace kdengine
