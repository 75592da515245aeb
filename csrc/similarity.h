// SPDX-License-Identifier: Apache-2.0
// The op `similarity`: statistics of z = scale * left @ right.T, and the gradient of a strip of z.
//
// What stands here is what happens to a cell, a row's sums, an item's partial sums: arithmetic for
// host and device. similarity.cpp loops over it; similarity_tile.h has a block's threads do it.
//
//   sums of a row or column, its positive l left out, relative to `top`:
//     total = sum_{j != l} exp(z_j - top),   weighted = sum_{j != l} exp(z_j - top) w_j
//   gradient of a cell: weight_i exp(z_ij - lse_i) + weight_j exp(z_ij - lse_j), over all matrices;
//     at a positive of row i (column j) what is wanted there stands in place of its part
#pragma once

#include <algorithm>
#include <cmath>

#include "matrix.h"

namespace kdengine {

// Runs the code of the GPU's blocks on the host. Copies into shared memory are done when they are
// issued, or, if late, not before they are waited for.
struct Emulated {
  bool late;
};

// Sides are: the student's rows and columns, then the teacher's. An empty matrix is a side that is
// not wanted.
//   logits   left (B, D), right (M, D), scale (1, 1); for a teacher three more
//   labels   of the rows (1, B) and of the columns (1, M), int32; outside the matrix: no positive
//   parts    (P S, n): P partial sums in S slots: top, total and S - 2 weighted ones. Tile i writes
//            part 1 + i; part 0 is the sum of what came before
//   outs     (S, n): log-sum-exp, logit of the positive (only written where there is one), means
// Weights: the student's are z; the teacher's are t - z, then t.
void similarity_statistics(const Matrices& logits, const Matrices& labels, const Matrices& parts,
                           const Matrices& outs, Cpu place);
void similarity_statistics(const Matrices& logits, const Matrices& labels, const Matrices& parts,
                           const Matrices& outs, Cuda place);
void similarity_statistics(const Matrices& logits, const Matrices& labels, const Matrices& parts,
                           const Matrices& outs, Emulated place);

// Adds the parts up, in a fixed order, into part 0, and makes statistics of them. Part 0 of rows
// counts as nothing, that of columns only if `fresh`.
void similarity_finalise(const Matrices& parts, const Matrices& outs, bool fresh, Cpu place);
void similarity_finalise(const Matrices& parts, const Matrices& outs, bool fresh, Cuda place);
void similarity_finalise(const Matrices& parts, const Matrices& outs, bool fresh, Emulated place);

// out (B, M) = unit * (residual + pulls of one or two matrices), rounded once.
//   pulls      (3, n) each: lse, weight, what is wanted at the positive
//   residual   (B, M) float32 or empty; may be `out`
//   unit       (1, 1)
void similarity_gradient(const Matrices& logits, const Matrices& labels, const Matrices& pulls,
                         const Matrix& residual, const Matrix& unit, const Matrix& out, Cpu place);
void similarity_gradient(const Matrices& logits, const Matrices& labels, const Matrices& pulls,
                         const Matrix& residual, const Matrix& unit, const Matrix& out, Cuda place);
void similarity_gradient(const Matrices& logits, const Matrices& labels, const Matrices& pulls,
                         const Matrix& residual, const Matrix& unit, const Matrix& out,
                         Emulated place);

constexpr int kTile = 128;  // rows and columns of a tile
constexpr int kMaxWeighted = 2;

inline int64_t num_tiles(int64_t items) { return (items + kTile - 1) / kTile; }

// ---- arithmetic ----

// stands for minus infinity where a difference of two, or a product with 0, must not be NaN
template <typename R>
constexpr R kLowest = R(-3.0e38);

template <typename R>
KD_HD R larger(R a, R b) {
  return a > b ? a : b;
}

// exp(x - shift)
KD_HD double shifted_exp(double x, double shift) { return std::exp(x - shift); }
KD_HD float shifted_exp(float x, float shift) {
#ifdef __CUDA_ARCH__
  // one rounding of the exponent
  constexpr float log2e = 1.4426950408889634f;
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaf(x, log2e, -shift * log2e)));
  return y;
#else
  return std::exp(x - shift);
#endif
}

// What exponentials are relative to. Unit rows have |logit| <= scale, so no sum overflows; as near
// to 0 as that allows, because the rounding error of an exponent grows with its size.
template <typename R>
KD_HD R fixed_shift(R scale) {
  return larger(scale - R(60), R(0));
}

// Whether a total relative to the fixed shift lost no term that counts.
template <typename R>
KD_HD bool is_whole(R total) {
  return total >= R(0x1p-80) && total <= R(1e36);
}

template <typename R>
struct Sums {
  R top, total, weighted[kMaxWeighted];
};

template <typename R>
KD_HD void merge(Sums<R>& sums, const Sums<R>& more) {
  const R top = larger(sums.top, more.top);
  const R mine = shifted_exp(sums.top, top), theirs = shifted_exp(more.top, top);
  sums.top = top;
  sums.total = sums.total * mine + more.total * theirs;
  KD_UNROLL
  for (int k = 0; k < kMaxWeighted; ++k)
    sums.weighted[k] = sums.weighted[k] * mine + more.weighted[k] * theirs;
}

// What a row or column pulls; a side without pull has none of both.
template <typename R>
struct Pull {
  R lse, weight, positive;
};

// Without any other item lse is -inf, and nothing is pulled.
template <typename R>
KD_HD bool is_empty(R lse) {
  return lse == R(-INFINITY);
}

template <typename R>
KD_HD R pulled(R x, const Pull<R>& pull) {
  return is_empty(pull.lse) ? R(0) : pull.weight * shifted_exp(x, pull.lse);
}

// The factor of exponentials that are relative to the shift, and whether it is one that holds.
template <typename R>
KD_HD R coefficient(const Pull<R>& pull, R shift) {
  return is_empty(pull.lse) ? R(0) : pull.weight * shifted_exp(shift, pull.lse);
}
template <typename R>
KD_HD bool is_near(R lse, R shift) {
  return is_empty(lse) || (lse >= shift - R(55) && lse <= shift + R(75));
}

// ---- arguments ----

struct Operand {
  const char* data;
  int64_t rows, stride;  // of a row in bytes
  int width;             // bytes, a multiple of 16
};

// Where sums of rows, or of columns, go.
template <typename R>
struct Side {
  R* parts;  // null where they are not wanted
  R* out;
  int64_t items, num_parts, stride, out_stride;
  int num_slots;

  KD_HD R& part(int slot, int64_t number, int64_t item) const {
    return parts[(number * num_slots + slot) * stride + item];
  }
  KD_HD Sums<R> load(int64_t number, int64_t item) const {
    Sums<R> sums = {part(0, number, item), part(1, number, item), {}};
    KD_UNROLL
    for (int k = 0; k < kMaxWeighted; ++k)
      if (2 + k < num_slots) sums.weighted[k] = part(2 + k, number, item);
    return sums;
  }
  KD_HD void store(int64_t number, int64_t item, const Sums<R>& sums) const {
    part(0, number, item) = sums.top;
    part(1, number, item) = sums.total;
    KD_UNROLL
    for (int k = 0; k < kMaxWeighted; ++k)
      if (2 + k < num_slots) part(2 + k, number, item) = sums.weighted[k];
  }
  // the sum of every step-th part from `first` on
  KD_HD Sums<R> gather(int64_t item, int64_t first, int64_t step) const {
    Sums<R> sums = {kLowest<R>, 0, {}};
    for (int64_t i = first; i < num_parts; i += step) merge(sums, load(i, item));
    return sums;
  }
  KD_HD void finish(int64_t item, const Sums<R>& sums) const {
    const bool any = !(sums.total == 0);
    store(0, item, sums);
    out[item] = any ? sums.top + std::log(sums.total) : R(-INFINITY);
    KD_UNROLL
    for (int k = 0; k < kMaxWeighted; ++k)
      if (2 + k < num_slots)
        out[(2 + k) * out_stride + item] = any ? sums.weighted[k] / sums.total : R(0);
  }
  KD_HD void put_positive(int64_t item, R x) const { out[out_stride + item] = x; }
};

// One or two matrices of logits and the positives of both directions.
template <typename R>
struct Logits {
  Operand left[2], right[2];
  const R* scale[2];
  int64_t rows, cols;
  const int* labels[2];
  int count;
};

template <typename R>
struct Statistics : Logits<R> {
  Side<R> sides[2][2];  // of a matrix: rows, columns
};

template <typename R>
struct PullSide {
  const R* data;  // null: pulls nothing
  int64_t stride;
  KD_HD Pull<R> load(int64_t item) const {
    if (!data) return {R(-INFINITY), 0, 0};
    return {data[item], data[stride + item], data[2 * stride + item]};
  }
};

template <typename R>
struct Gradient : Logits<R> {
  PullSide<R> pulls[2][2];
  const R* residual;  // null: 0
  const R* unit;
  void* out;
  int64_t residual_stride, out_stride;
};

// ---- checks ----

inline bool is_there(const Matrix& x) { return x.rows > 0 && x.cols > 0; }

inline Operand operand_of(const Matrix& x, int64_t itemsize) {
  expect(reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * itemsize % 16 == 0 &&
             x.cols * itemsize % 16 == 0 && x.stride * itemsize < 1 << 24,
         "similarity: expected features in pieces of 16 bytes, of less than 16 MiB a row; ",
         shape_of(x), " came");
  return {static_cast<const char*>(x.data), x.rows, x.stride * itemsize,
          static_cast<int>(x.cols * itemsize)};
}

template <typename R>
R* numbers(const char* what, const Matrix& x, int64_t rows, int64_t cols) {
  const Dtype dtype = sizeof(R) == 8 ? Dtype::f64 : Dtype::f32;
  expect(x.rows == rows && x.cols == cols && x.dtype == dtype, "similarity: expected ", what, " (",
         rows, ", ", cols, ") ", name_of(dtype), "; ", shape_of(x), " came");
  return static_cast<R*>(x.data);
}

template <typename R>
void unpack_logits(const Matrices& logits, const Matrices& labels, Logits<R>& to) {
  expect((logits.size() == 3 || logits.size() == 6) && labels.size() == 2,
         "similarity: expected left, right and scale of one or two matrices, and two labels; ",
         logits.size(), " and ", labels.size(), " came");
  to.count = static_cast<int>(logits.size() / 3);
  to.rows = logits[0].rows;
  to.cols = logits[1].rows;
  for (int k = 0; k < to.count; ++k) {
    const Matrix &left = logits[3 * k], &right = logits[3 * k + 1];
    expect(left.rows == to.rows && right.rows == to.cols && left.cols == right.cols &&
               left.dtype == right.dtype,
           "similarity: expected (", to.rows, ", D) and (", to.cols, ", D) of one dtype; ",
           shape_of(left), " and ", shape_of(right), " came");
    expect(!is_integer(left.dtype) && (left.dtype != Dtype::f64 || sizeof(R) == 8),
           "similarity: expected features of floating point, of float64 with a float64 scale; ",
           shape_of(left), " came");
    to.left[k] = operand_of(left, size_of(left.dtype));
    to.right[k] = operand_of(right, size_of(right.dtype));
    to.scale[k] = numbers<R>("scale", logits[3 * k + 2], 1, 1);
  }
  for (int i = 0; i < 2; ++i) {
    const int64_t items = i ? to.cols : to.rows;
    expect(labels[i].rows == 1 && labels[i].cols == items && labels[i].dtype == Dtype::i32,
           "similarity: expected labels (1, ", items, ") int32; ", shape_of(labels[i]), " came");
    to.labels[i] = static_cast<const int*>(labels[i].data);
  }
}

// `parts` are 1 + `tiles` partial sums a slot; any number where `tiles` is negative.
template <typename R>
Side<R> unpack_side(const Matrix& parts, const Matrix& out, int64_t items, int64_t tiles) {
  if (!is_there(parts)) return {};
  const int64_t num_parts = tiles < 0 ? parts.rows / out.rows : 1 + tiles;
  expect(out.rows >= 2 && out.rows <= 2 + kMaxWeighted, "similarity: expected 2 to 4 rows; ",
         shape_of(out), " came");
  return {numbers<R>("partial sums", parts, out.rows * num_parts, items),
          numbers<R>("statistics", out, out.rows, items),
          items,
          num_parts,
          parts.stride,
          out.stride,
          static_cast<int>(out.rows)};
}

template <typename R>
Statistics<R> unpack_statistics(const Matrices& logits, const Matrices& labels,
                                const Matrices& parts, const Matrices& outs) {
  Statistics<R> to = {};
  unpack_logits(logits, labels, to);
  expect(parts.size() == 4 && outs.size() == 4, "similarity: expected four sides; ", parts.size(),
         " and ", outs.size(), " came");
  for (int k = 0; k < 2; ++k) {
    expect(k < to.count || (!is_there(parts[2]) && !is_there(parts[3])),
           "similarity: sides of a teacher are wanted, but no teacher came");
    to.sides[k][0] = unpack_side<R>(parts[2 * k], outs[2 * k], to.rows, num_tiles(to.cols));
    to.sides[k][1] = unpack_side<R>(parts[2 * k + 1], outs[2 * k + 1], to.cols, num_tiles(to.rows));
  }
  return to;
}

template <typename R>
Gradient<R> unpack_gradient(const Matrices& logits, const Matrices& labels, const Matrices& pulls,
                            const Matrix& residual, const Matrix& unit, const Matrix& out) {
  Gradient<R> to = {};
  unpack_logits(logits, labels, to);
  expect(pulls.size() == 2 * size_t(to.count), "similarity: expected ", 2 * to.count, " pulls; ",
         pulls.size(), " came");
  for (int k = 0; k < to.count; ++k) {
    for (int i = 0; i < 2; ++i) {
      const Matrix& pull = pulls[2 * k + i];
      if (is_there(pull))
        to.pulls[k][i] = {numbers<R>("pulls", pull, 3, i ? to.cols : to.rows), pull.stride};
    }
  }
  if (is_there(residual)) to.residual = numbers<R>("a residual", residual, to.rows, to.cols);
  to.residual_stride = residual.stride;
  to.unit = numbers<R>("a unit", unit, 1, 1);
  expect(out.rows == to.rows && out.cols == to.cols, "similarity: expected a strip (", to.rows,
         ", ", to.cols, "); ", shape_of(out), " came");
  expect(reinterpret_cast<uintptr_t>(out.data) % 16 == 0 &&
             (out.rows < 2 || out.stride * size_of(out.dtype) % 16 == 0),
         "similarity: expected a strip whose rows begin at multiples of 16 bytes; ", shape_of(out),
         " came");
  to.out = out.data;
  to.out_stride = out.stride;
  return to;
}

}  // namespace kdengine
