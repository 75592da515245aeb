// SPDX-License-Identifier: Apache-2.0
// The product of a block: 128 x 128 of left @ right.T by tensor cores, 256 threads.
//
// Code of a block is written once over B, which is block.cuh on the device, where one thread runs
// it, and emulated.h on the host, where a loop over threads does. What belongs to a thread is
// B::Own<T>, indexed by the thread's number; `each` runs a phase; what warps do together (copies,
// ldmatrix, mma, sums over lanes) are members of B. A phase must not read what another thread
// writes in it.
//
// Operands pass through shared memory in stages of 128 bytes of each row. Of a row's eight pieces
// of 16 bytes, piece p lies at p ^ (row % 8): no two rows of an 8 x 8 matrix share banks.
#pragma once

#include "similarity.h"

// A thread's registers have no addresses: loops over them are unrolled on the device, on the host
// that would only take time.
#ifdef __CUDACC__
#define KD_BLOCK __device__ __forceinline__
#define KD_PRAGMA(text) _Pragma(#text)
#define KD_FLAT _Pragma("unroll")
#define KD_FLAT_TO(times) KD_PRAGMA(unroll(times))
#else
#define KD_BLOCK inline
#define KD_FLAT
#define KD_FLAT_TO(times)
#endif

namespace kdengine {

constexpr int kThreads = 256;  // 2 x 4 warps, 64 x 32 of the tile each
constexpr int kStages = 3;
constexpr int kPiece = 16, kStageWidth = 128;
constexpr int kStageBytes = 2 * kTile * kStageWidth;
constexpr int kRowFrags = 4, kColFrags = 4;  // of a warp: 16 rows, 8 columns each

// A thread's part of a tile. Element (i, j, e) lies at the row and column below.
struct Accumulator {
  float x[kRowFrags][kColFrags][4];
};

KD_HD int row_of(int thread, int i, int e) {
  return thread / 128 * 64 + i * 16 + thread % 32 / 4 + e / 2 * 8;
}
KD_HD int col_of(int thread, int j, int e) {
  return thread / 32 % 4 * 32 + j * 8 + thread % 4 * 2 + e % 2;
}

// Bytes from a stage's begin to a piece of a row; rows from 128 on are those of `right`.
KD_HD int place_of(int row, int piece) { return row * kStageWidth + (piece ^ (row % 8)) * kPiece; }

struct Quad {
  uint32_t x[4];
};
struct Fragments {
  Quad left[kRowFrags], right[kColFrags / 2];
};

// tf32 keeps 10 bits behind the point: the nearest such number, of two the one away from 0
KD_HD uint32_t to_tf32(float x) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
#endif
}

// x = tf32 + tf32, up to 2^-22 of x
KD_HD void split(const Quad& x, Quad& big, Quad& small) {
  KD_FLAT
  for (int i = 0; i < 4; ++i) {
    const float whole = bit_cast<float>(x.x[i]);
    big.x[i] = to_tf32(whole);
    small.x[i] = to_tf32(whole - bit_cast<float>(big.x[i]));
  }
}

// Starts the copies of one stage: what lies past the edges becomes 0.
template <typename B>
KD_BLOCK void load_stage(B& block, const Operand& left, const Operand& right, int64_t row0,
                         int64_t col0, int step, char* stage) {
  const Operand* operands[2] = {&left, &right};
  const int64_t firsts[2] = {row0, col0};
  KD_FLAT
  for (int k = 0; k < 2; ++k) {
    const Operand& from = *operands[k];
    // within a tile offsets are short
    const char* tile = from.data + firsts[k] * from.stride;
    const int stride = static_cast<int>(from.stride);
    const int64_t left_over = from.rows - firsts[k];
    const int num_rows = left_over < kTile ? static_cast<int>(left_over) : kTile;
    block.each([&](int thread) {
      const int piece = thread % 8, at = step * kStageWidth + piece * kPiece;
      KD_FLAT
      for (int i = 0; i < kTile; i += kThreads / 8) {
        const int row = i + thread / 8;
        const bool is_here = row < num_rows && at < from.width;
        block.copy(stage + place_of(k * kTile + row, piece),
                   tile + (is_here ? row * stride + at : 0), is_here);
      }
    });
  }
}

// All products of a stage.
template <typename S, typename B>
KD_BLOCK void multiply_stage(B& block, const char* stage,
                             typename B::template Own<Accumulator>& sum) {
  // not unrolled further: it takes registers, and for float code
  KD_FLAT_TO(sizeof(S) == 2 ? 2 : 1)
  for (int k = 0; k < kStageWidth / (2 * kPiece); ++k) {
    typename B::template Own<Fragments> own;
    KD_FLAT
    for (int i = 0; i < kRowFrags; ++i)
      block.ldmatrix(
          [&](int thread) {
            const int lane = thread % 32;
            return stage + place_of(thread / 128 * 64 + i * 16 + lane % 16, 2 * k + lane / 16);
          },
          [&](int thread) -> Quad& { return own[thread].left[i]; });
    KD_FLAT
    for (int j = 0; j < kColFrags / 2; ++j)
      block.ldmatrix(
          [&](int thread) {
            const int lane = thread % 32, row = lane % 8 + lane / 16 * 8;
            return stage +
                   place_of(kTile + thread / 32 % 4 * 32 + j * 16 + row, 2 * k + lane / 8 % 2);
          },
          [&](int thread) -> Quad& { return own[thread].right[j]; });
    if constexpr (sizeof(S) == 2) {
      KD_FLAT
      for (int i = 0; i < kRowFrags; ++i) KD_FLAT
      for (int j = 0; j < kColFrags; ++j)
        block.template mma<S>([&](int t) -> float (&)[4] { return sum[t].x[i][j]; },
                              [&](int t) -> const Quad& { return own[t].left[i]; },
                              [&](int t) { return &own[t].right[j / 2].x[j % 2 * 2]; });
    } else {
      typename B::template Own<Quad> big[kColFrags / 2], small[kColFrags / 2], high, low;
      KD_FLAT
      for (int j = 0; j < kColFrags / 2; ++j)
        block.each([&](int t) { split(own[t].right[j], big[j][t], small[j][t]); });
      KD_FLAT
      for (int i = 0; i < kRowFrags; ++i) {
        block.each([&](int t) { split(own[t].left[i], high[t], low[t]); });
        KD_FLAT
        for (int j = 0; j < kColFrags; ++j) {
          const auto into = [&](int t) -> float (&)[4] { return sum[t].x[i][j]; };
          const auto multiply = [&](auto& a, auto& b) {
            block.template mma<S>(
                into, [&](int t) -> const Quad& { return a[t]; },
                [&](int t) { return &b[j / 2][t].x[j % 2 * 2]; });
          };
          // the smallest first
          multiply(low, big);
          multiply(high, small);
          multiply(high, big);
        }
      }
    }
  }
}

// The tile at (row0, col0), in full precision; `stages` are kStages * kStageBytes of shared memory,
// which others may use afterwards.
template <typename S, typename B>
KD_BLOCK void multiply(B& block, const Operand& left, const Operand& right, int64_t row0,
                       int64_t col0, char* stages, typename B::template Own<Accumulator>& sum) {
  block.each([&](int t) { sum[t] = {}; });
  const int num_steps = (left.width + kStageWidth - 1) / kStageWidth;
  const auto load = [&](int step) {
    if (step < num_steps)
      load_stage(block, left, right, row0, col0, step, stages + step % kStages * kStageBytes);
    // an empty group, too, so that a number of groups is a number of steps
    block.commit();
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < num_steps; ++step) {
    block.template wait<kStages - 2>();
    block.sync();
    // into the stage of the step before, which all have left behind
    load(step + kStages - 1);
    multiply_stage<S>(block, stages + step % kStages * kStageBytes, sum);
  }
  block.template wait<0>();
  block.sync();
}

}  // namespace kdengine
