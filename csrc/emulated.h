// SPDX-License-Identifier: Apache-2.0
// A block of a GPU on the host: what csrc/block.cuh does by instructions, written out from the PTX
// specification, for all threads in turn. It proves layouts, edges and stages, not synchronisation:
// phases run one after another here whether or not they are separated by a barrier.
#pragma once

#include <array>
#include <deque>
#include <vector>

#include "tile.h"

namespace kdengine {

class EmulatedBlock {
 public:
  template <typename T>
  using Own = std::array<T, kThreads>;

  explicit EmulatedBlock(bool late) : late_(late) {}

  template <typename F>
  void each(F&& f) {
    for (int thread = 0; thread < kThreads; ++thread) f(thread);
  }

  void sync() {}

  template <typename F>
  bool any(F&& f) {
    bool found = false;
    each([&](int thread) { found |= f(thread); });
    return found;
  }

  // cp.async of 16 bytes; zeros where nothing is there
  void copy(char* to, const char* from, bool is_there) {
    pending_.push_back({to, is_there ? from : nullptr});
    if (!late_) finish(pending_), pending_.clear();
  }
  void commit() {
    groups_.push_back(pending_);
    pending_.clear();
  }
  // until at most so many groups are under way
  template <int LEFT>
  void wait() {
    for (; groups_.size() > LEFT; groups_.pop_front()) finish(groups_.front());
  }

  // ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8, and of each matrix gets
  // the 32 bits at row l / 4, place l % 4
  template <typename From, typename To>
  void ldmatrix(From&& from, To&& to) {
    for (int warp = 0; warp < kThreads; warp += 32) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const char* row = from(warp + i * 8 + lane / 4);
          memcpy(&to(warp + lane).x[i], row + lane % 4 * 4, 4);
        }
      }
    }
  }

  // mma.sync.aligned.m16n8k16.row.col (two elements a register) or m16n8k8 (tf32)
  template <typename S, typename C, typename A, typename E>
  void mma(C&& sum, A&& left, E&& right) {
    constexpr int per = 4 / sizeof(S), depth = 8 * per;
    for (int warp = 0; warp < kThreads; warp += 32) {
      float a[16][depth], b[depth][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, place = lane % 4;
        for (int i = 0; i < 4; ++i)
          for (int e = 0; e < per; ++e)
            a[group + i % 2 * 8][i / 2 * 4 * per + place * per + e] =
                element<S>(left(warp + lane).x[i], e);
        for (int i = 0; i < 2; ++i)
          for (int e = 0; e < per; ++e)
            b[i * 4 * per + place * per + e][group] = element<S>(right(warp + lane)[i], e);
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int e = 0; e < 4; ++e) {
          float total = 0;
          for (int k = 0; k < depth; ++k)
            total += a[lane / 4 + e / 2 * 8][k] * b[k][lane % 4 * 2 + e % 2];
          sum(warp + lane)[e] += total;
        }
      }
    }
  }

  // over lanes whose numbers differ in the bits of `mask`: all of them get op of all
  template <int MASK, typename X, typename Op>
  void combine(X&& x, Op&& op) {
    for (int bit = 1; bit < 32; bit *= 2) {
      if (!(MASK & bit)) continue;
      Own<float> other;
      each([&](int thread) { other[thread] = x(thread ^ bit); });
      each([&](int thread) { x(thread) = op(x(thread), other[thread]); });
    }
  }

 private:
  struct Copy {
    char* to;
    const char* from;
  };

  static void finish(const std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
      if (copy.from) {
        memcpy(copy.to, copy.from, kPiece);
      } else {
        memset(copy.to, 0, kPiece);
      }
    }
  }

  template <typename S>
  static float element(uint32_t bits, int e) {
    if constexpr (sizeof(S) == 4) {
      // what tf32 does not hold is not looked at
      return bit_cast<float>(bits & ~0x1fffu);
    } else {
      return to_real(S{static_cast<uint16_t>(bits >> (16 * e))});
    }
  }

  bool late_;
  std::vector<Copy> pending_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace kdengine
