// SPDX-License-Identifier: Apache-2.0
// Unprojection on every backend against its definition, written as a plain loop in float64. All of the geometry is
// made of few bits, so that every backend, whatever it computes in, finds each voxel in the same cell of the same map.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "math/unproject.h"
#include "test_kernels.h"

namespace {

using namespace tritool;
using testing::Array;
using testing::Backend;
using testing::backends;
using testing::close;
using testing::kRounding;
using testing::Owned;
using testing::poisoned;
using testing::Sizes;
using testing::with;

std::mt19937_64 generator(6);
double normal() { return std::normal_distribution<double>()(generator); }
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

enum class Layout { kChannelsFirst, kChannelsLast, kOther };

struct UnprojectCase {
  const char* name;
  Sizes batch;
  Sizes of_features, of_projections, of_grid, of_confidences;  // what of it each operand has; empty: no confidences
  int64_t views, channels, height, width;
  Sizes size;  // of a frame; of one number: so many points
  Layout layout;
  bool exclude = false, official = false;
  int64_t cpu_parts = 1, cuda_parts = 1;  // at least; in one case the work of an item is to be divided

  bool weighted() const { return !of_confidences.empty(); }
  int64_t points() const {
    int64_t count = 1;
    for (const int64_t n : size) count *= n;
    return count;
  }
  int64_t items() const {
    int64_t count = 1;
    for (const int64_t n : batch) count *= n;
    return count;
  }
};

// One channel, some, as many as rows hold (the emulated device's rows are of 4, the CPU's of 16), one more, many;
// items in any order in memory; sizes that leave lanes and threads without work; more views than the CPU keeps samples
// of.
const std::vector<UnprojectCase> kCases{
    {"one channel", {2, 1}, {2, 1}, {2, 1}, {2, 1}, {2, 1}, 2, 1, 4, 6, {3, 2, 3}, Layout::kChannelsFirst},
    {"one view", {1, 1}, {1, 1}, {1, 1}, {1, 1}, {}, 1, 3, 5, 4, {3, 3, 5}, Layout::kChannelsLast},
    {"points", {2, 1}, {2, 1}, {2, 1}, {2, 1}, {2, 1}, 3, 3, 4, 5, {37}, Layout::kOther, true},
    {"points, many channels", {1, 1}, {1, 1}, {1, 1}, {1, 1}, {}, 2, 33, 3, 4, {19}, Layout::kChannelsFirst},
    {"whole rows", {2, 1}, {2, 1}, {2, 1}, {2, 1}, {}, 2, 16, 4, 4, {2, 5, 3}, Layout::kChannelsLast, true},
    {"one channel more", {1, 2}, {1, 2}, {1, 2}, {1, 2}, {1, 2}, 2, 17, 4, 4, {2, 4, 3}, Layout::kOther},
    {"many channels", {1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 2, 32, 4, 6, {3, 3, 3}, Layout::kChannelsLast},
    {"many views", {1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, 10, 3, 4, 6, {2, 3, 5}, Layout::kChannelsFirst, true},
    {"broadcast", {2, 3}, {2, 1}, {1, 3}, {1, 1}, {1, 1}, 2, 3, 4, 5, {2, 2, 5}, Layout::kOther, true},
    {"broadcast features", {3, 2}, {1, 1}, {3, 2}, {3, 1}, {}, 2, 4, 4, 6, {2, 2, 2}, Layout::kChannelsLast},
    {"official", {1, 1}, {1, 1}, {1, 1}, {1, 1}, {}, 3, 3, 6, 8, {4, 3, 4}, Layout::kChannelsFirst, false, true},
    {"in parts",
     {1, 1},
     {1, 1},
     {1, 1},
     {1, 1},
     {1, 1},
     1,
     16,
     3,
     3,
     {5, 5, 6},
     Layout::kChannelsLast,
     false,
     false,
     2,
     2},
    {"no voxel", {2, 1}, {2, 1}, {2, 1}, {2, 1}, {2, 1}, 2, 3, 4, 5, {0}, Layout::kChannelsLast},
    {"no view", {2, 1}, {2, 1}, {2, 1}, {2, 1}, {2, 1}, 0, 3, 4, 5, {2, 3, 2}, Layout::kChannelsFirst},
    {"no channel", {2, 1}, {2, 1}, {2, 1}, {2, 1}, {2, 1}, 2, 0, 4, 5, {2, 3, 2}, Layout::kChannelsFirst},
    {"no item", {0, 2}, {0, 2}, {1, 2}, {0, 1}, {1, 1}, 2, 3, 4, 5, {2, 3, 2}, Layout::kOther},
};

// ---- Operands ----

template <class In>
struct Operands {
  using T = Accumulator<In>;
  Owned<In> features;
  Owned<T> projections, grid, confidences;
  Owned<In> grad;
};

std::vector<int> order_of_features(Layout layout) {
  if (layout == Layout::kChannelsFirst) return {};
  return layout == Layout::kChannelsLast ? std::vector<int>{0, 1, 2, 4, 5, 3} : std::vector<int>{5, 1, 3, 2, 0, 4};
}
std::vector<int> order_of_volume(Layout layout) {
  if (layout == Layout::kChannelsFirst) return {};
  return layout == Layout::kChannelsLast ? std::vector<int>{0, 1, 3, 2} : std::vector<int>{3, 1, 2, 0};
}
int64_t step_of(Layout layout) { return layout == Layout::kOther ? 2 : 1; }

// Multiples of 1/4 for the world, of 1/32 for the rotations; the principal point lies a little aside, so that only
// the first view's pixels, which have no such offset, are ever on the edge between two cells.
template <class In>
Operands<In> random_operands(const UnprojectCase& shape) {
  using T = Accumulator<In>;
  const int64_t step = step_of(shape.layout), views = shape.views;
  Operands<In> operands;
  operands.features = Owned<In>(with(shape.of_features, {views, shape.channels, shape.height, shape.width}),
                                order_of_features(shape.layout), step)
                          .filled([](int64_t) { return normal(); });
  operands.projections = Owned<T>(with(shape.of_projections, {views, 3, 4}), {}, step);
  for (int64_t matrix = 0; matrix < operands.projections.count() / 12; ++matrix) {
    const double depth = integer(32, 64) / 16.0, aside = matrix % std::max(views, int64_t(1)) == 0 ? 0 : 0x1p-10;
    for (int64_t j = 0; j < 4; ++j) {
      const double z = j == 3 ? depth : integer(-8, 8) / 32.0;
      const double x = j == 3 ? aside : integer(-16, 16) / 32.0, y = j == 3 ? -aside : integer(-16, 16) / 32.0;
      operands.projections[12 * matrix + j] = T(x + z * (double(shape.width) - 1) / 2);
      operands.projections[12 * matrix + 4 + j] = T(y + z * (double(shape.height) - 1) / 2);
      operands.projections[12 * matrix + 8 + j] = T(z);
    }
  }
  const bool frame = shape.size.size() == 3;
  operands.grid = Owned<T>(with(shape.of_grid, {frame ? 4 : shape.points(), 3}), {}, step).filled([&](int64_t index) {
    const int64_t row = index / 3 % 4;
    return frame ? (row == 0               ? integer(-24, 8)
                    : row - 1 == index % 3 ? integer(8, 16)
                                           : integer(-3, 3)) /
                       4.0
                 : integer(-16, 16) / 4.0;
  });
  if (shape.weighted()) {
    operands.confidences =
        Owned<T>(with(shape.of_confidences, {views, shape.channels}), {}, step).filled([](int64_t index) {
          const int64_t kind = index % 41;  // some absent, some that spoil their channel
          return kind % 7 == 3 ? 0.0 : kind == 28 ? -1.0 : kind == 16 ? NAN : kind == 33 ? HUGE_VAL : uniform(0.1, 2);
        });
    // A matrix that says nothing: it is in the way only where its view counts.
    if (operands.projections.count() > 36) operands.projections[operands.projections.count() - 3] = T(NAN);
  }
  for (int64_t index = 61; index < operands.features.count(); index += 331) store(&operands.features[index], T(NAN));
  operands.grad = Owned<In>(with(shape.batch, {shape.channels, shape.points()}), order_of_volume(shape.layout), step)
                      .filled([](int64_t) { return normal(); });
  return operands;
}

// ---- The definition ----

// Results in row-major order: the volume, gradients to features, projections, grid and confidences, in the full batch.
struct Exact {
  std::vector<double> volume, features, projections, grid, confidences;
};

// Row-major number, among the operand's own items, of what it has for an item.
int64_t own_item(int64_t item, const Sizes& batch, const Sizes& own) {
  int64_t result = 0, place = 1;
  for (size_t d = batch.size(); d-- > 0; item /= batch[d]) {
    result += own[d] == 1 ? 0 : item % batch[d] * place;
    place *= own[d];
  }
  return result;
}

// Where a voxel is in a view.
struct Sight {
  bool sees = false, unknown = false;
  double h[3] = {}, scale[2] = {};
  int64_t x0 = 0, y0 = 0;
  double fx = 0, fy = 0;
};

template <class T>
Sight sight_of(const UnprojectCase& shape, const double (&point)[4], const Owned<T>& projections, int64_t matrix) {
  Sight sight;
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 4; ++j) sight.h[i] += double(projections[12 * matrix + 4 * i + j]) * point[j];
  const double width = double(shape.width), height = double(shape.height);
  sight.scale[0] = shape.official ? (width - 1) / height : 1;
  sight.scale[1] = shape.official ? (height - 1) / width : 1;
  const double x = sight.h[0] / sight.h[2] * sight.scale[0], y = sight.h[1] / sight.h[2] * sight.scale[1];
  if (sight.h[2] <= 0) return sight;
  sight.unknown = !std::isfinite(sight.h[2]) || std::isnan(x) || std::isnan(y);
  sight.sees = !sight.unknown && x > -1 && x < width && y > -1 && y < height;
  if (!sight.sees) return sight;
  sight.x0 = static_cast<int64_t>(std::floor(x));
  sight.y0 = static_cast<int64_t>(std::floor(y));
  sight.fx = x - double(sight.x0);
  sight.fy = y - double(sight.y0);
  return sight;
}

template <class In>
Exact exact_results(const UnprojectCase& shape, Aggregation by, const Operands<In>& operands) {
  const int64_t views = shape.views, channels = shape.channels, height = shape.height, width = shape.width;
  const int64_t points = shape.points(), items = shape.items();
  const bool frame = shape.size.size() == 3;
  const auto zeros = [](int64_t count) { return std::vector<double>(static_cast<size_t>(count)); };
  Exact exact{zeros(items * channels * points), zeros(items * views * channels * height * width),
              zeros(items * views * 12), zeros(items * (frame ? 12 : 3 * points)), zeros(items * views * channels)};
  const auto at = [](std::vector<double>& values, int64_t index) -> double& {
    return values[static_cast<size_t>(index)];
  };
  for (int64_t item = 0; item < items; ++item) {
    const int64_t of_features = own_item(item, shape.batch, shape.of_features) * views;
    const int64_t of_projections = own_item(item, shape.batch, shape.of_projections) * views;
    const int64_t of_grid = own_item(item, shape.batch, shape.of_grid) * (frame ? 4 : points);
    const int64_t of_confidences =
        shape.weighted() ? own_item(item, shape.batch, shape.of_confidences) * views * channels : 0;
    for (int64_t n = 0; n < points; ++n) {
      int64_t index[3] = {};
      if (frame) index[2] = n % shape.size[2], index[1] = n / shape.size[2] % shape.size[1];
      if (frame) index[0] = n / shape.size[2] / shape.size[1];
      double point[4] = {0, 0, 0, 1};
      for (int64_t a = 0; a < 3; ++a) {
        point[a] = double(operands.grid[(of_grid + (frame ? 0 : n)) * 3 + a]);
        for (int64_t d = 0; frame && d < 3; ++d)
          point[a] += double(index[d]) * double(operands.grid[(of_grid + d + 1) * 3 + a]);
      }
      std::vector<Sight> sights;
      std::vector<double> to_pixels(static_cast<size_t>(2 * views));
      for (int64_t view = 0; view < views; ++view)
        sights.push_back(sight_of(shape, point, operands.projections, of_projections + view));

      for (int64_t k = 0; k < channels; ++k) {
        const auto pixel_index = [&](int64_t of, int64_t view, int64_t x, int64_t y) {
          return (((of + view) * channels + k) * height + y) * width + x;
        };
        const auto feature = [&](int64_t view, int64_t x, int64_t y) {
          const bool inside = x >= 0 && x < width && y >= 0 && y < height;
          return inside ? double(load(&operands.features[pixel_index(of_features, view, x, y)])) : 0.0;
        };
        // The sums over the views that take part.
        std::vector<double> value(static_cast<size_t>(views)), confidence(static_cast<size_t>(views));
        double total = 0, norm = 0, largest = -HUGE_VAL;
        bool known = true, any = false, spoilt = false;
        int64_t first_largest = -1;
        for (int64_t view = 0; view < views; ++view) {
          const Sight& s = sights[static_cast<size_t>(view)];
          double& v = at(value, view);
          double& w = at(confidence, view);
          w = shape.weighted() ? double(operands.confidences[of_confidences + view * channels + k]) : 1.0;
          if (!s.sees && !s.unknown && shape.exclude) w = 0;
          if (w == 0) continue;
          known = known && !s.unknown && w > 0 && w < HUGE_VAL;
          any = true;
          if (s.sees)
            v = (1 - s.fy) * ((1 - s.fx) * feature(view, s.x0, s.y0) + s.fx * feature(view, s.x0 + 1, s.y0)) +
                s.fy * ((1 - s.fx) * feature(view, s.x0, s.y0 + 1) + s.fx * feature(view, s.x0 + 1, s.y0 + 1));
          spoilt = spoilt || std::isnan(v);
          if (v > largest) largest = v, first_largest = view;
          const double share = by == Aggregation::kSoftmax ? w * std::exp(v) : w;
          total += share * v;
          norm += share;
        }
        double result = by == Aggregation::kSum ? total : by == Aggregation::kMax ? largest : total / norm;
        if (!any) result = 0;
        if (!known || spoilt) result = NAN;
        at(exact.volume, (item * channels + k) * points + n) = result;

        const bool linear = by == Aggregation::kSum || by == Aggregation::kMean;
        const double grad = load(&operands.grad[(item * channels + k) * points + n]);
        for (int64_t view = 0; view < views; ++view) {
          const Sight& s = sights[static_cast<size_t>(view)];
          const double v = at(value, view), w = at(confidence, view);
          if (w == 0 || !known || (spoilt && !linear)) continue;
          double to_value = 0, to_confidence = 0;
          if (by == Aggregation::kSum) to_value = w, to_confidence = v;
          if (by == Aggregation::kMean) to_value = w / norm, to_confidence = (v - result) / norm;
          if (by == Aggregation::kSoftmax) {
            to_value = w * std::exp(v) / norm * (1 + v - result);
            to_confidence = std::exp(v) / norm * (v - result);
          }
          if (by == Aggregation::kMax) to_value = view == first_largest ? 1 : 0;
          if (!spoilt) at(exact.confidences, (item * views + view) * channels + k) += grad * to_confidence;
          if (!s.sees) continue;
          for (int64_t j = 0; j < 2; ++j)
            for (int64_t i = 0; i < 2; ++i) {
              const int64_t x = s.x0 + i, y = s.y0 + j;
              if (x < 0 || x >= width || y < 0 || y >= height) continue;
              const double along_x = i == 1 ? s.fx : 1 - s.fx, along_y = j == 1 ? s.fy : 1 - s.fy;
              at(exact.features, pixel_index(item * views, view, x, y)) += grad * to_value * along_x * along_y;
              if (spoilt) continue;
              const double moved = grad * to_value * feature(view, x, y);
              at(to_pixels, 2 * view) += moved * (i == 1 ? 1 : -1) * along_y;
              at(to_pixels, 2 * view + 1) += moved * along_x * (j == 1 ? 1 : -1);
            }
        }
      }

      for (int64_t view = 0; view < views; ++view) {
        const Sight& s = sights[static_cast<size_t>(view)];
        if (!s.sees) continue;
        const double x = at(to_pixels, 2 * view) * s.scale[0], y = at(to_pixels, 2 * view + 1) * s.scale[1];
        const double to_h[3] = {x / s.h[2], y / s.h[2], -(x * s.h[0] + y * s.h[1]) / (s.h[2] * s.h[2])};
        for (int64_t i = 0; i < 3; ++i)
          for (int64_t j = 0; j < 4; ++j) {
            at(exact.projections, (item * views + view) * 12 + 4 * i + j) += to_h[i] * point[j];
            if (j == 3) continue;
            const double to_point = to_h[i] * double(operands.projections[(of_projections + view) * 12 + 4 * i + j]);
            if (!frame) at(exact.grid, (item * points + n) * 3 + j) += to_point;
            for (int64_t d = 0; frame && d < 4; ++d)
              at(exact.grid, item * 12 + 3 * d + j) += to_point * (d == 0 ? 1.0 : double(index[d - 1]));
          }
      }
    }
  }
  return exact;
}

// NaN in the same places, and apart by no more than `bound` of the largest number, which counts as 1 at least:
// gradients may be nothing but rounding. `exact` is in row-major order.
template <class T>
bool close_to(const Owned<T>& found, const std::vector<double>& exact, double bound) {
  double scale = 1, apart = 0;
  for (int64_t index = 0; index < found.count(); ++index) {
    const double x = load(&found[index]), y = exact[static_cast<size_t>(index)];
    if (std::isnan(x) != std::isnan(y)) return false;
    if (std::isnan(x)) continue;
    scale = std::max(scale, std::abs(y));
    apart = std::max(apart, std::abs(x - y));
  }
  if (!(apart <= bound * scale)) std::printf("apart by %g of %g\n", apart, scale);
  return apart <= bound * scale;
}

// ---- The kernels ----

template <class In>
struct Gradients {
  using T = Accumulator<In>;
  Owned<In> features;
  Owned<T> projections, grid, confidences;

  explicit Gradients(const UnprojectCase& shape)
      : features(poisoned<In>(with(shape.batch, {shape.views, shape.channels, shape.height, shape.width}),
                              order_of_features(shape.layout), step_of(shape.layout))),
        projections(poisoned<T>(with(shape.batch, {shape.views, 3, 4}))),
        grid(poisoned<T>(with(shape.batch, {shape.size.size() == 3 ? 4 : shape.points(), 3}))),
        confidences(poisoned<T>(with(shape.batch, {shape.views, shape.channels}))) {}
};

// How far an item's work is divided, where all gradients are wanted.
template <class In>
int64_t parts_of(const Backend& backend, const testing::UnprojectInputs& inputs, const Array& grad,
                 const Gradients<In>& results) {
  std::vector<uint64_t> stored;
  const UnprojectParams<In> params =
      testing::unproject_params<In>(backend, inputs, grad, results.features.array, stored);
  UnprojectGradients<In> gradients{};
  gradients.features = results.features.array.template as<In>();
  gradients.projections = results.projections.array.template as<Accumulator<In>>();
  gradients.grid = results.grid.array.template as<Accumulator<In>>();
  return (backend.emulated_cuda ? cuda::unproject_plan(params, gradients, false)
                                : cpu::unproject_plan(params, gradients))
      .parts;
}

template <class In>
void test_unprojection(const UnprojectCase& shape, Aggregation by) {
  using T = Accumulator<In>;
  const Operands<In> operands = random_operands<In>(shape);
  const testing::UnprojectInputs inputs{operands.features.array,
                                        operands.projections.array,
                                        operands.grid.array,
                                        operands.confidences.array,
                                        shape.size.size() == 3 ? shape.size : Sizes{},
                                        static_cast<int>(by),
                                        shape.exclude,
                                        shape.official};
  const Exact exact = exact_results(shape, by, operands);
  // Rounding of the result, and of the sums before.
  const double stored = sizeof(In) > 2 ? 0 : std::is_same<In, BFloat16>::value ? 0x1p-8 : 0x1p-11;
  const double within = 100 * kRounding<T>;
  for (const Backend& backend : backends(0)) {
    auto volume = poisoned<In>(with(shape.batch, {shape.channels, shape.points()}), order_of_volume(shape.layout),
                               step_of(shape.layout));
    testing::unproject<In>(backend, inputs, volume.array);
    CHECK(close_to(volume, exact.volume, within + stored));

    const auto backward = [&](bool deterministic, const testing::UnprojectOutputs& wanted) {
      testing::unproject_backward<In>(backend, operands.grad.array, inputs, deterministic, wanted);
    };
    for (const bool deterministic : {false, true}) {
      if (deterministic && !backend.emulated_cuda) continue;  // the CPU has one way
      Gradients<In> found(shape);
      CHECK(parts_of(backend, inputs, operands.grad.array, found) >=
            (backend.emulated_cuda ? shape.cuda_parts : shape.cpu_parts));
      const Array confidences = shape.weighted() ? found.confidences.array : Array{};
      backward(deterministic, {found.features.array, found.projections.array, found.grid.array, confidences});
      CHECK(close_to(found.features, exact.features, within + stored));
      CHECK(close_to(found.projections, exact.projections, 10 * within));
      CHECK(close_to(found.grid, exact.grid, 10 * within));
      if (shape.weighted()) CHECK(close_to(found.confidences, exact.confidences, within));

      // What is not wanted changes nothing else.
      Gradients<In> alone(shape);
      backward(deterministic, {alone.features.array, {}, {}, {}});
      backward(deterministic, {{}, {}, alone.grid.array, {}});
      backward(deterministic, {{}, alone.projections.array, {}, confidences});
      CHECK(close(found.features, alone.features, 8 * kRounding<T> + stored));
      CHECK(close(found.grid, alone.grid, within));
      CHECK(close(found.projections, alone.projections, within));
    }
  }
}

template <class In>
void test_all(bool every_case) {
  for (size_t n = 0; n < kCases.size(); ++n) {
    const UnprojectCase& shape = kCases[n];
    for (int by = 0; by < 4; ++by) {
      if (!every_case && static_cast<int>(n % 4) != by) continue;
      const int before = testing::failed;
      test_unprojection<In>(shape, static_cast<Aggregation>(by));
      if (testing::failed != before) std::printf("  in: %s, aggregation %d\n", shape.name, by);
    }
  }
}

}  // namespace

void tritool::testing::test_unproject() {
  test_all<float>(true);
  test_all<double>(true);
  test_all<Float16>(false);
  test_all<BFloat16>(false);
}
