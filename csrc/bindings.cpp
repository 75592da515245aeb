// SPDX-License-Identifier: Apache-2.0
// The Python module kdengine._C. Tensors come as addresses, so that no torch header is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "feature.h"
#include "moments.h"
#include "similarity.h"
#include "terms.h"

namespace py = pybind11;
using namespace kdengine;

using Many = const Matrices&;
using One = const Matrix&;

template <typename Place>
void bind_similarity(py::module_& m) {
  m.def("similarity_statistics",
        py::overload_cast<Many, Many, Many, Many, Place>(&similarity_statistics),
        py::call_guard<py::gil_scoped_release>());
  m.def("similarity_finalise", py::overload_cast<Many, Many, bool, Place>(&similarity_finalise),
        py::call_guard<py::gil_scoped_release>());
  m.def("similarity_gradient",
        py::overload_cast<Many, Many, Many, One, One, One, Place>(&similarity_gradient),
        py::call_guard<py::gil_scoped_release>());
}

template <typename Place>
void bind_terms(py::module_& m) {
  m.def(
      "terms_forward",
      [](Many rows, Many cols, Many labels, const Integers& limits, const Reals& shares,
         const Flags& hard, const Flags& soft, One values, One entropies, Place place) {
        terms_forward({rows, cols, labels, limits, shares, hard, soft}, values, entropies, place);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "terms_backward",
      [](One grads, Many rows, Many cols, Many labels, const Integers& limits, const Reals& shares,
         const Flags& hard, const Flags& soft, Many outs, Place place) {
        terms_backward(grads, {rows, cols, labels, limits, shares, hard, soft}, outs, place);
      },
      py::call_guard<py::gil_scoped_release>());
}

template <typename Place>
void bind_ops(py::module_& m) {
  bind_similarity<Place>(m);
  bind_terms<Place>(m);
  m.def("feature_forward", py::overload_cast<Many, Many, One, Many, bool, Place>(&feature_forward),
        py::call_guard<py::gil_scoped_release>());
  m.def("feature_backward",
        py::overload_cast<Many, Many, One, Many, Many, bool, Place>(&feature_backward),
        py::call_guard<py::gil_scoped_release>());
  m.def("moments_forward", py::overload_cast<Many, One, One, Place>(&moments_forward),
        py::call_guard<py::gil_scoped_release>());
  m.def("moments_backward", py::overload_cast<One, One, One, One, Place>(&moments_backward),
        py::call_guard<py::gil_scoped_release>());
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of kdengine in C++ and CUDA; see csrc/README.md.";
  py::enum_<Dtype>(m, "Dtype")
      .value("float64", Dtype::f64)
      .value("float32", Dtype::f32)
      .value("bfloat16", Dtype::bf16)
      .value("float16", Dtype::f16)
      .value("int32", Dtype::i32)
      .value("int64", Dtype::i64);
  py::class_<Matrix>(m, "Matrix")
      .def(py::init([](uintptr_t data, int64_t rows, int64_t cols, int64_t stride, Dtype dtype) {
        return Matrix{reinterpret_cast<void*>(data), rows, cols, stride, dtype};
      }));
  py::class_<Cpu>(m, "Cpu").def(py::init<int>(), py::arg("threads"));
  bind_ops<Cpu>(m);
  py::class_<Emulated>(m, "Emulated").def(py::init<bool>(), py::arg("late"));
  bind_similarity<Emulated>(m);
#ifdef KDENGINE_WITH_CUDA
  py::class_<Cuda>(m, "Cuda").def(py::init<uintptr_t, int>(), py::arg("stream"), py::arg("device"));
  bind_ops<Cuda>(m);
#endif
  // the architectures that it was built for, nothing without CUDA
  m.attr("architectures") = KDENGINE_ARCHITECTURES;
}
