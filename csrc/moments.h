// SPDX-License-Identifier: Apache-2.0
// The op `moments`: mean and biased variance of every column, of student and teacher, and the
// student's gradient.
//
//   mean_d = 1/B sum_i x_id,   variance_d = 1/B sum_i (x_id - mean_d)^2
//
// With g and h the upstream gradients of the student's mean and variance:
//
//   d student_id = (g_d + 2 h_d (x_id - mean_d)) / B
//
// A lane takes eight columns of kRows rows, sums them twice, once for the mean and once for the
// squares about it; moments of different rows are merged in a fixed tree (Chan, Golub, LeVeque
// 1979): lanes into a chunk, and chunks, by lanes again, into the whole.
#pragma once

#include <algorithm>

#include "matrix.h"

namespace kdengine {

// A side is the student, 0, or the teacher, 1; both have one shape (B, E) and one type.
//   out     (4, E): means of both sides, then variances; float32 (float64 on the host)
//   parts   (4 P, E): of each chunk of kChunk rows likewise, with sums of squares for variances;
//   not
//           used where one chunk holds all rows
void moments_forward(const Matrices& sides, const Matrix& parts, const Matrix& out, Cpu cpu);
void moments_forward(const Matrices& sides, const Matrix& parts, const Matrix& out, Cuda cuda);
// `mean` (1, E) of the student; `grad` (2, E) of its mean and variance; `out` like the student
void moments_backward(const Matrix& student, const Matrix& mean, const Matrix& grad,
                      const Matrix& out, Cpu cpu);
void moments_backward(const Matrix& student, const Matrix& mean, const Matrix& grad,
                      const Matrix& out, Cuda cuda);

constexpr int kMomentLanes = 32;                    // that share the rows of a chunk
constexpr int kMomentRows = 8;                      // of a lane
constexpr int kChunk = kMomentLanes * kMomentRows;  // rows

// Of eight columns.
template <typename R>
struct Moments {
  R count = 0;  // of rows
  R mean[8] = {}, squares[8] = {};
};

template <typename R>
KD_HD void merge(Moments<R>& to, const Moments<R>& other) {
  if (other.count == 0) return;
  const R total = to.count + other.count, share = other.count / total;
  KD_UNROLL
  for (int i = 0; i < 8; ++i) {
    const R apart = other.mean[i] - to.mean[i];
    to.mean[i] += apart * share;
    to.squares[i] += other.squares[i] + apart * apart * (to.count * share);
  }
  to.count = total;
}

// What a launch is over.
struct MomentsOf {
  Matrix sides[2];
  Matrix parts, out;
  int64_t rows, cols, chunks;
  bool aligned;

  KD_HD int count(int64_t piece) const {
    const int64_t left = cols - 8 * piece;
    return left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  }

  // A lane's rows of a chunk.
  template <typename T, typename R>
  KD_HD Moments<R> of_rows(int side, int64_t chunk, int64_t piece, int lane) const {
    const Matrix& x = sides[side];
    Moments<R> to;
    R value[kMomentRows][8];
    KD_UNROLL
    for (int k = 0; k < kMomentRows; ++k) {
      const int64_t row = chunk * kChunk + k * kMomentLanes + lane;
      const bool is_here = row < rows;
      load8(static_cast<const T*>(x.data) + (is_here ? row : 0) * x.stride + 8 * piece,
            is_here ? count(piece) : 0, aligned, value[k]);
      to.count += is_here;
      KD_UNROLL
      for (int i = 0; i < 8; ++i) to.mean[i] += value[k][i];
    }
    const R share = to.count > 0 ? 1 / to.count : R(0);
    KD_UNROLL
    for (int i = 0; i < 8; ++i) to.mean[i] *= share;
    KD_UNROLL
    for (int k = 0; k < kMomentRows; ++k) {
      if (k < static_cast<int>(to.count)) {
        KD_UNROLL
        for (int i = 0; i < 8; ++i)
          to.squares[i] += (value[k][i] - to.mean[i]) * (value[k][i] - to.mean[i]);
      }
    }
    return to;
  }

  // A lane's chunks.
  template <typename R>
  KD_HD Moments<R> of_parts(int side, int64_t piece, int lane) const {
    Moments<R> to;
    for (int64_t chunk = lane; chunk < chunks; chunk += kMomentLanes) {
      Moments<R> part;
      const int64_t left = rows - chunk * kChunk;
      part.count = static_cast<R>(left < kChunk ? left : kChunk);
      load8(row_of<const R>(parts, 4 * chunk + side) + 8 * piece, count(piece), false, part.mean);
      load8(row_of<const R>(parts, 4 * chunk + 2 + side) + 8 * piece, count(piece), false,
            part.squares);
      merge(to, part);
    }
    return to;
  }

  // A chunk, or all rows.
  template <typename R>
  KD_HD void put_part(int side, int64_t chunk, int64_t piece, const Moments<R>& x) const {
    store8(row_of<R>(parts, 4 * chunk + side) + 8 * piece, count(piece), false, x.mean);
    store8(row_of<R>(parts, 4 * chunk + 2 + side) + 8 * piece, count(piece), false, x.squares);
  }
  template <typename R>
  KD_HD void put(int side, int64_t piece, Moments<R> x) const {
    KD_UNROLL
    for (int i = 0; i < 8; ++i) x.squares[i] /= x.count;
    store8(row_of<R>(out, side) + 8 * piece, count(piece), false, x.mean);
    store8(row_of<R>(out, 2 + side) + 8 * piece, count(piece), false, x.squares);
  }
};

struct MomentsGradient {
  Matrix student, mean, grad, out;
  bool aligned;

  KD_HD int count(int64_t piece) const {
    const int64_t left = student.cols - 8 * piece;
    return left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  }

  // The rows of a lane, as in the forward.
  template <typename T, typename R>
  KD_HD void rows(int64_t chunk, int64_t piece, int lane) const {
    R center[8], pull[8], slope[8];
    load8(row_of<const R>(mean, 0) + 8 * piece, count(piece), false, center);
    load8(row_of<const R>(grad, 0) + 8 * piece, count(piece), false, pull);
    load8(row_of<const R>(grad, 1) + 8 * piece, count(piece), false, slope);
    const R share = 1 / static_cast<R>(student.rows);
    KD_UNROLL
    for (int k = 0; k < kMomentRows; ++k) {
      const int64_t row = chunk * kChunk + k * kMomentLanes + lane;
      if (row >= student.rows) break;
      R x[8];
      load8(row_of<const T>(student, row) + 8 * piece, count(piece), aligned, x);
      KD_UNROLL
      for (int i = 0; i < 8; ++i) x[i] = (pull[i] + 2 * slope[i] * (x[i] - center[i])) * share;
      store8(row_of<T>(out, row) + 8 * piece, count(piece), aligned, x);
    }
  }
};

inline int64_t num_chunks(int64_t rows) { return (rows + kChunk - 1) / kChunk; }
inline int64_t num_pieces(int64_t cols) { return (cols + 7) / 8; }
inline Dtype real_of(const Matrix& x) { return x.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

inline void check_moments(const char* what, const Matrix& x, int64_t rows, int64_t cols,
                          Dtype dtype) {
  expect(x.rows == rows && x.cols == cols && x.dtype == dtype, "moments: expected ", what, " (",
         rows, ", ", cols, ") ", name_of(dtype), "; ", shape_of(x), " came");
}

inline MomentsOf unpack_moments(const Matrices& sides, const Matrix& parts, const Matrix& out) {
  expect(sides.size() == 2, "moments: expected a student and a teacher; ", sides.size(), " came");
  const Matrix& x = sides[0];
  expect(!is_absent(x), "moments: expected at least one row; ", shape_of(x), " came");
  check_moments("a teacher like the student,", sides[1], x.rows, x.cols, x.dtype);
  check_moments("results", out, 4, x.cols, real_of(x));
  const int64_t chunks = num_chunks(x.rows);
  if (chunks > 1) check_moments("parts", parts, 4 * chunks, x.cols, real_of(x));
  return {{x, sides[1]}, parts, out, x.rows, x.cols, chunks, is_aligned(x) && is_aligned(sides[1])};
}

inline MomentsGradient unpack_moments_gradient(const Matrix& student, const Matrix& mean,
                                               const Matrix& grad, const Matrix& out) {
  check_moments("means", mean, 1, student.cols, real_of(student));
  check_moments("gradients of the moments", grad, 2, student.cols, real_of(student));
  check_moments("a gradient like the student,", out, student.rows, student.cols, student.dtype);
  return {student, mean, grad, out, is_aligned(student) && is_aligned(out)};
}

}  // namespace kdengine
