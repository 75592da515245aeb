// SPDX-License-Identifier: Apache-2.0
// The op `similarity` as a block does it, a tile a block; written over B as tile.h is.
#pragma once

#include "tile.h"

namespace kdengine {

constexpr int kItems = 2 * kTile;  // of a tile: its rows, then its columns; a thread each
static_assert(kItems == kThreads);
constexpr int kSlots = 1 + kMaxWeighted;
// sums of a tile's rows by the four columns of warps, of its columns by the two rows of warps
constexpr int kRowParts = 4, kColParts = 2;

// Beside the stages. A label is a place in the tile, or none.
struct Items {
  int label[kItems];
};
constexpr int kNone = -1;

// In the stages' place, once the products are done.
struct Partial {
  float rows[kSlots][kRowParts][kTile];
  float cols[kSlots][kColParts][kTile];
  float top[kItems];
};
// A side's part of the gradient, of the first matrix and of the second.
struct Pulls {
  float lse[2][kItems], weight[2][kItems], coefficient[2][kItems], positive[2][kItems];
};
constexpr int kSharedBytes = kStages * kStageBytes + sizeof(Items);
static_assert(sizeof(Partial) <= kStages * kStageBytes);

// Tiles in an order that keeps the operands of neighbours in the cache: 8 rows of tiles at a time.
KD_HD void tile_at(int64_t number, int64_t rows, int64_t cols, int& row, int& col) {
  constexpr int64_t group = 8;
  const int64_t first = number / (group * cols) * group;
  const int64_t height = rows - first < group ? rows - first : group;
  row = static_cast<int>(first + number % (group * cols) % height);
  col = static_cast<int>(number % (group * cols) / height);
}

// A tile of one of the matrices, where a block works on it.
struct Place {
  int64_t row0, col0, rows, cols;
  bool is_whole;

  template <typename R>
  KD_HD Place(const Logits<R>& a, int row, int col)
      : row0(int64_t(row) * kTile),
        col0(int64_t(col) * kTile),
        rows(a.rows),
        cols(a.cols),
        is_whole(row0 + kTile <= rows && col0 + kTile <= cols) {}

  // which row (i = 0) or column (i = 1) is a thread's item, and whether it is there
  KD_HD int64_t item(int thread) const {
    return thread < kTile ? row0 + thread : col0 + thread - kTile;
  }
  KD_HD bool is_here(int thread) const { return item(thread) < (thread < kTile ? rows : cols); }
};

// Looks up the items' labels; whether one names a cell of this tile.
template <typename B>
KD_BLOCK bool load_labels(B& block, const Logits<float>& a, const Place& at, Items& items) {
  return block.any([&](int t) {
    const int64_t label = at.is_here(t) ? a.labels[t / kTile][at.item(t)] : kNone;
    const int64_t place = label - (t < kTile ? at.col0 : at.row0);
    const bool is_inside = label < (t < kTile ? at.cols : at.rows) && place >= 0 && place < kTile;
    items.label[t] = is_inside ? static_cast<int>(place) : kNone;
    return is_inside;
  });
}

// Logits in place of cosines; past the edges what adds nothing.
template <typename B>
KD_BLOCK void scale_tile(B& block, float scale, const Place& at,
                         typename B::template Own<Accumulator>& x) {
  block.each([&](int t) {
    KD_FLAT
    for (int i = 0; i < kRowFrags; ++i) KD_FLAT
    for (int j = 0; j < kColFrags; ++j) KD_FLAT
    for (int e = 0; e < 4; ++e) x[t].x[i][j][e] *= scale;
  });
  if (at.is_whole) return;
  block.each([&](int t) {
    KD_FLAT
    for (int i = 0; i < kRowFrags; ++i) KD_FLAT
    for (int j = 0; j < kColFrags; ++j) KD_FLAT
    for (int e = 0; e < 4; ++e)
      if (at.row0 + row_of(t, i, e) >= at.rows || at.col0 + col_of(t, j, e) >= at.cols)
        x[t].x[i][j][e] = kLowest<float>;
  });
}

struct Add {
  KD_HD float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  KD_HD float operator()(float a, float b) const { return larger(a, b); }
};

// Reduces SLOTS numbers a cell along rows and along columns, into `to`.
//   cell(t, i, j, e, of_row, of_col): the numbers that count for its row and for its column
template <int SLOTS, typename Op, typename B, typename F>
KD_BLOCK void reduce_tile(B& block, float start, Partial& to, F&& cell) {
  struct Sums {
    float x[SLOTS][2 * kColFrags];
  };
  struct Pair {
    float x[SLOTS][2];
  };
  typename B::template Own<Sums> cols;
  block.each([&](int t) {
    KD_FLAT
    for (int k = 0; k < SLOTS; ++k) KD_FLAT
    for (int c = 0; c < 2 * kColFrags; ++c) cols[t].x[k][c] = start;
  });
  KD_FLAT
  for (int i = 0; i < kRowFrags; ++i) {
    typename B::template Own<Pair> rows;
    block.each([&](int t) {
      KD_FLAT
      for (int k = 0; k < SLOTS; ++k) rows[t].x[k][0] = rows[t].x[k][1] = start;
      KD_FLAT
      for (int j = 0; j < kColFrags; ++j) {
        KD_FLAT
        for (int e = 0; e < 4; ++e) {
          float of_row[SLOTS], of_col[SLOTS];
          cell(t, i, j, e, of_row, of_col);
          KD_FLAT
          for (int k = 0; k < SLOTS; ++k) {
            float &row = rows[t].x[k][e / 2], &col = cols[t].x[k][2 * j + e % 2];
            row = Op()(row, of_row[k]);
            col = Op()(col, of_col[k]);
          }
        }
      }
    });
    KD_FLAT
    for (int k = 0; k < SLOTS; ++k) {
      KD_FLAT
      for (int half = 0; half < 2; ++half) {
        // the four lanes of a row
        block.template combine<3>([&](int t) -> float& { return rows[t].x[k][half]; }, Op());
        block.each([&](int t) {
          if (t % 4 == 0) to.rows[k][t / 32 % 4][row_of(t, i, 2 * half)] = rows[t].x[k][half];
        });
      }
    }
  }
  KD_FLAT
  for (int k = 0; k < SLOTS; ++k) {
    KD_FLAT
    for (int c = 0; c < 2 * kColFrags; ++c) {
      // the eight lanes of a column
      block.template combine<28>([&](int t) -> float& { return cols[t].x[k][c]; }, Op());
      block.each([&](int t) {
        if (t % 32 < 4) to.cols[k][t / 128][col_of(t, c / 2, c % 2)] = cols[t].x[k][c];
      });
    }
  }
  block.sync();
}

// An item's number, of all warps, in a fixed order.
template <typename Op>
KD_HD float gathered(const Partial& from, int slot, int thread) {
  if (thread >= kTile)
    return Op()(from.cols[slot][0][thread - kTile], from.cols[slot][1][thread - kTile]);
  return Op()(Op()(from.rows[slot][0][thread], from.rows[slot][1][thread]),
              Op()(from.rows[slot][2][thread], from.rows[slot][3][thread]));
}

// The sums of a tile's rows and columns. x(t, i, j, e) is a logit, weight(k, t, i, j, e) what the
// sum of slot 1 + k weighs. Where a sum leaves the range of the shared shift, all of the tile's are
// made again, each relative to its largest term.
template <int SLOTS, typename B, typename X, typename W>
KD_BLOCK void sum_tile(B& block, float scale, const Place& at, const Items& items,
                       bool has_positives, const Side<float> (&sides)[2], Partial& partial, X&& x,
                       W&& weight) {
  const float shift = fixed_shift(scale);
  const auto is_positive_of_row = [&](int t, int i, int j, int e) {
    return items.label[row_of(t, i, e)] == col_of(t, j, e);
  };
  const auto is_positive_of_col = [&](int t, int i, int j, int e) {
    return items.label[kTile + col_of(t, j, e)] == row_of(t, i, e);
  };
  const auto weigh = [&](int t, int i, int j, int e, float of_row, float of_col,
                         float (&row)[SLOTS], float (&col)[SLOTS]) {
    row[0] = of_row;
    col[0] = of_col;
    KD_FLAT
    for (int k = 1; k < SLOTS; ++k) {
      const float w = weight(k - 1, t, i, j, e);
      row[k] = of_row * w;
      col[k] = of_col * w;
    }
  };
  if (!has_positives) {
    reduce_tile<SLOTS, Add>(
        block, 0, partial,
        [&](int t, int i, int j, int e, float (&row)[SLOTS], float (&col)[SLOTS]) {
          const float own = shifted_exp(x(t, i, j, e), shift);
          weigh(t, i, j, e, own, own, row, col);
        });
  } else {
    reduce_tile<SLOTS, Add>(
        block, 0, partial,
        [&](int t, int i, int j, int e, float (&row)[SLOTS], float (&col)[SLOTS]) {
          const float own = shifted_exp(x(t, i, j, e), shift);
          weigh(t, i, j, e, is_positive_of_row(t, i, j, e) ? 0 : own,
                is_positive_of_col(t, i, j, e) ? 0 : own, row, col);
        });
    block.each([&](int t) {
      KD_FLAT
      for (int i = 0; i < kRowFrags; ++i) KD_FLAT
      for (int j = 0; j < kColFrags; ++j) KD_FLAT
      for (int e = 0; e < 4; ++e) {
        if (sides[0].parts && is_positive_of_row(t, i, j, e))
          sides[0].put_positive(at.row0 + row_of(t, i, e), x(t, i, j, e));
        if (sides[1].parts && is_positive_of_col(t, i, j, e))
          sides[1].put_positive(at.col0 + col_of(t, j, e), x(t, i, j, e));
      }
    });
  }
  const bool again = block.any([&](int t) {
    return at.is_here(t) && sides[t / kTile].parts && !is_whole(gathered<Add>(partial, 0, t));
  });
  if (again) {
    // what is past the edges, too, stays out
    const auto of_row = [&](int t, int i, int j, int e) {
      return is_positive_of_row(t, i, j, e) ? kLowest<float> : x(t, i, j, e);
    };
    const auto of_col = [&](int t, int i, int j, int e) {
      return is_positive_of_col(t, i, j, e) ? kLowest<float> : x(t, i, j, e);
    };
    reduce_tile<1, Larger>(block, kLowest<float>, partial,
                           [&](int t, int i, int j, int e, float (&row)[1], float (&col)[1]) {
                             row[0] = of_row(t, i, j, e);
                             col[0] = of_col(t, i, j, e);
                           });
    block.each([&](int t) { partial.top[t] = gathered<Larger>(partial, 0, t); });
    block.sync();
    const auto relative = [&](float logit, float top) {
      return logit > kLowest<float> ? shifted_exp(logit, top) : 0;
    };
    reduce_tile<SLOTS, Add>(
        block, 0, partial,
        [&](int t, int i, int j, int e, float (&row)[SLOTS], float (&col)[SLOTS]) {
          weigh(t, i, j, e, relative(of_row(t, i, j, e), partial.top[row_of(t, i, e)]),
                relative(of_col(t, i, j, e), partial.top[kTile + col_of(t, j, e)]), row, col);
        });
  }
  block.each([&](int t) {
    const Side<float>& side = sides[t / kTile];
    if (!side.parts || !at.is_here(t)) return;
    Sums<float> sums = {again ? partial.top[t] : shift, 0, {}};
    sums.total = gathered<Add>(partial, 0, t);
    KD_FLAT
    for (int k = 1; k < SLOTS; ++k) sums.weighted[k - 1] = gathered<Add>(partial, k, t);
    side.store(1 + (t < kTile ? at.col0 : at.row0) / kTile, at.item(t), sums);
  });
  block.sync();
}

// One tile of the statistics sweep: of a student of element S, and a teacher of T unless void.
template <typename S, typename T, typename B>
KD_BLOCK void statistics_tile(B& block, const Statistics<float>& a, int row, int col,
                              char* shared) {
  const Place at(a, row, col);
  Items& items = *reinterpret_cast<Items*>(shared + kStages * kStageBytes);
  Partial& partial = *reinterpret_cast<Partial*>(shared);
  typename B::template Own<Accumulator> z;
  multiply<S>(block, a.left[0], a.right[0], at.row0, at.col0, shared, z);
  const bool has_positives = load_labels(block, a, at, items);
  scale_tile(block, *a.scale[0], at, z);
  if (a.sides[0][0].parts || a.sides[0][1].parts) {
    const auto logit = [&](int t, int i, int j, int e) { return z[t].x[i][j][e]; };
    sum_tile<2>(block, *a.scale[0], at, items, has_positives, a.sides[0], partial, logit,
                [&](int, int t, int i, int j, int e) { return logit(t, i, j, e); });
  }
  if constexpr (!std::is_void_v<T>) {
    typename B::template Own<Accumulator> x;
    multiply<T>(block, a.left[1], a.right[1], at.row0, at.col0, shared, x);
    scale_tile(block, *a.scale[1], at, x);
    const auto logit = [&](int t, int i, int j, int e) { return x[t].x[i][j][e]; };
    sum_tile<3>(block, *a.scale[1], at, items, has_positives, a.sides[1], partial, logit,
                [&](int k, int t, int i, int j, int e) {
                  return k ? logit(t, i, j, e) : logit(t, i, j, e) - z[t].x[i][j][e];
                });
  }
}

// What a cell's row and column pull, of `count` matrices, where sides share no exponential or the
// cell is a positive.
template <typename X>
KD_BLOCK float pulled_cell(const Pulls& pulls, const Items& items, int count, int row, int col,
                           X&& x) {
  float g = 0;
  for (int side = 0; side < 2; ++side) {
    const int item = side ? kTile + col : row;
    const bool is_positive = items.label[item] == (side ? row : col);
    for (int k = 0; k < count; ++k)
      g += is_positive ? pulls.positive[k][item]
                       : pulled(x(k), Pull<float>{pulls.lse[k][item], pulls.weight[k][item], 0});
  }
  return g;
}

// Writes a tile through shared memory, in pieces of 16 bytes where they are whole.
template <typename O, typename B, typename F>
KD_BLOCK void store_tile(B& block, const Gradient<float>& a, const Place& at, char* shared,
                         F&& cell) {
  // rows a piece apart from a power of two, against conflicts of banks
  constexpr int stride = kTile + kPiece / sizeof(O), per = kPiece / sizeof(O);
  O* tile = reinterpret_cast<O*>(shared);
  static_assert(kTile * stride * sizeof(O) <= kStages * kStageBytes);
  block.each([&](int t) {
    KD_FLAT
    for (int i = 0; i < kRowFrags; ++i) KD_FLAT
    for (int j = 0; j < kColFrags; ++j) KD_FLAT
    for (int e = 0; e < 4; ++e)
      from_real(cell(t, i, j, e), tile[row_of(t, i, e) * stride + col_of(t, j, e)]);
  });
  block.sync();
  block.each([&](int t) {
    O* out = static_cast<O*>(a.out);
    for (int piece = t; piece < kTile * kTile / per; piece += kThreads) {
      const int row = piece / (kTile / per), col = piece % (kTile / per) * per;
      const int64_t i = at.row0 + row, j = at.col0 + col;
      if (i >= at.rows) continue;
      const O* from = tile + row * stride + col;
      O* to = out + i * a.out_stride + j;
      if (j + per <= at.cols) {
        struct alignas(kPiece) Piece {
          O x[per];
        };
        *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
      } else {
        for (int k = 0; k < per && j + k < at.cols; ++k) to[k] = from[k];
      }
    }
  });
}

// One tile of the gradient strip, written in O: of a matrix of element S, and one of T unless void.
template <typename S, typename T, typename O, typename B>
KD_BLOCK void gradient_tile(B& block, const Gradient<float>& a, int row, int col, char* shared) {
  constexpr int count = std::is_void_v<T> ? 1 : 2;
  const Place at(a, row, col);
  Items& items = *reinterpret_cast<Items*>(shared + kStages * kStageBytes);
  // behind the tile that store_tile has there
  constexpr int behind = kStages * kStageBytes - sizeof(Pulls);
  static_assert(kTile * (kTile + kPiece / sizeof(O)) * sizeof(O) <= behind);
  Pulls& pulls = *reinterpret_cast<Pulls*>(shared + behind);
  typename B::template Own<Accumulator> x[count];
  multiply<S>(block, a.left[0], a.right[0], at.row0, at.col0, shared, x[0]);
  if constexpr (count > 1)
    multiply<T>(block, a.left[1], a.right[1], at.row0, at.col0, shared, x[1]);
  // looked up behind the products, whose loops need all registers
  const bool has_positives = load_labels(block, a, at, items);
  const float shift[2] = {fixed_shift(*a.scale[0]), fixed_shift(*a.scale[count - 1])};
  const float scale[2] = {*a.scale[0], *a.scale[count - 1]};
  const bool is_far = block.any([&](int t) {
    bool far = false;
    KD_FLAT
    for (int k = 0; k < count; ++k) {
      const Pull<float> pull =
          at.is_here(t) ? a.pulls[k][t / kTile].load(at.item(t)) : Pull<float>{-INFINITY, 0, 0};
      pulls.lse[k][t] = pull.lse;
      pulls.weight[k][t] = pull.weight;
      pulls.positive[k][t] = pull.positive;
      pulls.coefficient[k][t] = coefficient(pull, shift[k]);
      far = far || !is_near(pull.lse, shift[k]);
    }
    return far;
  });
  const float unit = *a.unit;
  const float* residual = a.residual ? a.residual + at.row0 * a.residual_stride + at.col0 : nullptr;
  const int rows_here = static_cast<int>(at.rows - at.row0);
  const int cols_here = static_cast<int>(at.cols - at.col0);
  const auto rest = [&](int t, int i, int j, int e) {
    const int r = row_of(t, i, e), c = col_of(t, j, e);
    return residual && r < rows_here && c < cols_here ? residual[r * a.residual_stride + c] : 0;
  };
  if (has_positives || is_far) {
    store_tile<O>(block, a, at, shared, [&](int t, int i, int j, int e) {
      const float g = pulled_cell(pulls, items, count, row_of(t, i, e), col_of(t, j, e),
                                  [&](int k) { return scale[k] * x[k][t].x[i][j][e]; });
      return unit * (g + rest(t, i, j, e));
    });
  } else {
    store_tile<O>(block, a, at, shared, [&](int t, int i, int j, int e) {
      float g = rest(t, i, j, e);
      KD_FLAT
      for (int k = 0; k < count; ++k)
        g +=
            shifted_exp(scale[k] * x[k][t].x[i][j][e], shift[k]) *
            (pulls.coefficient[k][row_of(t, i, e)] + pulls.coefficient[k][kTile + col_of(t, j, e)]);
      return unit * g;
    });
  }
}

}  // namespace kdengine
