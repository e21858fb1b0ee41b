// SPDX-License-Identifier: Apache-2.0
// What the files of the executables test_kernels_* share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#include "math/half.h"
#include "run_kernels.h"

namespace tritool::testing {

// An array that owns its memory; `order` lists its dimensions from the outermost in memory to the innermost.
template <class T>
struct Owned {
  std::vector<T> memory;
  Array array;

  Owned() = default;
  Owned(Sizes size, std::vector<int> order = {}, int64_t step = 1, int64_t start = 0) {
    if (order.empty())
      for (size_t d = 0; d < size.size(); ++d) order.push_back(static_cast<int>(d));
    array.size = size;
    array.stride.assign(size.size(), 0);
    int64_t extent = 1, count = 1;
    for (size_t n = order.size(); n-- > 0;) {
      const auto d = static_cast<size_t>(order[n]);
      array.stride[d] = count * step;
      extent += (size[d] - 1) * array.stride[d];
      count *= size[d];
    }
    memory.assign(static_cast<size_t>(count == 0 ? 1 : extent + start), T{});
    array.data = memory.data() + (count == 0 ? 0 : start);
  }
  Owned(Owned&&) = default;
  Owned& operator=(Owned&&) = default;

  int64_t count() const {
    int64_t total = 1;
    for (const int64_t size : array.size) total *= size;
    return total;
  }
  // The element of row-major number `index`.
  T& operator[](int64_t index) const {
    int64_t offset = 0;
    for (size_t d = array.size.size(); d-- > 0; index /= array.size[d])
      offset += index % array.size[d] * array.stride[d];
    return array.as<T>()[offset];
  }
  template <class Function>
  Owned&& filled(Function&& value) && {
    for (int64_t index = 0; index < count(); ++index) store(&(*this)[index], Accumulator<T>(value(index)));
    return std::move(*this);
  }
};

template <class T>
Owned<T> poisoned(const Sizes& size, const std::vector<int>& order = {}, int64_t step = 1) {
  return Owned<T>(size, order, step).filled([](int64_t) { return 1e4; });
}

// NaN in the same places, and apart by no more than `bound` of the largest number.
template <class T>
bool close(const Owned<T>& a, const Owned<T>& b, double bound) {
  double scale = 0, apart = 0;
  for (int64_t index = 0; index < a.count(); ++index) {
    const double x = load(&a[index]), y = load(&b[index]);
    if (std::isnan(x) != std::isnan(y)) return false;
    if (std::isnan(x) || x == y) {
      scale = std::isfinite(x) ? std::max(scale, std::abs(x)) : scale;
      continue;
    }
    scale = std::max(scale, std::abs(x));
    apart = std::max(apart, std::abs(x - y));
  }
  if (!(apart <= bound * scale)) std::printf("apart by %g of %g\n", apart, scale);
  return apart <= bound * scale;
}

template <class T>
constexpr double kRounding = std::numeric_limits<T>::epsilon();

// The CPU's instruction sets and ways of cutting the work; the first is what the others are compared with.
inline std::vector<Backend> backends(int64_t items_per_unit) {
  std::vector<Backend> result{{false, Isa::kBaseline, 1, items_per_unit}, {false, Isa::kBaseline, 3, items_per_unit}};
#if defined(TRITOOL_X86_VARIANTS)
  if (isa() >= Isa::kAvx2) result.push_back({false, Isa::kAvx2, 2, items_per_unit});
  if (isa() >= Isa::kAvx512) result.push_back({false, Isa::kAvx512, 2, items_per_unit});
#endif
  result.push_back({true, Isa::kBaseline, 1, items_per_unit});
  return result;
}

inline Sizes with(Sizes batch, std::initializer_list<int64_t> trailing) {
  batch.insert(batch.end(), trailing);
  return batch;
}

void test_unproject();

}  // namespace tritool::testing
