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

}  // namespace

void feature_forward(const Matrices& students, const Matrices& teachers, const Matrix& distance,
                     const Matrices& units, bool normalize, Cpu cpu) {
  const Towers a = unpack_towers(students, teachers, distance, units, {}, normalize);
  with_elements(students[0], teachers[0], [&](auto* s, auto* t, auto number) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(t)>;
    using R = decltype(number);
#pragma omp parallel for collapse(2) num_threads(cpu.threads)
    for (int i = 0; i < a.count; ++i)
      for (int64_t row = 0; row < distance.cols; ++row)
        row_of<R>(distance, i)[row] = row_distance(pair_of<S, T, 0>(a, i, row, OneLane<R>()),
                                                   normalize, row_of<S>(a.at[i].unit, row));
  });
}

void feature_backward(const Matrices& students, const Matrices& teachers, const Matrix& grad,
                      const Matrices& grad_units, const Matrices& outs, bool normalize, Cpu cpu) {
  const Towers a = unpack_towers(students, teachers, grad, grad_units, outs, normalize);
  with_elements(students[0], teachers[0], [&](auto* s, auto* t, auto number) {
    using S = std::remove_pointer_t<decltype(s)>;
    using T = std::remove_pointer_t<decltype(t)>;
    using R = decltype(number);
#pragma omp parallel for collapse(2) num_threads(cpu.threads)
    for (int i = 0; i < a.count; ++i)
      for (int64_t row = 0; row < grad.cols; ++row)
        row_gradient(pair_of<S, T, 0>(a, i, row, OneLane<R>()), row_of<const R>(grad, i)[row],
                     row_of<const S>(a.at[i].unit, row), normalize, row_of<S>(a.at[i].out, row));
  });
}

}  // namespace kdengine
