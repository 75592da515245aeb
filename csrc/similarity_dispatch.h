// SPDX-License-Identifier: Apache-2.0
// Which of the blocks' functions runs, and how partial sums are shared among threads; common to the
// GPU and its emulation.
#pragma once

#include "similarity_tile.h"

namespace kdengine {

// f(element, element of the second matrix or void): two matrices have one.
template <typename F>
void with_elements(const Matrices& logits, F&& f) {
  with_element("similarity", logits[0], [&](auto* s) {
    if (logits.size() == 3) return f(s, static_cast<void*>(nullptr));
    expect(logits[3].dtype == logits[0].dtype, "similarity: expected a second matrix of ",
           name_of(logits[0].dtype), "; ", shape_of(logits[3]), " came");
    f(s, s);
  });
}

// f(elements as above, element of the strip), which is theirs or, of one matrix, float.
template <typename F>
void with_strip(const Matrices& logits, const Matrix& out, F&& f) {
  with_elements(logits, [&](auto* s, auto* t) {
    if (out.dtype == logits[0].dtype) return f(s, t, s);
    expect(out.dtype == Dtype::f32 && logits.size() == 3, "similarity: expected a strip of ",
           name_of(logits[0].dtype), ", or of float32 and one matrix; ", shape_of(out), " came");
    if constexpr (sizeof(*s) == 2 && std::is_void_v<std::remove_pointer_t<decltype(t)>>)
      f(s, t, static_cast<float*>(nullptr));
  });
}

constexpr int kGroups = 8;  // of threads that share the parts of an item

struct Finalise {
  Side<float> sides[4];
  bool fresh;

  KD_HD Sums<float> group(int side, int64_t item, int group) const {
    // part 0 of rows, and of fresh columns, is nothing
    return sides[side].gather(item, (fresh || side % 2 == 0) + group, kGroups);
  }
  template <typename F>
  KD_HD void finish(int side, int64_t item, F&& of_group) const {
    Sums<float> sums = of_group(0);
    for (int i = 1; i < kGroups; ++i) merge(sums, of_group(i));
    sides[side].finish(item, sums);
  }
};

inline Finalise unpack_finalise(const Matrices& parts, const Matrices& outs, bool fresh) {
  expect(parts.size() == 4 && outs.size() == 4, "similarity: expected four sides");
  Finalise to = {};
  to.fresh = fresh;
  for (int i = 0; i < 4; ++i) to.sides[i] = unpack_side<float>(parts[i], outs[i], outs[i].cols, -1);
  return to;
}

}  // namespace kdengine
