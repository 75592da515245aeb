// SPDX-License-Identifier: Apache-2.0
// The op `similarity` on a CPU, tiles over threads.
#include "similarity.h"

namespace kdengine {
namespace {

// A tile of logits, its rows next to each other.
template <typename R>
struct Tile {
  int64_t row0, col0;
  int rows, cols;
  std::vector<R> x;

  R at(int row, int col) const { return x[row * kTile + col]; }
};

template <typename S, typename R>
void read_row(const Operand& from, int64_t row, R* to, int64_t step) {
  const S* x = reinterpret_cast<const S*>(from.data + row * from.stride);
  for (int k = 0; k < from.width / static_cast<int>(sizeof(S)); ++k) to[k * step] = to_real(x[k]);
}

template <typename R>
Tile<R> make_tile(const Logits<R>& a, const Matrices& logits, int k, int64_t row0, int64_t col0) {
  Tile<R> tile{row0, col0, static_cast<int>(std::min<int64_t>(kTile, a.rows - row0)),
               static_cast<int>(std::min<int64_t>(kTile, a.cols - col0)),
               std::vector<R>(kTile * kTile)};
  const int64_t width = logits[3 * k].cols;
  std::vector<R> left(width), right(width * kTile);
  const auto fill = [&](auto* s) {
    using S = std::remove_pointer_t<decltype(s)>;
    for (int col = 0; col < tile.cols; ++col)
      read_row<S>(a.right[k], col0 + col, &right[col], kTile);
    for (int row = 0; row < tile.rows; ++row) {
      read_row<S>(a.left[k], row0 + row, left.data(), 1);
      R* out = &tile.x[row * kTile];
      // neighbours in the inner loop, so that it needs no other order of additions to be fast
      for (int64_t i = 0; i < width; ++i)
        for (int col = 0; col < kTile; ++col) out[col] += left[i] * right[i * kTile + col];
      for (int col = 0; col < kTile; ++col) out[col] *= *a.scale[k];
    }
  };
  if constexpr (sizeof(R) == 8) {
    if (logits[3 * k].dtype == Dtype::f64) {
      fill(static_cast<double*>(nullptr));
      return tile;
    }
  }
  with_element("similarity", logits[3 * k], fill);
  return tile;
}

// Sums over the items of a tile's row or column; x(i), weights w(k, i), item `left_out` left out.
template <typename R, typename X, typename W>
Sums<R> sum(int items, int64_t left_out, R shift, X&& x, W&& w) {
  const auto relative_to = [&](R top) {
    Sums<R> sums = {top, 0, {}};
    for (int i = 0; i < items; ++i) {
      if (i == left_out) continue;
      const R e = shifted_exp(x(i), top);
      sums.total += e;
      for (int k = 0; k < kMaxWeighted; ++k) sums.weighted[k] += e * w(k, i);
    }
    return sums;
  };
  const Sums<R> sums = relative_to(shift);
  if (is_whole(sums.total)) return sums;
  R top = kLowest<R>;
  for (int i = 0; i < items; ++i)
    if (i != left_out) top = larger(top, x(i));
  return relative_to(top);
}

// What a tile's rows and columns sum up to, for the student (k = 0) or its teacher.
template <typename R>
void reduce(const Statistics<R>& a, int k, const Tile<R>& z, const Tile<R>& x) {
  const R shift = fixed_shift(*a.scale[k]);
  for (int i = 0; i < 2; ++i) {
    const Side<R>& side = a.sides[k][i];
    if (!side.parts) continue;
    const int64_t first = i ? x.col0 : x.row0, start = i ? x.row0 : x.col0;
    const int num_items = i ? x.cols : x.rows, length = i ? x.rows : x.cols;
    for (int item = 0; item < num_items; ++item) {
      const auto at = [&](const Tile<R>& tile, int j) {
        return i ? tile.at(j, item) : tile.at(item, j);
      };
      const int64_t positive = a.labels[i][first + item] - start;
      const Sums<R> sums = sum(
          length, positive, shift, [&](int j) { return at(x, j); },
          [&](int slot, int j) { return k && !slot ? at(x, j) - at(z, j) : at(x, j); });
      side.store(1 + start / kTile, first + item, sums);
      if (positive >= 0 && positive < length)
        side.put_positive(first + item, at(x, static_cast<int>(positive)));
    }
  }
}

// f(row0, col0) for every tile
template <typename R, typename F>
void each_tile(const Logits<R>& a, int threads, F&& f) {
  const int64_t across = num_tiles(a.cols), count = num_tiles(a.rows) * across;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) f(i / across * kTile, i % across * kTile);
}

// f(real number) of statistics and scales
template <typename F>
void with_real(const Matrix& x, F&& f) {
  if (x.dtype == Dtype::f64) return f(double());
  f(float());
}

// f(element) of a strip
template <typename F>
void with_strip(const Matrix& out, F&& f) {
  if (out.dtype == Dtype::f64) return f(static_cast<double*>(nullptr));
  with_element("similarity", out, f);
}

template <typename R, typename S>
void write_tile(const Gradient<R>& a, const Matrices& logits, int64_t row0, int64_t col0) {
  const Tile<R> x[2] = {make_tile(a, logits, 0, row0, col0),
                        a.count > 1 ? make_tile(a, logits, 1, row0, col0) : Tile<R>{}};
  for (int row = 0; row < x[0].rows; ++row) {
    for (int col = 0; col < x[0].cols; ++col) {
      const int64_t i = row0 + row, j = col0 + col;
      R g = a.residual ? a.residual[i * a.residual_stride + j] : R(0);
      for (int k = 0; k < a.count; ++k) {
        const R logit = x[k].at(row, col);
        const Pull<R> of_row = a.pulls[k][0].load(i), of_col = a.pulls[k][1].load(j);
        g += a.labels[0][i] == j ? of_row.positive : pulled(logit, of_row);
        g += a.labels[1][j] == i ? of_col.positive : pulled(logit, of_col);
      }
      from_real(g * *a.unit, static_cast<S*>(a.out)[i * a.out_stride + j]);
    }
  }
}

}  // namespace

void similarity_statistics(const Matrices& logits, const Matrices& labels, const Matrices& parts,
                           const Matrices& outs, Cpu place) {
  expect(logits.size() >= 3, "similarity: no matrix came");
  with_real(logits[2], [&](auto number) {
    using R = decltype(number);
    const Statistics<R> a = unpack_statistics<R>(logits, labels, parts, outs);
    each_tile(a, place.threads, [&](int64_t row0, int64_t col0) {
      const Tile<R> z = make_tile(a, logits, 0, row0, col0);
      reduce(a, 0, z, z);
      if (a.count > 1) reduce(a, 1, z, make_tile(a, logits, 1, row0, col0));
    });
  });
}

void similarity_finalise(const Matrices& parts, const Matrices& outs, bool fresh, Cpu place) {
  expect(parts.size() == 4 && outs.size() == 4, "similarity: expected four sides");
  for (int i = 0; i < 4; ++i) {
    with_real(outs[i], [&](auto number) {
      using R = decltype(number);
      const Side<R> side = unpack_side<R>(parts[i], outs[i], outs[i].cols, -1);
      if (!side.parts) return;
      const int64_t first = fresh || i % 2 == 0;
#pragma omp parallel for num_threads(place.threads)
      for (int64_t item = 0; item < side.items; ++item)
        side.finish(item, side.gather(item, first, 1));
    });
  }
}

void similarity_gradient(const Matrices& logits, const Matrices& labels, const Matrices& pulls,
                         const Matrix& residual, const Matrix& unit, const Matrix& out, Cpu place) {
  with_real(unit, [&](auto number) {
    using R = decltype(number);
    const Gradient<R> a = unpack_gradient<R>(logits, labels, pulls, residual, unit, out);
    with_strip(out, [&](auto* s) {
      using S = std::remove_pointer_t<decltype(s)>;
      if constexpr (sizeof(R) == 8 || sizeof(S) < 8) {
        each_tile(a, place.threads,
                  [&](int64_t row0, int64_t col0) { write_tile<R, S>(a, logits, row0, col0); });
      } else {
        expect(false, "similarity: expected a float64 scale for a float64 strip");
      }
    });
  });
}

}  // namespace kdengine
