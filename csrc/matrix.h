// SPDX-License-Identifier: Apache-2.0
// A matrix as Python hands it over, where it lies, and how a wrong one is refused.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "element.h"

namespace kdengine {

enum class Dtype { f64, f32, bf16, f16, i32, i64 };

inline const char* name_of(Dtype dtype) {
  static const char* const names[] = {"float64", "float32", "bfloat16",
                                      "float16", "int32",   "int64"};
  return names[static_cast<int>(dtype)];
}

inline int64_t size_of(Dtype dtype) {
  static const int64_t sizes[] = {8, 4, 2, 2, 4, 8};
  return sizes[static_cast<int>(dtype)];
}

inline bool is_integer(Dtype dtype) { return dtype == Dtype::i32 || dtype == Dtype::i64; }

// Row-major: element (i, j) is data[i * stride + j].
struct Matrix {
  void* data;
  int64_t rows, cols, stride;
  Dtype dtype;
};

using Matrices = std::vector<Matrix>;

// Of an input or result that a call leaves out.
KD_HD bool is_absent(const Matrix& x) { return x.rows == 0 || x.cols == 0; }

// Row `row`, or null where the matrix is absent.
template <typename T>
KD_HD T* row_of(const Matrix& x, int64_t row) {
  return is_absent(x) ? nullptr : static_cast<T*>(x.data) + row * x.stride;
}

// Whether every row begins at a multiple of 16 bytes.
inline bool is_aligned(const Matrix& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * size_of(x.dtype) % 16 == 0;
}

inline std::string shape_of(const Matrix& x) {
  std::ostringstream text;
  text << "(" << x.rows << ", " << x.cols << ") " << name_of(x.dtype);
  return text.str();
}

struct Cpu {
  int threads;
};

struct Cuda {
  uintptr_t stream;  // a cudaStream_t of the device
  int device;
};

// Raises ValueError in Python; the message says who, what was expected and what came.
template <typename... Words>
void expect(bool fine, const Words&... words) {
  if (fine) return;
  std::ostringstream text;
  (text << ... << words);
  throw std::invalid_argument(text.str());
}

// Calls f with a null pointer of the matrix's element type.
template <typename F>
void with_element(const char* who, const Matrix& x, F&& f) {
  switch (x.dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<Bf16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<Fp16*>(nullptr));
    default:
      expect(false, who, ": expected float32, bfloat16 or float16; ", shape_of(x), " came");
  }
}

}  // namespace kdengine
