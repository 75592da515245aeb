// SPDX-License-Identifier: Apache-2.0
// The op `terms` on a CPU: the GPU's lanes and its tree, lanes over threads.
#include "terms.h"

namespace kdengine {
namespace {

template <typename F>
void with_real(const Matrix& x, F&& f) {
  x.dtype == Dtype::f64 ? f(double()) : f(float());
}

// The sum of kTermGroup, in the order of a warp's.
template <typename R>
Losses<R> sum_group(Losses<R>* found) {
  for (int apart = kTermGroup / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; ++i) found[i].add(found[i + apart]);
  return found[0];
}

}  // namespace

void terms_forward(const TermsOf& given, const Matrix& values, const Matrix& entropies, Cpu cpu) {
  const Terms a = unpack_terms(given, values, entropies, {});
  with_real(values, [&](auto number) {
    using R = decltype(number);
    for (const TermSide& side : a.sides) {
      std::vector<Losses<R>> lanes(kTermLanes);
#pragma omp parallel for num_threads(cpu.threads)
      for (int lane = 0; lane < kTermLanes; ++lane) lanes[lane] = side.of_lane<R>(lane);
      Losses<R> groups[kTermGroup];
      for (int i = 0; i < kTermGroup; ++i) groups[i] = sum_group(&lanes[i * kTermGroup]);
      side.put(sum_group(groups), values, entropies);
    }
  });
}

void terms_backward(const Matrix& grads, const TermsOf& given, const Matrices& outs, Cpu cpu) {
  const Terms a = unpack_terms(given, grads, {}, outs);
  with_real(grads, [&](auto number) {
    using R = decltype(number);
    for (const TermSide& side : a.sides) {
#pragma omp parallel for num_threads(cpu.threads)
      for (int64_t item = 0; item < side.items; ++item) side.put_gradients<R>(item, grads);
    }
  });
}

}  // namespace kdengine
