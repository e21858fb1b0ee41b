// SPDX-License-Identifier: Apache-2.0
// Proves csrc/math/unproject.h as test_math.cpp does the others: the footprint and the aggregation over the views
// against their definitions, written plainly, and the slopes against dual numbers.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "dual.h"
#include "math/unproject.h"
#include "test_math.h"

namespace {

using namespace tritool;
using testing::agree;

std::mt19937_64 generator(5);
double normal() { return std::normal_distribution<double>()(generator); }
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

constexpr double kInfinity = HUGE_VAL;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- Footprints ----

// A footprint and what its cell says of it.
template <class T>
struct Sight : Footprint<T> {
  bool seen, unknown;
};
template <class T>
Sight<T> sight_of(const T (&point)[3], const T (&matrix)[3][4], const FeatureMap<T>& map) {
  const Cell<T> cell = cell_of(point, matrix, map);
  return {footprint_of(cell, map.width, map.height), cell.column >= T(-1), cell.column == T(kUnknownColumn)};
}

constexpr int kWidth = 7, kHeight = 5;

struct Image {
  double pixels[kHeight][kWidth];

  Image() {
    for (auto& row : pixels)
      for (double& pixel : row) pixel = normal();
  }
  double at(int x, int y) const { return x >= 0 && x < kWidth && y >= 0 && y < kHeight ? pixels[y][x] : 0; }
  // Bilinear, with zeros beyond the border.
  double sample(double x, double y) const {
    const int x0 = static_cast<int>(std::floor(x)), y0 = static_cast<int>(std::floor(y));
    const double fx = x - x0, fy = y - y0;
    return (1 - fy) * ((1 - fx) * at(x0, y0) + fx * at(x0 + 1, y0)) +
           fy * ((1 - fx) * at(x0, y0 + 1) + fx * at(x0 + 1, y0 + 1));
  }
  // Its derivatives in the cell of the pixel; at an integer that is the cell of larger coordinates.
  double slope_x(double x, double y) const { return sample(std::floor(x) + 1, y) - sample(std::floor(x), y); }
  double slope_y(double x, double y) const { return sample(x, std::floor(y) + 1) - sample(x, std::floor(y)); }
};

// The sum over a footprint's pixels that the weights or slopes of either axis make.
template <class T>
T sum_over(const Footprint<T>& footprint, const T (&along_x)[2], const T (&along_y)[2], const Image& image) {
  T sum(0);
  for (int j = 0; j < 2; ++j)
    for (int i = 0; i < 2; ++i) {
      const Real<T> x = Dual(footprint.column[i]).value, y = Dual(footprint.row[j]).value;
      CHECK(x >= 0 && x < kWidth && x == std::floor(x) && y >= 0 && y < kHeight && y == std::floor(y));
      sum = sum + along_x[i] * along_y[j] * T(image.pixels[static_cast<int>(y)][static_cast<int>(x)]);
    }
  return sum;
}

template <class T>
T sample_of(const Footprint<T>& footprint, const Image& image) {
  return sum_over(footprint, footprint.along_x, footprint.along_y, image);
}

FeatureMap<double> map_of(double scale_x, double scale_y) { return {kWidth, kHeight, scale_x, scale_y}; }

// A camera whose pixel is (X, Y) and whose depth is Z + 1.
Sight<double> footprint_at(double x, double y, double z, const FeatureMap<double>& map) {
  const double matrix[3][4] = {{1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 1}}, point[3] = {x, y, z};
  return sight_of(point, matrix, map);
}

bool is_empty(const Sight<double>& footprint) {
  bool empty = !footprint.seen;
  for (int i = 0; i < 2; ++i)
    empty = empty && footprint.along_x[i] * footprint.along_y[0] == 0 && footprint.slope_x[i] == 0 &&
            footprint.along_x[i] * footprint.along_y[1] == 0 && footprint.slope_y[i] == 0 && footprint.column[i] >= 0 &&
            footprint.column[i] < kWidth && footprint.row[i] >= 0 && footprint.row[i] < kHeight;
  return empty;
}

void test_footprint_places() {
  const Image image;
  constexpr double kTiny = 0x1p-40;
  const auto places_along = [](int size) {
    return std::vector<double>{
        -1,         -1 + kTiny,   -0.5,       0,          0.25,       2,    2.75, size - 1.0, size - 1.0 + kTiny,
        size - 0.5, size - kTiny, 1.0 * size, -1 - kTiny, size + 0.5, -1e9, 1e9};
  };
  const FeatureMap<double> map = map_of(1, 1);
  for (const double x : places_along(kWidth)) {
    for (const double y : places_along(kHeight)) {
      const Sight<double> footprint = footprint_at(x, y, 0, map);
      CHECK(!footprint.unknown);
      const bool inside = x > -1 && x < kWidth && y > -1 && y < kHeight;
      CHECK(footprint.seen == inside);
      if (!inside) {
        CHECK(is_empty(footprint));
        continue;
      }
      CHECK(std::abs(sample_of(footprint, image) - image.sample(x, y)) < 1e-15);
      CHECK(std::abs(sum_over(footprint, footprint.slope_x, footprint.along_y, image) - image.slope_x(x, y)) < 1e-15);
      CHECK(std::abs(sum_over(footprint, footprint.along_x, footprint.slope_y, image) - image.slope_y(x, y)) < 1e-15);
    }
  }
  // Depth 0, behind the camera, infinitely far, and what is not a number.
  for (const double z : {-1.0, -2.0, -kInfinity}) {
    for (const double x : {0.5, kNan, kInfinity}) {
      const Sight<double> footprint = footprint_at(x, 1, z, map);
      // Behind a camera nothing is seen, whatever x and y are, as long as they leave the depth alone.
      CHECK(footprint.unknown == !(x == 0.5) && is_empty(footprint));
    }
  }
  for (const double z : {kInfinity, kNan}) CHECK(footprint_at(0.5, 1, z, map).unknown);
  for (const double z : {kInfinity, kNan}) CHECK(is_empty(footprint_at(0.5, 1, z, map)));
  for (const double bad : {kInfinity, -kInfinity, kNan}) {
    const double point[3] = {1, 1, 0};
    const double sideways[2][3][4] = {{{1, 0, 0, bad}, {0, 1, 0, 0}, {0, 0, 1, 1}},
                                      {{1, 0, 0, 0}, {0, bad, 0, 0}, {0, 0, 1, 1}}};
    const double behind[3][4] = {{bad, 0, 0, 0}, {0, bad, 0, 0}, {0, 0, 1, -1}};
    for (const auto& matrix : sideways) {
      const Sight<double> footprint = sight_of(point, matrix, map);
      CHECK(footprint.unknown == std::isnan(bad) && is_empty(footprint));  // infinitely far to a side: not seen
    }
    CHECK(!sight_of(point, behind, map).unknown && is_empty(sight_of(point, behind, map)));
  }
}

// From the sample to point and projection, by slopes and project_point_vjp, as the kernels go.
void test_footprint_vjp() {
  int seen = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const bool official = trial % 2 == 0;
    const FeatureMap<double> map = official ? map_of((kWidth - 1.0) / kHeight, (kHeight - 1.0) / kWidth) : map_of(1, 1);
    const Image image;
    double point[3], matrix[3][4];
    for (double& x : point) x = 500 * normal();
    for (auto& row : matrix)
      for (double& p : row) p = 1e-3 * normal();
    matrix[2][3] = 1.5;
    matrix[0][3] = uniform(-1, kWidth) / map.scale_x;
    matrix[1][3] = uniform(-1, kHeight) / map.scale_y;
    if (trial % 10 == 0) {  // on the very edge of a cell
      for (double& x : point) x = 0;
      matrix[2][3] = 1;
      matrix[0][3] = integer(0, kWidth - 1), matrix[1][3] = integer(0, kHeight - 1);
    }

    const Sight<double> footprint = sight_of(point, matrix, map);
    seen += footprint.seen;
    const double grad[2] = {sum_over(footprint, footprint.slope_x, footprint.along_y, image) * map.scale_x,
                            sum_over(footprint, footprint.along_x, footprint.slope_y, image) * map.scale_y};
    double grad_point[3] = {0, 0, 0}, grad_matrix[3][4];
    project_point_vjp(point, matrix, grad, grad_point, grad_matrix);
    if (!footprint.seen) CHECK(grad[0] == 0 && grad[1] == 0 && is_empty(footprint));

    double vjp = 0, terms = 0;
    const auto along = [&](double value, double size, double g) {
      const double direction = size * normal();
      vjp += g * direction;
      terms += std::abs(g * direction);
      return Dual(value, direction);
    };
    Dual dual_point[3], dual_matrix[3][4];
    for (int a = 0; a < 3; ++a) dual_point[a] = along(point[a], 100, grad_point[a]);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j) dual_matrix[i][j] = along(matrix[i][j], j == 3 ? 1 : 1e-2, grad_matrix[i][j]);
    const FeatureMap<Dual> dual_map{map.width, map.height, map.scale_x, map.scale_y};
    const Dual value = sample_of(sight_of(dual_point, dual_matrix, dual_map), image);
    CHECK(value.value == sample_of(footprint, image));
    CHECK(agree("unproject: footprint", value.slope, vjp, terms, 1e-12));
  }
  CHECK(seen > 1000 && seen < 4000);
}

void test_voxel_center() {
  const double frame[4][3] = {{10, 20, 30}, {1, 2, 3}, {-4, 5, 6}, {7, -8, 9}};
  double point[3];
  voxel_center(frame, 2.0, 3.0, 5.0, point);
  for (int a = 0; a < 3; ++a) CHECK(point[a] == frame[0][a] + 2 * frame[1][a] + 3 * frame[2][a] + 5 * frame[3][a]);
}

// ---- Aggregation ----

struct View {
  double value, confidence;
  bool unknown = false;
};

// The definition: over the views that take part.
double aggregate_of(Aggregation by, const std::vector<View>& views) {
  double total = 0, norm = 0, largest = -kInfinity;
  int present = 0;
  for (const View& view : views) {
    if (view.confidence == 0) continue;
    if (view.unknown || !(view.confidence > 0) || std::isinf(view.confidence)) return kNan;
    if (by == Aggregation::kMax && std::isnan(view.value)) return kNan;
    ++present;
    largest = std::max(largest, view.value);
  }
  if (present == 0) return 0;
  if (by == Aggregation::kMax) return largest;
  for (const View& view : views) {
    if (view.confidence == 0) continue;
    const double share = view.confidence * (by == Aggregation::kSoftmax ? std::exp(view.value - largest) : 1);
    total += share * view.value;
    norm += share;
  }
  return by == Aggregation::kSum ? total : total / norm;
}

// The slopes of a view, its factor made anew.
template <class T, Aggregation kBy, bool kWeighted>
T value_slope_of(ViewAggregate<T, kBy, kWeighted>& aggregate, T value, T confidence, T result) {
  return aggregate.value_slope(value, confidence, aggregate.factor_of(value, confidence), result);
}
template <class T, Aggregation kBy, bool kWeighted>
T confidence_slope_of(const ViewAggregate<T, kBy, kWeighted>& aggregate, T value, T confidence, T result) {
  return aggregate.confidence_slope(value, confidence, aggregate.factor_of(value, confidence), result);
}

template <class T, Aggregation kBy, bool kWeighted>
ViewAggregate<T, kBy, kWeighted> added(const std::vector<View>& views, int moving = -1, double value = 0,
                                       double confidence = 0) {
  ViewAggregate<T, kBy, kWeighted> result;
  for (size_t n = 0; n < views.size(); ++n) {
    const bool moves = static_cast<int>(n) == moving;
    T v(views[n].value), w(views[n].confidence);
    if constexpr (std::is_same<T, Dual>::value) {
      v.slope = moves ? value : 0;
      w.slope = moves ? confidence : 0;
    }
    if (views[n].unknown)
      result.add_unknown(w);
    else
      result.add(v, w);
  }
  return result;
}

// `size`: what differences are measured by.
bool near(double found, double expected, double size = 1) {
  return std::isnan(expected) ? std::isnan(found) : std::abs(found - expected) <= 1e-13 * std::max(size, 1.0);
}

template <Aggregation kBy, bool kWeighted>
void check_slopes(const std::vector<View>& views, double size) {
  auto aggregate = added<double, kBy, kWeighted>(views);
  const double result = aggregate.finish();
  CHECK(aggregate.known());
  for (size_t n = 0; n < views.size(); ++n) {
    const auto& [value, confidence, unknown] = views[n];
    if (unknown) continue;
    const int moving = static_cast<int>(n);
    const double by_value = value_slope_of(aggregate, value, confidence, result);
    CHECK(near(by_value, added<Dual, kBy, kWeighted>(views, moving, 1, 0).finish().slope, size));
    const double by_confidence = confidence_slope_of(aggregate, value, confidence, result);
    if (confidence == 0) {
      CHECK(by_value == 0 && by_confidence == 0);
    } else if (kWeighted) {
      CHECK(near(by_confidence, added<Dual, kBy, kWeighted>(views, moving, 0, 1).finish().slope, size / confidence));
    }
  }
}

template <Aggregation kBy, bool kWeighted>
void test_aggregate() {
  for (int trial = 0; trial < 3000; ++trial) {
    const double spread = std::pow(10.0, integer(-2, 2));
    std::vector<View> views(static_cast<size_t>(integer(0, 6)));
    for (View& view : views) {
      view.value = spread * normal();
      view.confidence = kWeighted ? std::pow(10.0, uniform(-2, 1)) : 1;
      if (kWeighted && integer(0, 3) == 0) view.confidence = 0;
    }
    double size = 1;
    for (const View& view : views) size = std::max({size, std::abs(view.value), view.confidence});
    if (kBy != Aggregation::kMax) size = size * size * 10;
    const double expected = aggregate_of(kBy, views);
    auto aggregate = added<double, kBy, kWeighted>(views);
    CHECK(near(aggregate.finish(), expected, size));
    check_slopes<kBy, kWeighted>(views, size);

    // The order of the views matters to rounding at most.
    std::vector<View> shuffled = views;
    std::shuffle(shuffled.begin(), shuffled.end(), generator);
    CHECK(near(added<double, kBy, kWeighted>(shuffled).finish(), expected, size));

    // An absent view changes nothing at all, whatever it holds and wherever it comes.
    if (kWeighted) {
      std::vector<View> more = views;
      for (const double value : {1e300, kNan, kInfinity, -kInfinity})
        more.insert(more.begin() + integer(0, static_cast<int>(more.size())), View{value, 0, integer(0, 1) == 0});
      auto same = added<double, kBy, kWeighted>(more);
      CHECK(same.finish() == aggregate.finish() && same.known());
      check_slopes<kBy, kWeighted>(more, size);
    }

    // One that cannot be known spoils the result, and so does a confidence that is none.
    if (views.empty()) continue;
    const size_t spoilt = static_cast<size_t>(integer(0, static_cast<int>(views.size()) - 1));
    std::vector<View> bad = views;
    bad[spoilt].unknown = true;
    if (views[spoilt].confidence != 0) {
      CHECK(std::isnan(added<double, kBy, kWeighted>(bad).finish()));
      CHECK(!(added<double, kBy, kWeighted>(bad).known()));
    }
    for (const double confidence : {-0.5, -kInfinity, kInfinity, kNan}) {
      if (!kWeighted) continue;
      bad = views;
      bad[spoilt].confidence = confidence;
      CHECK(std::isnan(added<double, kBy, true>(bad).finish()) && !(added<double, kBy, true>(bad).known()));
    }
    // A NaN value spoils the result, too, but the gradient to the features of a linear aggregation does not mind.
    bad = views;
    bad[spoilt].value = kNan;
    if (views[spoilt].confidence != 0) {
      CHECK(std::isnan(added<double, kBy, kWeighted>(bad).finish()));
      if (kBy == Aggregation::kSum || kBy == Aggregation::kMean) CHECK((added<double, kBy, kWeighted>(bad).known()));
    }
  }

  // No view takes part.
  std::vector<View> absent;
  for (int count = 0; count < 3; ++count) {
    auto aggregate = added<double, kBy, kWeighted>(absent);
    CHECK(aggregate.finish() == 0 && aggregate.known());
    check_slopes<kBy, kWeighted>(absent, 1);
    if (!kWeighted) break;
    absent.push_back({normal(), 0});
  }
}

template <Aggregation kBy>
void test_aggregation() {
  test_aggregate<kBy, false>();
  test_aggregate<kBy, true>();
}

// The whole gradient goes to the first of several largest views that take part; also for views of value 0, as what does
// not see a voxel has.
void test_ties() {
  for (const double largest : {0.0, -3.0, 2.5}) {
    const std::vector<View> views{{largest, 0}, {largest - 1, 1}, {largest, 0.5}, {largest, 2}, {largest, 0}};
    auto aggregate = added<double, Aggregation::kMax, true>(views);
    CHECK(aggregate.finish() == largest);
    for (size_t n = 0; n < views.size(); ++n)
      CHECK(value_slope_of(aggregate, views[n].value, views[n].confidence, largest) == (n == 2 ? 1 : 0));
    auto unweighted = added<double, Aggregation::kMax, false>(views);
    for (size_t n = 0; n < views.size(); ++n)
      CHECK(value_slope_of(unweighted, views[n].value, 1.0, largest) == (n == 0 ? 1 : 0));
  }
}

// Exponentials of differences: nothing overflows, and what is far below the largest has no share.
template <class T, bool kWeighted>
void test_large_values() {
  for (const double spread : {1e4, 1e30}) {
    for (const bool ascending : {false, true}) {
      std::vector<View> views;
      for (int n = -2; n <= 2; ++n) views.push_back({spread * (ascending ? n : -n), kWeighted ? 0.25 : 1});
      auto aggregate = added<T, Aggregation::kSoftmax, kWeighted>(views);
      const T result = aggregate.finish();
      CHECK(result == T(2 * spread));
      for (const View& view : views) {
        const bool is_largest = T(view.value) == result;
        const T slope = value_slope_of(aggregate, T(view.value), T(view.confidence), result);
        CHECK(slope == (is_largest ? T(1) : T(0)));
        CHECK(confidence_slope_of(aggregate, T(view.value), T(view.confidence), result) == 0);
      }
      // An absent view above them all does not count.
      if (!kWeighted) continue;
      views.push_back({4 * spread, 0});
      auto with_absent = added<T, Aggregation::kSoftmax, true>(views);
      CHECK(with_absent.finish() == result);
      CHECK(value_slope_of(with_absent, T(4 * spread), T(0), result) == 0);
      CHECK(confidence_slope_of(with_absent, T(4 * spread), T(0), result) == 0);
    }
  }
}

}  // namespace

void tritool::testing::test_unproject() {
  test_voxel_center();
  test_footprint_places();
  test_footprint_vjp();
  test_aggregation<Aggregation::kSum>();
  test_aggregation<Aggregation::kMean>();
  test_aggregation<Aggregation::kSoftmax>();
  test_aggregation<Aggregation::kMax>();
  test_ties();
  test_large_values<float, false>();
  test_large_values<float, true>();
  test_large_values<double, false>();
  test_large_values<double, true>();
}
