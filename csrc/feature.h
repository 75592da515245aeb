// SPDX-License-Identifier: Apache-2.0
// The op `feature`: squared distances of rows, normalised on the way, and their gradient.
//
//   distance_i = ||x_i - u_i||^2,   x = student / max(||student||, 1e-12), u likewise
//
// With g the upstream gradient of distance_i and w that of x_i, p = 2 g (x - u) + w:
//
//   d student_i = (p - x (x . p)) / ||student_i||
//
// One pass over memory each way. What a row's lanes do stands here once: 32 of them on the device
// (a warp), one on the host.
#pragma once

#include <cmath>

#include "matrix.h"

namespace kdengine {

// `unit`, the x_i, and `grad_unit`, the w, have the student's type and shape, or no rows at all.
void feature_forward(const Matrix& student, const Matrix& teacher, const Matrix& distance,
                     const Matrix& unit, bool normalize, Cpu cpu);
void feature_backward(const Matrix& student, const Matrix& teacher, const Matrix& grad,
                      const Matrix& grad_unit, const Matrix& out, bool normalize, Cpu cpu);
void feature_forward(const Matrix& student, const Matrix& teacher, const Matrix& distance,
                     const Matrix& unit, bool normalize, Cuda cuda);
void feature_backward(const Matrix& student, const Matrix& teacher, const Matrix& grad,
                      const Matrix& grad_unit, const Matrix& out, bool normalize, Cuda cuda);

// student, teacher: [B, E]; per_row, one number a row: [1, B] float32 (float64 on the host)
inline void check_feature(const Matrix& student, const Matrix& teacher, const Matrix& per_row) {
  expect(student.rows == teacher.rows && student.cols == teacher.cols,
         "feature: expected student and teacher of one shape (B, E); ", shape_of(student), " and ",
         shape_of(teacher), " came");
  expect(per_row.rows == 1 && per_row.cols == student.rows, "feature: expected (1, ", student.rows,
         ") numbers, one a row; ", shape_of(per_row), " came");
  const bool is_double = student.dtype == Dtype::f64 && teacher.dtype == Dtype::f64;
  const Dtype real = is_double ? Dtype::f64 : Dtype::f32;
  expect(per_row.dtype == real, "feature: expected ", name_of(real), " numbers, one a row; ",
         shape_of(per_row), " came");
}

// What has the student's shape and type: "unit rows", "a gradient".
inline void check_like(const Matrix& student, const char* what, const Matrix& x) {
  expect(x.rows == student.rows && x.cols == student.cols && x.dtype == student.dtype,
         "feature: expected ", what, " like the student, ", shape_of(student), "; ", shape_of(x),
         " came");
}

// as torch.nn.functional.normalize: shorter rows are divided by this
constexpr double kMinNorm = 1e-12;

template <typename R>
KD_HD R bounded(R norm) {
  return norm > R(kMinNorm) ? norm : R(kMinNorm);
}

// A pair of rows, eight elements at a time. KEPT: pieces that a lane holds in registers, which
// must be all it has; 0 reads them anew, from the cache, whenever they are visited.
template <typename S, typename T, typename Lanes, int KEPT>
struct Pair {
  using R = typename Lanes::R;

  KD_HD Pair(const S* student, const T* teacher, int64_t width, bool aligned, Lanes lanes)
      : student(student), teacher(teacher), width(width), aligned(aligned), lanes(lanes) {
    KD_UNROLL
    for (int k = 0; k < KEPT; ++k) {
      load8(student + at(k), count(k), aligned, x[k]);
      load8(teacher + at(k), count(k), aligned, u[k]);
    }
  }

  // first element of the lane's k-th piece, and how many there are
  KD_HD int64_t at(int64_t k) const { return 8 * (lanes.first() + k * lanes.step()); }
  KD_HD int count(int64_t k) const {
    const int64_t left = width - at(k);
    return left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  }

  // f(k, x, u) for each of the lane's pieces
  template <typename F>
  KD_HD void visit(F&& f) const {
    if constexpr (KEPT > 0) {
      KD_UNROLL
      for (int k = 0; k < KEPT; ++k) f(k, x[k], u[k]);
    } else {
      for (int64_t k = 0; at(k) < width; ++k) {
        R one[8], other[8];
        load8(student + at(k), count(k), aligned, one);
        load8(teacher + at(k), count(k), aligned, other);
        f(k, one, other);
      }
    }
  }

  // sum over the whole row of f(x, u), known to all lanes
  template <typename F>
  KD_HD R sum(F&& f) const {
    return sum_pieces([&](int64_t, const R(&a)[8], const R(&b)[8], R(&part)[8]) {
      KD_UNROLL
      for (int i = 0; i < 8; ++i) part[i] += f(a[i], b[i]);
    });
  }

  // the same of what f(k, x, u, part) adds to the eight parts
  template <typename F>
  KD_HD R sum_pieces(F&& f) const {
    R part[8] = {};
    visit([&](int64_t k, const R(&a)[8], const R(&b)[8]) { f(k, a, b, part); });
    return lanes.sum(((part[0] + part[1]) + (part[2] + part[3])) +
                     ((part[4] + part[5]) + (part[6] + part[7])));
  }

  const S* student;
  const T* teacher;
  int64_t width;
  bool aligned;
  Lanes lanes;
  R x[KEPT > 0 ? KEPT : 1][8], u[KEPT > 0 ? KEPT : 1][8];
};

// What makes unit rows of student and teacher, and the length of the student's.
template <typename R>
struct Norms {
  R student = 1, teacher = 1, length = 1;
};

template <typename P>
KD_HD Norms<typename P::R> norms(const P& pair, bool normalize) {
  using R = typename P::R;
  if (!normalize) return {};
  const R length = std::sqrt(pair.sum([](R a, R) { return a * a; }));
  const R other = std::sqrt(pair.sum([](R, R b) { return b * b; }));
  return {1 / bounded(length), 1 / bounded(other), length};
}

// The unit rows go to `unit`, unless it is null.
template <typename P, typename S>
KD_HD typename P::R row_distance(const P& pair, bool normalize, S* unit, bool aligned) {
  using R = typename P::R;
  const Norms<R> norm = norms(pair, normalize);
  if (unit) {
    pair.visit([&](int64_t k, const R(&a)[8], const R(&)[8]) {
      R x[8];
      KD_UNROLL
      for (int i = 0; i < 8; ++i) x[i] = a[i] * norm.student;
      store8(unit + pair.at(k), pair.count(k), aligned, x);
    });
  }
  return pair.sum([&](R a, R b) {
    const R apart = a * norm.student - b * norm.teacher;
    return apart * apart;
  });
}

// `more`: gradient of the unit row, or null.
template <typename P, typename S>
KD_HD void row_gradient(const P& pair, typename P::R grad, const S* more, bool normalize, S* out,
                        bool aligned) {
  using R = typename P::R;
  const Norms<R> norm = norms(pair, normalize);
  const R up = 2 * grad;
  const auto pull = [&](int64_t k, const R(&a)[8], const R(&b)[8], R(&p)[8]) {
    R w[8] = {};
    if (more) load8(more + pair.at(k), pair.count(k), aligned, w);
    KD_UNROLL
    for (int i = 0; i < 8; ++i) p[i] = up * (a[i] * norm.student - b[i] * norm.teacher) + w[i];
  };
  R radial = 0;
  // only the part across the row survives, unless its length was bounded
  if (normalize && norm.length > R(kMinNorm)) {
    radial = pair.sum_pieces([&](int64_t k, const R(&a)[8], const R(&b)[8], R(&part)[8]) {
      R p[8];
      pull(k, a, b, p);
      KD_UNROLL
      for (int i = 0; i < 8; ++i) part[i] += a[i] * norm.student * p[i];
    });
  }
  pair.visit([&](int64_t k, const R(&a)[8], const R(&b)[8]) {
    R p[8];
    pull(k, a, b, p);
    // without a norm no product with 0, which would make infinity none
    if (normalize) {
      KD_UNROLL
      for (int i = 0; i < 8; ++i) p[i] = (p[i] - radial * (a[i] * norm.student)) * norm.student;
    }
    store8(out + pair.at(k), pair.count(k), aligned, p);
  });
}

}  // namespace kdengine
