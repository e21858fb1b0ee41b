// SPDX-License-Identifier: Apache-2.0
// What the compiler's flags may change: the SIMD functions of math/pack.h, svd3.h in float, double and lanes, and
// unproject.h in lanes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/lanes.h"
#include "math/svd3.h"
#include "math/unproject.h"
#include "test_math.h"

#define TRITOOL_NAME_OF(isa) TRITOOL_NAME_OF_EXPANDED(isa)
#define TRITOOL_NAME_OF_EXPANDED(isa) #isa

namespace tritool::cpu::TRITOOL_ISA {
namespace {

std::mt19937_64 generator(2);
double normal() { return std::normal_distribution<double>()(generator); }
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }

// ---- exp2 ----

template <class T>
T exp2_in_lanes(T x) {
  NativePack<T> pack(T(-1));
  pack.v[NativePack<T>::kLanes - 1] = x;
  return exp2_(pack)[NativePack<T>::kLanes - 1];
}

// The error in units of the last place of the result, which is a normal number.
template <class T>
double ulps(T found, long double exact) {
  const long double ulp = std::ldexp(1.0L, std::ilogb(exact) - std::numeric_limits<T>::digits + 1);
  return static_cast<double>(std::fabs((found - exact) / ulp));
}

template <class T>
void test_exp2(double bound) {
  const T smallest = Exp2Constants<T>::kSmallest;
  double largest_error = 0;
  for (int trial = 0; trial < 1500000; ++trial) {
    // Evenly over the range; near 0; near the half integers, where the polynomial ends.
    T x = static_cast<T>(uniform(smallest, 0));
    if (trial % 4 == 1) x = static_cast<T>(-std::exp2(uniform(-30, 0)));
    if (trial % 4 == 2) x = static_cast<T>(std::floor(uniform(smallest, 0)) + 0.5 + 1e-3 * normal());
    if (x < smallest || x > 0) continue;
    largest_error = std::max(largest_error, ulps(exp2_in_lanes(x), exp2l(x)));
  }
  std::printf("%-9s exp2 of float%d: %.3f ulp\n", TRITOOL_NAME_OF(TRITOOL_ISA), int(8 * sizeof(T)), largest_error);
  CHECK(largest_error <= bound);
  for (T n = 0; n >= smallest; n -= 1) CHECK(exp2_in_lanes(n) == std::ldexp(T(1), static_cast<int>(n)));
  for (const T x : {std::nextafter(smallest, T(-1e9)), T(-1e5), T(-1e30), T(-HUGE_VAL)}) CHECK(exp2_in_lanes(x) == 0);
  CHECK(std::isnan(exp2_in_lanes(T(NAN))));
  CHECK(exp2_in_lanes(-std::numeric_limits<T>::denorm_min()) == 1);
}

// ---- The rest of the vocabulary, lane by lane ----

template <class T>
void test_words() {
  using P = NativePack<T>;
  const T special[] = {0, -T(0), 1, -1, T(2.5), T(-3.5), T(1e-30), T(-1e30), T(HUGE_VAL), T(-HUGE_VAL), T(NAN)};
  const auto same = [](T a, T b) {
    return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
  };
  for (const T a : special) {
    for (const T b : special) {
      const P x(a), y(b);
      for (int lane = 0; lane < P::kLanes; lane += P::kLanes - 1) {
        CHECK(same((x + y)[lane], a + b) && same((x * y)[lane], a * b));
        CHECK(same((x - y)[lane], a - b) && same((x / y)[lane], a / b));
        CHECK(same(select(x < y, x, y)[lane], a < b ? a : b) && same(max_(x, y)[lane], max_(a, b)));
        CHECK(same(select(x == y, x, y)[lane], a == b ? a : b) && same(select(x != y, x, y)[lane], a != b ? a : b));
        CHECK(same(select(!(x <= y), x, y)[lane], !(a <= b) ? a : b));
        CHECK(same(select((x >= y) & (y > x), x, y)[lane], b));
      }
      CHECK(all(x < y) == (a < b) && any(x < y) == (a < b));
    }
    CHECK(same(abs_(P(a))[0], std::fabs(a)) && same(ceil_(P(a))[0], std::ceil(a)) &&
          same(floor_(P(a))[0], std::floor(a)));
    CHECK(same(sqrt_(P(a))[0], std::sqrt(a)) && same(inverse_power_of_two(P(a))[0], inverse_power_of_two(a)));
  }
  P mixed(T(1));
  mixed.v[P::kLanes - 1] = T(-1);
  CHECK(any(mixed < P(T(0))) && !all(mixed < P(T(0))) && all(mixed != P(T(0))));
  CHECK(sum_lanes(mixed, P::kLanes) == T(P::kLanes - 2) && sum_lanes(mixed, P::kLanes - 1) == T(P::kLanes - 1));
}

// a b - c with one rounding: a b is chosen close to c, so that a second rounding would be all of the result.
template <class T>
void test_multiply_subtract() {
  for (int trial = 0; trial < 100000; ++trial) {
    const T a = static_cast<T>(normal()), b = static_cast<T>(100 * normal());
    const T c = static_cast<T>(a * b * T(1 + (trial % 3) * 1e-3 * normal()));
    const T exact =
        static_cast<T>(sizeof(T) == 4 ? double(a) * double(b) - double(c) : std::fma(double(a), double(b), -double(c)));
    CHECK(multiply_subtract(a, b, c) == exact);
    CHECK(multiply_subtract(NativePack<T>(a), NativePack<T>(b), NativePack<T>(c))[0] == exact);
  }
}

// Two roundings, as on CUDA.
template <class T>
void test_reciprocal_roots() {
  using P = NativePack<T>;
  for (int trial = 0; trial < 2000; ++trial) {
    const T x = T(std::ldexp(uniform(1.0, 4.0), int(uniform(-60.0, 60.0)) * 2));
    const double exact = 1.0 / std::sqrt(double(x));
    CHECK(std::fabs(double(rsqrt_(P(x))[0]) - exact) <= 2.0 * double(epsilon<T>()) * exact);
  }
  CHECK(std::isnan(rsqrt_(P(T(NAN)))[0]));
}

// ---- Runs of neighbouring elements ----

// Every length, from memory of just that length: as the sanitizers see, nothing beyond is touched.
template <class T>
void test_runs() {
  constexpr int N = kLanesOf<T>;
  for (int count = 0; count <= 3 * N + 1; ++count) {
    std::vector<T> from[N], to[N];
    const T* source[N];
    T* target[N];
    for (int lane = 0; lane < N; ++lane) {
      for (int e = 0; e < count; ++e) from[lane].push_back(T(100 * lane + e));
      to[lane].assign(static_cast<size_t>(count), T(-1));
      source[lane] = from[lane].data();
      target[lane] = to[lane].data();
    }
    std::vector<NativePack<T>> packs(static_cast<size_t>(count), T(-2));
    gather_run<N>(source, count, packs.data());
    for (int e = 0; e < count; ++e)
      for (int lane = 0; lane < N; ++lane) CHECK(packs[static_cast<size_t>(e)][lane] == T(100 * lane + e));
    const int lanes = count % N + 1;
    scatter_run<N>(target, lanes, count, packs.data());
    for (int lane = 0; lane < N; ++lane)
      for (int e = 0; e < count; ++e)
        CHECK(to[lane][static_cast<size_t>(e)] == (lane < lanes ? T(100 * lane + e) : T(-1)));
  }
}

// ---- Singular values ----

// Graded columns, nearly singular, equal singular values, ranks below 3, exact zeros.
template <class T>
void random_matrix(int trial, T (&a)[3][3]) {
  double dense[3][3];
  for (auto& row : dense)
    for (double& x : row) x = normal();
  const int kind = trial % 8;
  const double power = sizeof(T) == 4 ? 4 : 8;  // squares of graded columns must stay in range
  double column[3] = {1, 1, 1};
  if (kind == 1 || kind == 2)
    for (double& c : column) c = std::pow(10.0, uniform(-power, power));
  for (int i = 0; i < 3; ++i) {
    if (kind == 2) dense[i][2] = dense[i][0] + dense[i][1] + std::pow(10.0, -uniform(2, 15)) * normal();
    if (kind == 3) dense[i][1] = 2 * dense[i][0];                              // rank 2
    if (kind == 4) dense[i][1] = -dense[i][0], dense[i][2] = 3 * dense[i][0];  // rank 1
    if (kind == 5) dense[i][trial / 8 % 3] = 0;
  }
  if (kind == 6) {  // equal singular values, two or all three
    const double angle = normal(), c = std::cos(angle), s = std::sin(angle), last = trial % 16 < 8 ? 1.0 : 1e-3;
    const double rotation[3][3] = {{c, -s, 0}, {0, 0, last}, {s, c, 0}};
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) dense[i][j] = rotation[i][j];
  }
  if (kind == 7)  // upper triangular, as it comes out of the QR
    for (int i = 1; i < 3; ++i)
      for (int j = 0; j < i; ++j) dense[i][j] = 0;
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) a[i][j] = trial == 0 ? T(0) : static_cast<T>(dense[i][j] * column[j]);
}

// Not inlined: two copies may be contracted to fused operations differently.
template <class T>
__attribute__((noinline)) RightSvd3<T> svd_of(const T (&a)[3][3], T (&work)[3][3]) {
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) work[i][j] = a[i][j];
  return right_svd3(work);
}

template <class T>
RightSvd3<T> svd_of(const T (&a)[3][3]) {
  T work[3][3];
  return svd_of(a, work);
}

// The accuracy of one-sided Jacobi: V orthogonal, and V S^2 V^T = A^T A to rounding of each pair of columns. For graded
// columns that is far more than rounding of the largest.
template <class T>
void test_svd3() {
  constexpr double kEps = std::numeric_limits<T>::epsilon();
  double orthogonality = 0, reconstruction = 0, rotated = 0;
  for (int trial = 0; trial < 100000; ++trial) {
    T a[3][3], scaled[3][3];
    random_matrix(trial, a);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) scaled[i][j] = std::ldexp(a[i][j], 7);
    T columns[3][3];
    const RightSvd3<T> svd = svd_of(a, columns);
    CHECK(svd.s_squared[2] <= svd.s_squared[0] && svd.s_squared[2] <= svd.s_squared[1] && svd.s_squared[2] >= 0);

    double norm[3];
    for (int j = 0; j < 3; ++j) norm[j] = std::hypot(std::hypot(double(a[0][j]), double(a[1][j])), double(a[2][j]));
    for (int p = 0; p < 3; ++p)
      for (int q = 0; q < 3; ++q) {
        double rows = 0, rebuilt = 0, gram = 0;
        for (int i = 0; i < 3; ++i) {
          rows += double(svd.v[p][i]) * svd.v[q][i];
          rebuilt += double(svd.v[p][i]) * svd.s_squared[i] * svd.v[q][i];
          gram += double(a[i][p]) * a[i][q];
        }
        orthogonality = std::max(orthogonality, std::abs(rows - (p == q)) / kEps);
        if (norm[p] * norm[q] > 0)
          reconstruction = std::max(reconstruction, std::abs(rebuilt - gram) / (norm[p] * norm[q]) / kEps);
        else
          CHECK(rebuilt == 0);
      }

    // What is left of A is A V, column for column.
    const double size = std::hypot(std::hypot(norm[0], norm[1]), norm[2]);
    for (int i = 0; i < 3 && size > 0; ++i)
      for (int k = 0; k < 3; ++k) {
        const double exact =
            double(a[k][0]) * svd.v[0][i] + double(a[k][1]) * svd.v[1][i] + double(a[k][2]) * svd.v[2][i];
        rotated = std::max(rotated, std::abs(columns[k][i] - exact) / size / kEps);
      }

    // A power of two on the whole matrix changes no rounding, unless a fourth power underflows.
    const RightSvd3<T> other = svd_of(scaled);
    for (int i = 0; i < 3 && svd.s_squared[2] > T(1e3) * std::sqrt(std::numeric_limits<T>::min()); ++i) {
      CHECK(other.s_squared[i] == std::ldexp(svd.s_squared[i], 14));
      for (int k = 0; k < 3; ++k) CHECK(other.v[k][i] == svd.v[k][i]);
    }

    // Lanes do what a scalar does: to the bit, but for fused operations, which the compiler places as it likes.
    if (trial % 10 != 0) continue;
    using P = NativePack<T>;
    P lanes[3][3];
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        lanes[i][j] = P(T(i == j));
        lanes[i][j].v[1] = a[i][j];
      }
    const RightSvd3<P> packed = svd_of(lanes);
    double largest = 0;
    for (const T s : svd.s_squared) largest = std::max(largest, double(s));
    CHECK(std::abs(double(packed.s_squared[2][1]) - double(svd.s_squared[2])) <= 50 * kEps * largest);
    CHECK(packed.s_squared[0][0] == 1 && packed.v[0][0][0] == 1 && packed.v[0][1][0] == 0);  // the neighbour's
  }
  std::printf("%-9s svd3 of float%d: V^T V to %.1f eps, columns of A to %.1f eps\n", TRITOOL_NAME_OF(TRITOOL_ISA),
              int(8 * sizeof(T)), orthogonality, reconstruction);
  CHECK(orthogonality <= 20);
  CHECK(reconstruction <= 60);
  CHECK(rotated <= 20);
}

// ---- Unprojection ----

template <class T>
bool same_or_nan(T a, T b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

// A footprint in every lane: seen, beside the map, on its edge, behind the camera, nowhere. Made of few bits, so that
// fused operations change nothing.
template <class P>
void test_footprints() {
  using T = Real<P>;
  const T width = 6, height = 4;
  int inner_cells = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    T point[P::kLanes][3], matrix[3][4];
    P lanes[3], matrix_lanes[3][4];
    for (int a = 0; a < 3; ++a) lanes[a] = P(T(0));
    for (auto& one : point)
      for (T& x : one) x = T(std::floor(uniform(-32, 32)) / 4);
    for (auto& row : matrix)
      for (T& x : row) x = T(std::floor(uniform(-16, 16)) / 8);
    matrix[2][3] = T(2);
    const int bad = trial % 7;
    if (bad < 3) point[trial % P::kLanes][bad] = trial % 2 == 0 ? T(NAN) : T(HUGE_VAL);
    for (int lane = 0; lane < P::kLanes; ++lane)
      for (int a = 0; a < 3; ++a) lanes[a].v[lane] = point[lane][a];
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j) matrix_lanes[i][j] = P(matrix[i][j]);
    const FeatureMap<P> map_lanes{P(width), P(height), P(T(1.25)), P(T(0.5))};
    const Cell<P> cells = cell_of(lanes, matrix_lanes, map_lanes);
    const Footprint<P> packed = footprint_of(cells, map_lanes.width, map_lanes.height);
    Cell<P> inner;
    const P is_inner = select(inner_cell_of(lanes, matrix_lanes, map_lanes, inner), P(T(1)), P(T(0)));
    const Footprint<P> inner_packed = inner_footprint_of(inner);
    for (int lane = 0; lane < P::kLanes; ++lane) {
      const FeatureMap<T> map{width, height, T(1.25), T(0.5)};
      const Cell<T> cell = cell_of(point[lane], matrix, map);
      const Footprint<T> one = footprint_of(cell, map.width, map.height);
      CHECK(cells.column[lane] == cell.column && cells.row[lane] == cell.row);
      for (int i = 0; i < 2; ++i) {
        CHECK(packed.column[i][lane] == one.column[i] && packed.row[i][lane] == one.row[i]);
        CHECK(packed.along_x[i][lane] == one.along_x[i] && packed.along_y[i][lane] == one.along_y[i]);
        CHECK(packed.slope_x[i][lane] == one.slope_x[i] && packed.slope_y[i][lane] == one.slope_y[i]);
      }
      const bool inside = cell.column >= 0 && cell.column < width - 1 && cell.row >= 0 && cell.row < height - 1;
      CHECK(inside == (is_inner[lane] == 1));
      if (!inside) continue;
      ++inner_cells;
      CHECK(inner.column[lane] == cell.column && inner.fraction_x[lane] == cell.fraction_x);
      CHECK(inner.row[lane] == cell.row && inner.fraction_y[lane] == cell.fraction_y);
      for (int i = 0; i < 2; ++i) {
        CHECK(inner_packed.column[i][lane] == one.column[i] && inner_packed.row[i][lane] == one.row[i]);
        CHECK(inner_packed.along_x[i][lane] == one.along_x[i] && inner_packed.along_y[i][lane] == one.along_y[i]);
        CHECK(inner_packed.slope_x[i][lane] == one.slope_x[i] && inner_packed.slope_y[i][lane] == one.slope_y[i]);
      }
    }
  }
  CHECK(inner_cells > 100);
}

// As a division gives it, to the last bit.
template <class P>
void test_quotient() {
  using T = Real<P>;
  for (int trial = 0; trial < 5000; ++trial) {
    P a, b;
    for (int lane = 0; lane < P::kLanes; ++lane) {
      b.v[lane] = T(normal() * std::exp2(std::floor(uniform(-20, 20))));
      const bool whole = trial % 2 == 0 && lane % 2 == 0;
      a.v[lane] = whole ? b.v[lane] * T(std::floor(uniform(-8, 9))) : T(normal());
    }
    const P divided = a / b, found = quotient(a, b, P(T(1)) / b);
    for (int lane = 0; lane < P::kLanes; ++lane) CHECK(found[lane] == divided[lane]);
  }
}

// Views of other values and confidences in every lane, some absent, some spoilt. The lanes have an exponential of their
// own and fused operations elsewhere.
template <class T, Aggregation kBy, bool kWeighted>
void test_aggregate() {
  using P = NativePack<T>;
  constexpr int kViews = 5;
  const double bound = 64 * std::numeric_limits<T>::epsilon();
  for (int trial = 0; trial < 2000; ++trial) {
    P value[kViews], confidence[kViews];
    const int unknown = trial % 50 == 0 ? trial / 50 % kViews : -1;
    for (int view = 0; view < kViews; ++view) {
      value[view] = confidence[view] = P(T(1));
      for (int lane = 0; lane < P::kLanes; ++lane) {
        value[view].v[lane] = T(trial % 2 == 0 ? normal() : std::floor(2 * normal()));  // often equal
        if (trial % 5 == 0 && lane == trial % P::kLanes) value[view].v[lane] = T(view == 2 ? NAN : 1);
        const int kind = static_cast<int>(uniform(0, 20));
        if (kWeighted)
          confidence[view].v[lane] = kind < 6 ? T(0) : kind == 6 && trial % 4 == 0 ? T(-1) : T(uniform(0.2, 2));
      }
    }
    ViewAggregate<P, kBy, kWeighted> packed;
    for (int view = 0; view < kViews; ++view)
      view == unknown ? packed.add_unknown(confidence[view]) : packed.add(value[view], confidence[view]);
    const P result = packed.finish(), known = select(packed.known(), P(T(1)), P(T(0)));
    P value_slope[kViews], confidence_slope[kViews];
    for (int view = 0; view < kViews; ++view) {
      value_slope[view] =
          packed.value_slope(value[view], confidence[view], packed.factor_of(value[view], confidence[view]), result);
      confidence_slope[view] = packed.confidence_slope(value[view], confidence[view],
                                                       packed.factor_of(value[view], confidence[view]), result);
    }
    for (int lane = 0; lane < P::kLanes; ++lane) {
      ViewAggregate<T, kBy, kWeighted> one;
      for (int view = 0; view < kViews; ++view)
        view == unknown ? one.add_unknown(confidence[view][lane]) : one.add(value[view][lane], confidence[view][lane]);
      const T expected = one.finish();
      const auto near = [&](T a, T b) { return std::abs(double(a) - double(b)) <= bound || same_or_nan(a, b); };
      CHECK(near(result[lane], expected) && (known[lane] == 1) == bool(one.known()));
      if (std::isnan(expected)) continue;
      for (int view = 0; view < kViews; ++view) {
        const T v = value[view][lane], w = confidence[view][lane];
        CHECK(near(value_slope[view][lane], one.value_slope(v, w, one.factor_of(v, w), expected)));
        CHECK(near(confidence_slope[view][lane], one.confidence_slope(v, w, one.factor_of(v, w), expected)));
      }
    }
  }
}

template <class T, Aggregation kBy>
void test_aggregates() {
  test_aggregate<T, kBy, false>();
  test_aggregate<T, kBy, true>();
}

template <class T>
void test_unproject() {
  test_footprints<NativePack<T>>();
  test_aggregates<T, Aggregation::kSum>();
  test_aggregates<T, Aggregation::kMean>();
  test_aggregates<T, Aggregation::kSoftmax>();
  test_aggregates<T, Aggregation::kMax>();
}

}  // namespace

void test_lanes() {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  constexpr double kExp2Bound = 0.9;
#else
  constexpr double kExp2Bound = 1.2;
#endif
  test_exp2<float>(kExp2Bound);
  test_exp2<double>(kExp2Bound);
  test_words<float>();
  test_words<double>();
  test_multiply_subtract<float>();
  test_multiply_subtract<double>();
  test_reciprocal_roots<float>();
  test_reciprocal_roots<double>();
  test_runs<float>();
  test_runs<double>();
  test_svd3<float>();
  test_svd3<double>();
  test_unproject<float>();
  test_unproject<double>();
  test_footprints<Pack<double, 16>>();  // as the kernels do
  test_quotient<NativePack<float>>();
  test_quotient<NativePack<double>>();
}

}  // namespace tritool::cpu::TRITOOL_ISA
