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

// A pair of matrices a tower, all pairs of one shape and one pair of types, in one launch.
// `distance` and `grad` are [towers, B]. `units`, the x_i, and `grad_units`, the w, are like the
// students, or without rows.
void feature_forward(const Matrices& students, const Matrices& teachers, const Matrix& distance,
                     const Matrices& units, bool normalize, Cpu cpu);
void feature_backward(const Matrices& students, const Matrices& teachers, const Matrix& grad,
                      const Matrices& grad_units, const Matrices& outs, bool normalize, Cpu cpu);
void feature_forward(const Matrices& students, const Matrices& teachers, const Matrix& distance,
                     const Matrices& units, bool normalize, Cuda cuda);
void feature_backward(const Matrices& students, const Matrices& teachers, const Matrix& grad,
                      const Matrices& grad_units, const Matrices& outs, bool normalize, Cuda cuda);

constexpr int kTowers = 4;  // of a launch at most

struct Tower {
  Matrix student, teacher, unit, out;  // `unit`: the x_i, or what is wanted of them
};

// What a launch is over, forward and backward.
struct Towers {
  Tower at[kTowers];
  Matrix per_row;  // distances, or their gradients
  int count;
  bool aligned, normalize;
};

// float64 on the host alone
inline void check_tower(const Tower& first, const Tower& a) {
  const Matrix &student = a.student, &teacher = a.teacher;
  expect(student.rows == teacher.rows && student.cols == teacher.cols,
         "feature: expected student and teacher of one shape (B, E); ", shape_of(student), " and ",
         shape_of(teacher), " came");
  const auto like = [](const Matrix& x, const Matrix& y) {
    return x.rows == y.rows && x.cols == y.cols && x.dtype == y.dtype;
  };
  expect(like(student, first.student) && like(teacher, first.teacher),
         "feature: expected towers of one shape and type, ", shape_of(first.student), " and ",
         shape_of(first.teacher), "; ", shape_of(student), " and ", shape_of(teacher), " came");
  expect(is_absent(a.unit) || like(a.unit, student),
         "feature: expected unit rows like the student, ", shape_of(student), "; ",
         shape_of(a.unit), " came");
  expect(is_absent(a.out) || like(a.out, student),
         "feature: expected a gradient like the student, ", shape_of(student), "; ",
         shape_of(a.out), " came");
}

// `outs` may be empty.
inline Towers unpack_towers(const Matrices& students, const Matrices& teachers,
                            const Matrix& per_row, const Matrices& units, const Matrices& outs,
                            bool normalize) {
  const size_t count = students.size();
  expect(count > 0 && count <= kTowers && teachers.size() == count && units.size() == count &&
             (outs.empty() || outs.size() == count),
         "feature: expected lists of one length, 1 to ", kTowers, "; ", count, " students, ",
         teachers.size(), " teachers, ", units.size(), " unit rows and ", outs.size(),
         " gradients came");
  Towers to = {{}, per_row, static_cast<int>(count), true, normalize};
  for (size_t i = 0; i < count; ++i) {
    const Tower& a =
        to.at[i] = {students[i], teachers[i], units[i], outs.empty() ? Matrix{} : outs[i]};
    check_tower(to.at[0], a);
    for (const Matrix* x : {&a.student, &a.teacher, &a.unit, &a.out})
      to.aligned = to.aligned && (is_absent(*x) || is_aligned(*x));
  }
  const Matrix& student = students[0];
  const bool is_double = student.dtype == Dtype::f64 && teachers[0].dtype == Dtype::f64;
  const Dtype real = is_double ? Dtype::f64 : Dtype::f32;
  expect(per_row.rows == to.count && per_row.cols == student.rows && per_row.dtype == real,
         "feature: expected (", count, ", ", student.rows, ") ", name_of(real),
         " numbers, one a row; ", shape_of(per_row), " came");
  return to;
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

// A row of a tower.
template <typename S, typename T, int KEPT, typename Lanes>
KD_HD Pair<S, T, Lanes, KEPT> pair_of(const Towers& a, int tower, int64_t row, Lanes lanes) {
  const Tower& at = a.at[tower];
  return {row_of<const S>(at.student, row), row_of<const T>(at.teacher, row), at.student.cols,
          a.aligned, lanes};
}

// The unit rows go to `unit`, unless it is null.
template <typename P, typename S>
KD_HD typename P::R row_distance(const P& pair, bool normalize, S* unit) {
  using R = typename P::R;
  const Norms<R> norm = norms(pair, normalize);
  if (unit) {
    pair.visit([&](int64_t k, const R(&a)[8], const R(&)[8]) {
      R x[8];
      KD_UNROLL
      for (int i = 0; i < 8; ++i) x[i] = a[i] * norm.student;
      store8(unit + pair.at(k), pair.count(k), pair.aligned, x);
    });
  }
  return pair.sum([&](R a, R b) {
    const R apart = a * norm.student - b * norm.teacher;
    return apart * apart;
  });
}

// `more`: gradient of the unit row, or null.
template <typename P, typename S>
KD_HD void row_gradient(const P& pair, typename P::R grad, const S* more, bool normalize, S* out) {
  using R = typename P::R;
  const Norms<R> norm = norms(pair, normalize);
  const R up = 2 * grad;
  const auto pull = [&](int64_t k, const R(&a)[8], const R(&b)[8], R(&p)[8]) {
    R w[8] = {};
    if (more) load8(more + pair.at(k), pair.count(k), pair.aligned, w);
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
    store8(out + pair.at(k), pair.count(k), pair.aligned, p);
  });
}

}  // namespace kdengine
