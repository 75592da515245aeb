// SPDX-License-Identifier: Apache-2.0
// The op `terms`: cross-entropies, divergences and teachers' entropies from the statistics of rows
// and of columns, and the gradients of those. What a row or column, an item, and a lane of items
// do stands here once. For the student s and each teacher t, of an item with a positive:
//
//   loss = softplus(others - positive),   outside = sigmoid(others - positive)
//
// -log of the positive's probability and what it leaves; else loss = others and outside = 1.
//
//   hard    = loss_s, infinite without a positive
//   soft    = loss_s - loss_t + outside_t (gap - positive_t + positive_s)
//   entropy = loss_t + outside_t (positive_t - mean_t)
//
// A lane adds up every kTermLanes-th item, groups of lanes are added in a fixed tree, and so are
// the groups.
#pragma once

#include <cmath>
#include <vector>

#include "matrix.h"

namespace kdengine {

using Integers = std::vector<int64_t>;
using Reals = std::vector<double>;
using Flags = std::vector<bool>;

// Of rows and columns; a side without items, an empty list, is off.
//   others, positive (1, n); teacher_others, teacher_positive, gap, teacher_mean (K, n)
struct TermsOf {
  const Matrices &rows, &cols;
  const Matrices& labels;  // (1, n) int64 each
  const Integers& limits;  // a label below 0, or from here on, names no positive
  const Reals& shares;     // factors of the means
  const Flags &hard, &soft;
};

// `values` (1, terms that are on): hard rows, hard columns, soft rows, soft columns; `entropies`
// (1, soft sides). All are float32 (float64 on the host), as in the backward.
void terms_forward(const TermsOf& given, const Matrix& values, const Matrix& entropies, Cpu cpu);
void terms_forward(const TermsOf& given, const Matrix& values, const Matrix& entropies, Cuda cuda);
// `grads` like `values`; `outs` like others, positive and gap of the rows, then of the columns
void terms_backward(const Matrix& grads, const TermsOf& given, const Matrices& outs, Cpu cpu);
void terms_backward(const Matrix& grads, const TermsOf& given, const Matrices& outs, Cuda cuda);

constexpr int kTermGroup = 32;                       // of lanes, a warp
constexpr int kTermLanes = kTermGroup * kTermGroup;  // of a side

// Of a student or teacher at an item.
template <typename R>
struct Miss {
  R loss, outside;
};

template <typename R>
KD_HD Miss<R> miss_of(R others, R positive, bool known) {
  if (!known) return {others, 1};
  const R x = others - positive, e = std::exp(-std::fabs(x));
  return {(x > 0 ? x : R(0)) + std::log1p(e), (x < 0 ? e : R(1)) / (1 + e)};
}

// Of an item, or sums; over all teachers.
template <typename R>
struct Losses {
  R hard = 0, soft = 0, entropy = 0;

  KD_HD void add(const Losses& x) {
    hard += x.hard;
    soft += x.soft;
    entropy += x.entropy;
  }
};

// Rows or columns.
struct TermSide {
  Matrix others, positive, teacher_others, teacher_positive, gap, teacher_mean, labels;
  Matrix outs[3];  // of others, positive, gap
  int64_t items, teachers, limit;
  double hard_weight, soft_weight;   // of an item in a mean
  int hard_at, soft_at, entropy_at;  // among the results; negative where it is off

  template <typename R>
  KD_HD static R at(const Matrix& x, int64_t k, int64_t item) {
    return row_of<const R>(x, k)[item];
  }
  KD_HD bool has(int64_t item) const {
    const int64_t label = at<int64_t>(labels, 0, item);
    return label >= 0 && label < limit;
  }
  template <typename R>
  KD_HD Miss<R> student(int64_t item, bool known) const {
    return miss_of(at<R>(others, 0, item), at<R>(positive, 0, item), known);
  }
  template <typename R>
  KD_HD Miss<R> teacher(int64_t k, int64_t item, bool known) const {
    return miss_of(at<R>(teacher_others, k, item), at<R>(teacher_positive, k, item), known);
  }

  template <typename R>
  KD_HD Losses<R> losses(int64_t item) const {
    const bool known = has(item);
    const R z = at<R>(positive, 0, item);
    const Miss<R> s = student<R>(item, known);
    Losses<R> to;
    to.hard = known ? s.loss : R(INFINITY);
    for (int64_t k = 0; k < teachers; ++k) {
      const Miss<R> t = teacher<R>(k, item, known);
      const R positive_t = at<R>(teacher_positive, k, item);
      to.soft += s.loss - t.loss + t.outside * (at<R>(gap, k, item) - positive_t + z);
      to.entropy += t.loss + t.outside * (positive_t - at<R>(teacher_mean, k, item));
    }
    return to;
  }

  template <typename R>
  KD_HD Losses<R> of_lane(int lane) const {
    Losses<R> to;
    for (int64_t item = lane; item < items; item += kTermLanes) to.add(losses<R>(item));
    return to;
  }

  template <typename R>
  KD_HD void put(const Losses<R>& sum, const Matrix& values, const Matrix& entropies) const {
    const R soft = static_cast<R>(soft_weight);
    if (hard_at >= 0) row_of<R>(values, 0)[hard_at] = sum.hard * static_cast<R>(hard_weight);
    if (soft_at >= 0) row_of<R>(values, 0)[soft_at] = sum.soft * soft;
    if (soft_at >= 0) row_of<R>(entropies, 0)[entropy_at] = sum.entropy * soft;
  }

  template <typename R>
  KD_HD R upstream(const Matrix& grads, int term_at, double weight) const {
    return term_at < 0 ? R(0) : row_of<const R>(grads, 0)[term_at] * static_cast<R>(weight);
  }

  template <typename R>
  KD_HD void put_gradients(int64_t item, const Matrix& grads) const {
    const bool known = has(item);
    const R soft = upstream<R>(grads, soft_at, soft_weight);
    const Miss<R> s = student<R>(item, known);
    const R pull = known ? upstream<R>(grads, hard_at, hard_weight) * s.outside : R(0);
    R of_others = pull, of_positive = -pull;
    for (int64_t k = 0; k < teachers; ++k) {
      const R outside = teacher<R>(k, item, known).outside;
      of_others += soft * s.outside;
      of_positive += soft * (known ? outside - s.outside : outside);
      row_of<R>(outs[2], k)[item] = soft * outside;
    }
    row_of<R>(outs[0], 0)[item] = of_others;
    row_of<R>(outs[1], 0)[item] = of_positive;
  }
};

// What a launch is over.
struct Terms {
  TermSide sides[2];
  Matrix values, entropies;  // in the backward: upstream gradients, and nothing

  const Matrix& longest() const { return sides[sides[0].items < sides[1].items].others; }
};

inline void check_terms(const char* what, const Matrix& x, int64_t rows, int64_t cols,
                        Dtype dtype) {
  expect(x.rows == rows && x.cols == cols && x.dtype == dtype, "terms: expected ", what, " (", rows,
         ", ", cols, ") ", name_of(dtype), "; ", shape_of(x), " came");
}

inline TermSide unpack_term_side(const TermsOf& given, int i, const Matrices& outs, Dtype real) {
  TermSide to = {};
  to.hard_at = to.soft_at = to.entropy_at = -1;
  const Matrices& x = i ? given.cols : given.rows;
  expect(x.size() == 6 || (x.empty() && !given.hard[i] && !given.soft[i]),
         "terms: expected six statistics of a side that has a term; ", x.size(), " came");
  if (x.empty()) return to;
  to.items = x[0].cols;
  to.teachers = x[2].rows;
  expect(to.items > 0 && (to.teachers > 0 || !given.soft[i]),
         "terms: expected items and, on a soft side, teachers; ", to.items, " and ", to.teachers,
         " came");
  Matrix* const stats[] = {&to.others,           &to.positive, &to.teacher_others,
                           &to.teacher_positive, &to.gap,      &to.teacher_mean};
  // without teachers theirs may have any width
  const auto check = [&](const char* what, const Matrix& y, bool of_teachers) {
    if (!of_teachers || to.teachers > 0)
      check_terms(what, y, of_teachers ? to.teachers : 1, to.items, real);
  };
  for (int j = 0; j < 6; ++j) {
    check("statistics", x[j], j >= 2);
    *stats[j] = x[j];
  }
  for (int j = 0; j < 3 && !outs.empty(); ++j) {
    to.outs[j] = outs[3 * i + j];
    check("gradients", to.outs[j], j == 2);
  }
  check_terms("labels", given.labels[i], 1, to.items, Dtype::i64);
  to.labels = given.labels[i];
  to.limit = given.limits[i];
  to.hard_weight = given.shares[i] / to.items;
  // without teachers nothing is weighed
  to.soft_weight = to.teachers > 0 ? to.hard_weight / to.teachers : 0;
  return to;
}

inline Terms unpack_terms(const TermsOf& given, const Matrix& values, const Matrix& entropies,
                          const Matrices& outs) {
  const Dtype real = values.dtype;
  expect(real == Dtype::f32 || real == Dtype::f64, "terms: expected float32 or float64; ",
         shape_of(values), " came");
  for (const size_t size : {given.labels.size(), given.limits.size(), given.shares.size(),
                            given.hard.size(), given.soft.size()})
    expect(size == 2, "terms: expected labels, limits, shares and flags of two sides; ", size,
           " came");
  expect(outs.empty() || outs.size() == 6, "terms: expected six gradients; ", outs.size(), " came");
  Terms to = {{unpack_term_side(given, 0, outs, real), unpack_term_side(given, 1, outs, real)},
              values,
              entropies};
  int terms = 0, entropies_on = 0;
  for (int i = 0; i < 2; ++i)
    if (given.hard[i]) to.sides[i].hard_at = terms++;
  for (int i = 0; i < 2; ++i) {
    if (!given.soft[i]) continue;
    to.sides[i].soft_at = terms++;
    to.sides[i].entropy_at = entropies_on++;
  }
  check_terms("a number a term,", values, 1, terms, real);
  if (outs.empty()) check_terms("a number a soft side,", entropies, 1, entropies_on, real);
  return to;
}

}  // namespace kdengine
