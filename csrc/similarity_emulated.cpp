// SPDX-License-Identifier: Apache-2.0
// The op `similarity` as a GPU's blocks do it, emulated; for tests.
#include <limits>

#include "emulated.h"
#include "similarity_dispatch.h"

namespace kdengine {
namespace {

// f(block, row, column, shared memory) for every tile
template <typename F>
void each_block(const Logits<float>& a, Emulated place, F&& f) {
  const int64_t rows = num_tiles(a.rows), cols = num_tiles(a.cols);
  for (int64_t number = 0; number < rows * cols; ++number) {
    // nothing may be read that was not written
    alignas(kPiece) static thread_local char shared[kSharedBytes];
    memset(shared, 0xff, sizeof shared);
    EmulatedBlock block(place.late);
    int row, col;
    tile_at(number, rows, cols, row, col);
    f(block, row, col, shared);
  }
}

}  // namespace

void similarity_statistics(const Matrices& logits, const Matrices& labels, const Matrices& parts,
                           const Matrices& outs, Emulated place) {
  const Statistics<float> a = unpack_statistics<float>(logits, labels, parts, outs);
  with_elements(logits, [&](auto* s, auto* t) {
    each_block(a, place, [&](EmulatedBlock& block, int row, int col, char* shared) {
      statistics_tile<std::remove_pointer_t<decltype(s)>, std::remove_pointer_t<decltype(t)>>(
          block, a, row, col, shared);
    });
  });
}

void similarity_finalise(const Matrices& parts, const Matrices& outs, bool fresh, Emulated) {
  const Finalise a = unpack_finalise(parts, outs, fresh);
  for (int i = 0; i < 4; ++i) {
    for (int64_t item = 0; item < a.sides[i].items; ++item) {
      Sums<float> sums[kGroups];
      for (int group = 0; group < kGroups; ++group) sums[group] = a.group(i, item, group);
      a.finish(i, item, [&](int group) { return sums[group]; });
    }
  }
}

void similarity_gradient(const Matrices& logits, const Matrices& labels, const Matrices& pulls,
                         const Matrix& residual, const Matrix& unit, const Matrix& out,
                         Emulated place) {
  const Gradient<float> a = unpack_gradient<float>(logits, labels, pulls, residual, unit, out);
  with_strip(logits, out, [&](auto* s, auto* t, auto* o) {
    each_block(a, place, [&](EmulatedBlock& block, int row, int col, char* shared) {
      gradient_tile<std::remove_pointer_t<decltype(s)>, std::remove_pointer_t<decltype(t)>,
                    std::remove_pointer_t<decltype(o)>>(block, a, row, col, shared);
    });
  });
}

}  // namespace kdengine
