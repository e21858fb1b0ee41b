// SPDX-License-Identifier: Apache-2.0
// The SIMD width of the variant being compiled, and moving numbers between memory and lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/batch.h"
#include "math/pack.h"

TRITOOL_MATH_BEGIN

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
using NativePack = Pack<T, kLanesOf<T>>;

template <class P, class T = Real<P>>
TRITOOL_HD P load_pack(const T* from) {
  P pack;
  memcpy(&pack.v, from, sizeof pack.v);
  return pack;
}
template <class P, class T = Real<P>>
TRITOOL_HD void store_pack(T* to, const P& pack) {
  memcpy(to, &pack.v, sizeof pack.v);
}

// A result beyond the caches is written past them: fetching every line first, only to overwrite it, costs a third of
// the memory traffic. Such stores have to be fenced before another thread reads.
TRITOOL_HD bool is_streamed([[maybe_unused]] int64_t bytes) {
#if defined(__x86_64__)
  return bytes > (int64_t(16) << 20);
#else
  return false;
#endif
}
inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0; }

template <class P>
TRITOOL_HD void stream_pack([[maybe_unused]] Real<P>* to, const P& pack) {
#if defined(__x86_64__)
  if constexpr (sizeof(pack.v) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)pack.v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(pack.v) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)pack.v);
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(pack.v) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)pack.v);
#endif
  store_pack(to, pack);
}
TRITOOL_HD void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Asks for what a loop that walks through memory reads next but a few. The processor's own prefetching does not keep
// up where there is as much to compute as in a softmax.
TRITOOL_HD void prefetch(const void* address) {
  constexpr int kBytesAhead = 2048;
  __builtin_prefetch(static_cast<const char*>(address) + kBytesAhead);
}

// One element from each of several places.
template <class T, int N>
TRITOOL_HD Pack<T, N> gather(const T* const (&base)[N], int64_t offset) {
  Pack<T, N> pack;
  for (int lane = 0; lane < N; ++lane) pack.v[lane] = base[lane][offset];
  return pack;
}

// The same, where all places may be one.
template <class T, int N>
TRITOOL_HD Pack<T, N> gather_shared(const T* const (&base)[N], bool same, int64_t offset) {
  return same ? Pack<T, N>(base[0][offset]) : gather(base, offset);
}

// Two halves side by side, in registers: to store them and load them as one costs more than it looks, because the
// processor cannot hand on two stores to one load.
template <class P, class Half, size_t... kLane>
TRITOOL_HD P join_lanes(const Half& low, const Half& high, std::index_sequence<kLane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return P::of(__builtin_shufflevector(low.v, high.v, int(kLane)...));
#else
  P pack;
  for (int lane = 0; lane < P::kLanes; ++lane)
    pack.v[lane] = lane < Half::kLanes ? low.v[lane] : high.v[lane - Half::kLanes];
  return pack;
#endif
}
template <class P, class Half>
TRITOOL_HD P join_halves(const Half& low, const Half& high) {
  return join_lanes<P>(low, high, std::make_index_sequence<P::kLanes>());
}

template <class P, class Half>
TRITOOL_HD void split_halves(const P& pack, Half& low, Half& high) {
  memcpy(&low.v, &pack.v, sizeof low.v);
  memcpy(&high.v, reinterpret_cast<const char*>(&pack.v) + sizeof low.v, sizeof high.v);
}

// One step of a transposition: lanes whose number has the bit S change places between two vectors. After the steps of
// all powers of two below N, lane i of vector j is what lane j of vector i was.
template <int S, class Vector, class Integers, size_t... kLane>
TRITOOL_HD void exchange(Vector& a, Vector& b, std::index_sequence<kLane...>) {
  constexpr size_t N = sizeof...(kLane);
#if defined(__clang__)
  const Vector low = __builtin_shufflevector(a, b, ((kLane & S) != 0 ? N + kLane - S : kLane)...);
  const Vector high = __builtin_shufflevector(a, b, ((kLane & S) != 0 ? N + kLane : kLane + S)...);
#else
  const Vector low = __builtin_shuffle(a, b, Integers{((kLane & S) != 0 ? N + kLane - S : kLane)...});
  const Vector high = __builtin_shuffle(a, b, Integers{((kLane & S) != 0 ? N + kLane : kLane + S)...});
#endif
  a = low;
  b = high;
}
template <int S, class T, int N>
TRITOOL_HD void transpose_steps(Pack<T, N> (&square)[N]) {
  if constexpr (S < N) {
    for (int i = 0; i < N; ++i)
      if ((i & S) == 0)
        exchange<S, typename Pack<T, N>::Vector, typename PackMask<T, N>::Vector>(square[i].v, square[i + S].v,
                                                                                  std::make_index_sequence<N>());
    transpose_steps<2 * S>(square);
  }
}
template <class T, int N>
TRITOOL_HD void transpose(Pack<T, N> (&square)[N]) {
  transpose_steps<1>(square);
}

// Whether fewer elements than lanes are turned over in squares half as wide, for the lower and the upper lanes apart.
template <class T, int N>
constexpr bool kHasHalves = N * sizeof(T) > 16;

// GCC does not see that of the halves below only the first `count` are read, which are written; to clear all would
// take time for nothing.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// The first `count` elements at each of N places, a pack for each element: `gather` for 0 .. count-1, with whole
// vectors read and turned over. Touches no element beyond.
template <int N, class T>
TRITOOL_HD void gather_run(const T* const* base, int64_t count, Pack<T, N>* result) {
  if (count >= N) {
    for (int64_t first = 0; first < count; first += N) {
      const int64_t at = first + N <= count ? first : count - N;  // the last block may repeat some elements
      Pack<T, N> square[N];
      for (int lane = 0; lane < N; ++lane) memcpy(&square[lane].v, base[lane] + at, sizeof square[lane].v);
      transpose(square);
      for (int e = 0; e < N; ++e) result[at + e] = square[e];
    }
  } else if constexpr (kHasHalves<T, N>) {
    Pack<T, N / 2> low[N], high[N];
    gather_run<N / 2>(base, count, low);
    gather_run<N / 2>(base + N / 2, count, high);
    for (int64_t e = 0; e < count; ++e) result[e] = join_halves<Pack<T, N>>(low[e], high[e]);
  } else {
    for (int64_t e = 0; e < count; ++e)
      for (int lane = 0; lane < N; ++lane) result[e].v[lane] = base[lane][e];
  }
}

// The reverse: lane by lane to the first `lanes` places.
template <int N, class T>
TRITOOL_HD void scatter_run(T* const* base, int lanes, int64_t count, const Pack<T, N>* values) {
  if (count >= N) {
    for (int64_t first = 0; first < count; first += N) {
      const int64_t at = first + N <= count ? first : count - N;
      Pack<T, N> square[N];
      for (int e = 0; e < N; ++e) square[e] = values[at + e];
      transpose(square);
      for (int lane = 0; lane < N; ++lane)
        if (lane < lanes) memcpy(base[lane] + at, &square[lane].v, sizeof square[lane].v);
    }
  } else if constexpr (kHasHalves<T, N>) {
    Pack<T, N / 2> low[N], high[N];
    for (int64_t e = 0; e < count; ++e) split_halves(values[e], low[e], high[e]);
    scatter_run<N / 2>(base, lanes < N / 2 ? lanes : N / 2, count, low);
    if (lanes > N / 2) scatter_run<N / 2>(base + N / 2, lanes - N / 2, count, high);
  } else {
    for (int lane = 0; lane < lanes; ++lane)
      for (int64_t e = 0; e < count; ++e) base[lane][e] = values[e].v[lane];
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// So many points or views of a group of items are kept in lanes, in the first cache, and pass between there and memory
// at once. Formulas read them several times.
constexpr int kMostStaged = 32;

// The rows `first` .. `first + count - 1` of each item, of kColumns elements: one after the other, a pack for each.
template <int kColumns, class T, int N>
TRITOOL_HD void gather_rows(const T* const (&base)[N], int64_t row_stride, int64_t column_stride, int64_t first,
                            int64_t count, Pack<T, N>* result) {
  if (row_stride == kColumns && (kColumns == 1 || column_stride == 1)) {
    const T* from[N];
    for (int lane = 0; lane < N; ++lane) from[lane] = base[lane] + kColumns * first;
    return gather_run<N>(from, kColumns * count, result);
  }
  for (int64_t row = 0; row < count; ++row)
    for (int k = 0; k < kColumns; ++k)
      result[kColumns * row + k] = gather(base, (first + row) * row_stride + k * column_stride);
}

// `scatter_run` of up to 3 kMostStaged elements; past the caches if that is wanted and the places follow each other in
// whole lines.
template <int N, class T>
TRITOOL_HD void stream_run(T* const* base, int lanes, int64_t count, const Pack<T, N>* values, bool wanted) {
  T block[3 * kMostStaged * N];
  bool streamed = wanted && lanes == N && is_aligned(base[0]);
  for (int lane = 0; lane < N; ++lane) streamed = streamed && base[lane] == base[0] + lane * count;
  T* row[N];
  for (int lane = 0; lane < N; ++lane) row[lane] = streamed ? block + lane * count : base[lane];
  scatter_run<N>(row, lanes, count, values);
  if (!streamed) return;
  for (int64_t at = 0; at < N * count; at += N) stream_pack(base[0] + at, load_pack<Pack<T, N>>(block + at));
}

// The operands' offsets of the items first .. end-1, as many as there are lanes; lanes past the last item repeat it.
// Returns the number of lanes that hold an item.
template <int N, int kOperands>
TRITOOL_HD int lane_offsets(const Batch<kOperands>& batch, int64_t first, int64_t end,
                            int64_t (&offset)[N][kOperands]) {
  const int lanes = end - first < N ? static_cast<int>(end - first) : N;
  for (int lane = 0; lane < N; ++lane) batch.offsets(first + (lane < lanes ? lane : lanes - 1), offset[lane]);
  return lanes;
}

// Lane i becomes the sum of all lanes of vector i: a transposition that adds what it has brought together.
template <int S = 1, class T, int N>
TRITOOL_HD Pack<T, N> sum_each(Pack<T, N> (&packs)[N]) {
  if constexpr (S < N) {
    for (int i = 0; i < N; i += 2 * S) {
      exchange<S, typename Pack<T, N>::Vector, typename PackMask<T, N>::Vector>(packs[i].v, packs[i + S].v,
                                                                                std::make_index_sequence<N>());
      packs[i] = packs[i] + packs[i + S];
    }
    return sum_each<2 * S>(packs);
  }
  return packs[0];
}

// The sum of the first `lanes` lanes, in lane order.
template <class T, int N>
TRITOOL_HD T sum_lanes(const Pack<T, N>& pack, int lanes) {
  T sum = T(0);
  for (int lane = 0; lane < lanes; ++lane) sum += pack.v[lane];
  return sum;
}

TRITOOL_MATH_END
