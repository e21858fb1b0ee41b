// SPDX-License-Identifier: Apache-2.0
// Runs every kernel on small and awkward sizes, on the CPU and in the emulated CUDA device, and compares the two. Built
// plain and under each sanitizer; every array lies in memory of just its size, so that AddressSanitizer sees a step
// over its end. What the results should be is proved by tests/test_kernels_*.py; unprojection, in a file of its own, is
// compared with its definition here, too.
#include "test_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"

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

std::mt19937_64 generator(3);
double normal() { return std::normal_distribution<double>()(generator); }
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }

// ---- Cameras ----

// Cameras on a circle of 5 m, a little different in every matrix.
template <class T>
void fill_matrices(const Owned<T>& projections, int64_t views) {
  for (int64_t matrix = 0; matrix < projections.count() / 12; ++matrix) {
    const double angle = 0.9 * double(matrix % views) + 0.01 * normal(), c = std::cos(angle), s = std::sin(angle);
    const double camera[3][4] = {{c, 0, s, 0}, {0, 1, 0, 0}, {-s, 0, c, 5000}};
    for (int64_t j = 0; j < 4; ++j) {
      projections[matrix * 12 + j] = T(1000 * camera[0][j] + 500 * camera[2][j]);
      projections[matrix * 12 + 4 + j] = T(1000 * camera[1][j] + 400 * camera[2][j]);
      projections[matrix * 12 + 8 + j] = T(camera[2][j]);
    }
  }
}

struct GeometryCase {
  Sizes batch;      // of the points
  Sizes own_batch;  // of the projections
  int64_t views;
  int64_t items_per_unit;
};

// One thread or warp, several, partial warps; projections of one's own, shared by some, shared by all; sums in parts.
const std::vector<GeometryCase> kGeometryCases{
    {{}, {}, 2, 0},
    {{1}, {1}, 4, 0},
    {{33}, {33}, 3, 0},
    {{33}, {1}, 3, 0},
    {{70}, {1}, 2, 32},
    {{70}, {1}, 4, 13},
    {{3, 37}, {3, 1}, 3, 0},
    {{3, 37}, {3, 1}, 3, 16},
    {{3, 37}, {1, 37}, 2, 2},
    {{2, 3, 5}, {2, 1, 5}, 3, 0},
    {{2, 3, 5}, {1, 3, 1}, 2, 4},
    {{300}, {1}, 2, 0},
    {{0}, {1}, 3, 0},
    {{5, 0}, {5, 1}, 2, 0},
    {{300}, {1}, 0, 0},
    {{40}, {1}, 1, 7},
    {{70}, {1}, 31, 0},  // blocks of the CUDA kernels that are no multiple of a warp
    {{5}, {1}, 130, 0},  // more views than a block has threads
    {{3}, {1}, 300, 0},  // more than shared memory holds
};

template <class T>
void test_triangulate(const GeometryCase& shape, bool strided, bool weighted, bool homogeneous) {
  const int64_t views = shape.views;
  const std::vector<int> reversed_order = [&] {
    std::vector<int> order;
    for (int d = static_cast<int>(shape.batch.size()) + 1; d >= 0; --d) order.push_back(d);
    return order;
  }();
  Owned<T> projections(with(shape.own_batch, {views, 3, 4}), {}, strided ? 2 : 1);
  fill_matrices(projections, std::max(views, int64_t(1)));
  auto points = Owned<T>(with(shape.batch, {views, 2}), strided ? reversed_order : std::vector<int>{}, strided ? 3 : 1)
                    .filled([&](int64_t index) { return (index % 2 == 0 ? 500 : 400) + 50 * normal(); });
  auto weights = Owned<T>(with(shape.batch, {views}), {}, strided ? 2 : 1).filled([&](int64_t index) {
    const int64_t kind = index % 23;  // some absent views, some that spoil their point
    return kind == 5 ? 0.0 : kind == 17 ? NAN : kind == 20 ? -1.0 : uniform(0.1, 1);
  });
  for (int64_t index = 7; index < points.count(); index += 29) points[index] = T(index % 2 == 0 ? NAN : HUGE_VAL);
  auto grad = Owned<T>(with(shape.batch, {3})).filled([&](int64_t) { return normal(); });
  if (!weighted) weights.array.data = nullptr;

  Owned<T> first, first_points, first_projections, first_weights;
  for (const Backend& backend : backends(shape.items_per_unit)) {
    auto result = poisoned<T>(with(shape.batch, {3}));
    testing::triangulate<T>(backend, points.array, projections.array, weights.array, homogeneous, result.array);
    auto to_points = poisoned<T>(with(shape.batch, {views, 2}));
    auto to_projections = poisoned<T>(with(shape.own_batch, {views, 3, 4}));
    auto to_weights = poisoned<T>(with(shape.batch, {views}));
    const Array absent;
    const auto backward = [&](const Array& a, const Array& b, const Array& c) {
      testing::triangulate_backward<T>(backend, grad.array, points.array, projections.array, weights.array, homogeneous,
                                       shape.batch, a, b, weighted ? c : absent);
    };
    backward(to_points.array, to_projections.array, to_weights.array);
    auto alone = poisoned<T>(with(shape.batch, {views, 2}));
    backward(alone.array, absent, absent);
    CHECK(close(to_points, alone, 8 * kRounding<T>));
    if (first.memory.empty()) {
      first = std::move(result);
      first_points = std::move(to_points);
      first_projections = std::move(to_projections);
      first_weights = std::move(to_weights);
      continue;
    }
    // Random pixels leave large residuals: that costs some digits of the gradients.
    CHECK(close(first, result, 1e4 * kRounding<T>));
    CHECK(close(first_points, to_points, 1e5 * kRounding<T>));
    CHECK(close(first_projections, to_projections, 1e5 * kRounding<T>));
    if (weighted) CHECK(close(first_weights, to_weights, 1e5 * kRounding<T>));
  }
}

template <class T>
void test_project(const GeometryCase& shape, bool strided) {
  const int64_t views = shape.views;
  Owned<T> projections(with(shape.own_batch, {views, 3, 4}), {}, strided ? 2 : 1);
  fill_matrices(projections, std::max(views, int64_t(1)));
  auto points = Owned<T>(with(shape.batch, {3}), {}, strided ? 2 : 1).filled([&](int64_t index) {
    const int64_t kind = index % 31;  // some behind a camera, some nowhere
    return kind == 11 ? NAN : kind == 23 ? -8000.0 : 500 * normal();
  });
  auto grad = Owned<T>(with(shape.batch, {views, 2}), {}, strided ? 2 : 1).filled([&](int64_t) { return normal(); });
  Owned<T> first, first_points, first_projections;
  for (const Backend& backend : backends(shape.items_per_unit)) {
    auto pixels = poisoned<T>(with(shape.batch, {views, 2}));
    testing::project<T>(backend, points.array, projections.array, pixels.array);
    auto to_points = poisoned<T>(with(shape.batch, {3}));
    auto to_projections = poisoned<T>(with(shape.own_batch, {views, 3, 4}));
    auto alone = poisoned<T>(with(shape.batch, {3}));
    testing::project_backward<T>(backend, grad.array, points.array, projections.array, shape.batch, to_points.array,
                                 to_projections.array);
    testing::project_backward<T>(backend, grad.array, points.array, projections.array, shape.batch, alone.array, {});
    CHECK(close(to_points, alone, 8 * kRounding<T>));
    if (first.memory.empty()) {
      first = std::move(pixels);
      first_points = std::move(to_points);
      first_projections = std::move(to_projections);
      continue;
    }
    // Some points lie close to the plane of a camera.
    CHECK(close(first, pixels, 1e4 * kRounding<T>));
    CHECK(close(first_points, to_points, 1e4 * kRounding<T>));
    CHECK(close(first_projections, to_projections, 1e4 * kRounding<T>));
  }
}

// ---- Rigid alignment ----

struct AlignmentCase {
  Sizes batch;
  int64_t points;
};

// Partial warps and lanes; sets that the CPU keeps in its cache, or a GPU in shared memory, and larger ones; even and
// odd numbers of points; sums in one group and in several.
const std::vector<AlignmentCase> kAlignmentCases{
    {{}, 4},  {{1}, 17},   {{33}, 5}, {{70}, 17}, {{3, 37}, 8}, {{2, 3, 5}, 32}, {{19}, 33}, {{5}, 100},
    {{0}, 3}, {{5, 0}, 4}, {{40}, 0}, {{40}, 1},  {{40}, 2},    {{35}, 16},      {{35}, 27}, {{35}, 54},
};

template <class T>
void test_rigid_align(const AlignmentCase& shape, bool strided, bool weighted, bool with_scale) {
  const int64_t points = shape.points;
  std::vector<int> reversed_order;
  for (int d = static_cast<int>(shape.batch.size()) + 1; d >= 0; --d) reversed_order.push_back(d);
  const Sizes size = with(shape.batch, {points, 3});
  const auto source = Owned<T>(size, strided ? reversed_order : std::vector<int>{}, strided ? 3 : 1)
                          .filled([&](int64_t index) {  // some absent points, some that spoil their set
                            return index % 97 == 41 ? NAN : index % 401 == 60 ? HUGE_VAL : 300 * normal();
                          });
  auto target = Owned<T>(size, {}, strided ? 2 : 1);
  for (int64_t index = 0; index < target.count(); ++index) {  // a cyclic exchange of the axes, disturbed
    const int64_t axis = index % 3;
    target[index] = T(1000 + 1.5 * double(source[index - axis + (axis + 1) % 3]) + 30 * normal());
  }
  auto weights = Owned<T>(with(shape.batch, {points}), {}, strided ? 2 : 1).filled([&](int64_t index) {
    const int64_t kind = index % 53;
    return kind == 5 ? 0.0 : kind == 17 ? NAN : kind == 33 ? -1.0 : uniform(0.1, 1);
  });
  if (!weighted) weights.array.data = nullptr;
  const auto random = [&](const Sizes& of) { return Owned<T>(of).filled([&](int64_t) { return normal(); }); };
  const auto grad_rotation = random(with(shape.batch, {3, 3})), grad_translation = random(with(shape.batch, {3})),
             grad_scale = random(shape.batch);

  Owned<T> first[6];
  for (const Backend& backend : backends(0)) {
    Owned<T> result[6] = {poisoned<T>(with(shape.batch, {3, 3})),
                          poisoned<T>(with(shape.batch, {3})),
                          poisoned<T>(shape.batch),
                          poisoned<T>(size),
                          poisoned<T>(size),
                          poisoned<T>(with(shape.batch, {points}))};
    testing::rigid_align<T>(backend, source.array, target.array, weights.array, with_scale,
                            {result[0].array, result[1].array, result[2].array});
    const auto backward = [&](const Array& a, const Array& b, const Array& c) {
      testing::rigid_align_backward<T>(backend, {grad_rotation.array, grad_translation.array, grad_scale.array},
                                       source.array, target.array, weights.array, with_scale, shape.batch, a, b,
                                       weighted ? c : Array{});
    };
    backward(result[3].array, result[4].array, result[5].array);
    auto alone = poisoned<T>(size);
    backward({}, alone.array, {});
    CHECK(close(result[4], alone, 8 * kRounding<T>));
    for (size_t n = 0; n < 6; ++n) {
      if (first[n].memory.empty())
        first[n] = std::move(result[n]);
      else if (n < 5 || weighted)
        CHECK(close(first[n], result[n], 1e4 * kRounding<T>));
    }
  }
}

template <class T>
void test_all_alignments() {
  for (size_t n = 0; n < kAlignmentCases.size(); ++n) {
    const int before = testing::failed;
    for (const bool strided : {false, true}) {
      test_rigid_align<T>(kAlignmentCases[n], strided, true, !strided);
      test_rigid_align<T>(kAlignmentCases[n], strided, false, strided);
    }
    if (testing::failed != before) std::printf("  in: alignment case %zu\n", n);
  }
}

// ---- Softmax moments ----

struct MapCase {
  const char* name;
  int dims;
  Sizes size;              // [batch..., map...]
  std::vector<int> order;  // in memory, see Owned
  int64_t step;
  int64_t start;  // elements before the first: misaligned
};

// Sizes in multiples of 8 take 16-byte loads in every type; more than 8192 voxels a map and few maps are split.
const std::vector<MapCase> kMapCases{
    {"rows, vector loads", 2, {3, 5, 16}, {}, 1, 0},
    {"rows, vector loads, volumes", 3, {2, 3, 2, 8}, {}, 1, 0},
    {"rows, odd", 2, {2, 5, 7}, {}, 1, 0},
    {"rows, misaligned", 2, {2, 3, 16}, {}, 1, 1},
    {"rows in steps", 3, {2, 2, 3, 8}, {}, 2, 0},
    {"transposed", 2, {3, 4, 8}, {0, 2, 1}, 1, 0},
    {"rows, split", 2, {2, 65, 128}, {}, 1, 0},
    {"rows, split, odd", 3, {1, 3, 53, 53}, {}, 1, 0},
    {"adjacent maps, one group", 2, {5, 4, 3}, {1, 2, 0}, 1, 0},
    {"adjacent maps, several groups", 2, {2, 37, 3, 4}, {0, 2, 3, 1}, 1, 0},
    {"adjacent maps, volumes", 3, {33, 2, 3, 4}, {1, 2, 3, 0}, 1, 0},
    {"adjacent maps, split", 2, {4, 91, 93}, {1, 2, 0}, 1, 0},
    {"one voxel", 2, {3, 1, 1}, {}, 1, 0},
    {"no voxel", 2, {3, 0, 4}, {}, 1, 0},
    {"no map", 3, {0, 2, 3, 4}, {}, 1, 0},
};

// Some cells masked; one map all masked, one with a NaN, one with +inf: the others are to take no notice.
template <class In>
Owned<In> spoilt_logits(const MapCase& shape) {
  using T = Accumulator<In>;
  auto logits = Owned<In>(shape.size, shape.order, shape.step, shape.start).filled([&](int64_t index) {
    return index % 13 == 4 ? -HUGE_VAL : 3 * normal();
  });
  int64_t elements = 1;
  for (int d = 1; d <= shape.dims; ++d) elements *= shape.size[shape.size.size() - static_cast<size_t>(d)];
  const int64_t maps = elements == 0 ? 0 : logits.count() / elements;
  if (maps > 2) {
    for (int64_t element = 0; element < elements; ++element) store(&logits[elements + element], T(-HUGE_VAL));
    store(&logits[2 * elements], T(NAN));
    if (maps > 4) store(&logits[5 * elements - 1], T(HUGE_VAL));
  }
  return logits;
}

template <class In>
void test_moments(const MapCase& shape, bool second) {
  using T = Accumulator<In>;
  const Sizes batch(shape.size.begin(), shape.size.end() - shape.dims);
  const auto logits = spoilt_logits<In>(shape);
  const double alpha = 1.7;
  const auto grads = [&](Sizes size) { return Owned<T>(std::move(size)).filled([&](int64_t) { return normal(); }); };
  const auto grad_mean = grads(with(batch, {shape.dims}));
  const auto grad_covariance = grads(with(batch, {shape.dims, shape.dims}));
  const auto grad_log_partition = grads(batch);

  Owned<T> first, first_covariance, first_log_partition;
  Owned<In> first_gradient;
  for (const Backend& backend : backends(0)) {
    auto mean = poisoned<T>(with(batch, {shape.dims})), covariance = poisoned<T>(with(batch, {shape.dims, shape.dims}));
    auto log_partition = poisoned<T>(batch), partition = poisoned<T>(with(batch, {2}));
    const testing::Moments moments{mean.array, second ? covariance.array : Array{}, log_partition.array,
                                   partition.array};
    testing::softmax_moments<In>(backend, logits.array, {}, shape.dims, alpha, moments);
    auto gradient = poisoned<In>(shape.size, shape.order, shape.step);
    const testing::Moments grad{
        grad_mean.array, second ? grad_covariance.array : Array{}, second ? grad_log_partition.array : Array{}, {}};
    testing::softmax_moments_backward<In>(backend, grad, logits.array, {}, moments, shape.dims, alpha, gradient.array,
                                          {});
    if (first.memory.empty()) {
      first = std::move(mean);
      first_covariance = std::move(covariance);
      first_log_partition = std::move(log_partition);
      first_gradient = std::move(gradient);
      continue;
    }
    CHECK(close(first, mean, 100 * kRounding<T>));
    if (second) CHECK(close(first_covariance, covariance, 100 * kRounding<T>));
    CHECK(close(first_log_partition, log_partition, 100 * kRounding<T>));
    const double half = sizeof(In) > 2 ? 0 : std::is_same<In, BFloat16>::value ? 0x1p-8 : 0x1p-11;
    CHECK(close(first_gradient, gradient, 200 * kRounding<T> + half));
  }
}

// The depth maps lie as the heat maps do, or in an order of their own, or every second element of them (adjacent maps
// with the heat maps' own between).
template <class In>
void test_soft_argmax25d(const MapCase& shape, bool same_layout) {
  using T = Accumulator<In>;
  const Sizes batch(shape.size.begin(), shape.size.end() - 2);
  const auto heatmaps = spoilt_logits<In>(shape);
  const std::vector<int> order = same_layout ? shape.order : std::vector<int>{};
  const int64_t step = same_layout ? shape.step : 2;
  auto depth_maps = Owned<In>(shape.size, order, step, shape.start).filled([&](int64_t index) {
    return index % 13 == 4 ? NAN : 3 * normal();  // where the heat map is masked
  });
  if (depth_maps.count() > 6) store(&depth_maps[5], T(NAN));  // and where it is not
  const auto grad = Owned<T>(with(batch, {3})).filled([&](int64_t) { return normal(); });
  const double alpha = 1.7;

  Owned<T> first;
  Owned<In> first_gradient, first_depth_gradient;
  for (const Backend& backend : backends(0)) {
    auto position = poisoned<T>(with(batch, {3})), partition = poisoned<T>(with(batch, {2}));
    const testing::Moments moments{position.array, {}, {}, partition.array};
    testing::softmax_moments<In>(backend, heatmaps.array, depth_maps.array, 2, alpha, moments);
    auto gradient = poisoned<In>(shape.size, shape.order, shape.step);
    auto depth_gradient = poisoned<In>(shape.size, order, step);
    testing::softmax_moments_backward<In>(backend, {grad.array, {}, {}, {}}, heatmaps.array, depth_maps.array, moments,
                                          2, alpha, gradient.array, depth_gradient.array);
    if (first.memory.empty()) {
      CHECK(depth_maps.count() <= 6 || (std::isnan(position[2]) && !std::isnan(position[0])));
      first = std::move(position);
      first_gradient = std::move(gradient);
      first_depth_gradient = std::move(depth_gradient);
      continue;
    }
    CHECK(close(first, position, 100 * kRounding<T>));
    const double half = sizeof(In) > 2 ? 0 : std::is_same<In, BFloat16>::value ? 0x1p-8 : 0x1p-11;
    // Where one pixel holds nearly all of the weight, its depth and the expectation cancel.
    CHECK(close(first_gradient, gradient, 2000 * kRounding<T> + half));
    CHECK(close(first_depth_gradient, depth_gradient, 200 * kRounding<T> + half));
  }
}

template <class In>
void test_all_maps() {
  for (const MapCase& shape : kMapCases)
    for (const bool second : {false, true}) {
      const int before = testing::failed;
      test_moments<In>(shape, second);
      if (shape.dims == 2) test_soft_argmax25d<In>(shape, second);
      if (testing::failed != before) std::printf("  in: %s\n", shape.name);
    }
}

template <class T>
void test_all_geometry() {
  for (size_t n = 0; n < kGeometryCases.size(); ++n) {
    const int before = testing::failed;
    for (const bool strided : {false, true}) {
      test_triangulate<T>(kGeometryCases[n], strided, true, !strided);
      test_triangulate<T>(kGeometryCases[n], strided, false, strided);
      test_project<T>(kGeometryCases[n], strided);
    }
    if (testing::failed != before) std::printf("  in: geometry case %zu\n", n);
  }
}

}  // namespace

int main() {
  test_all_geometry<float>();
  test_all_geometry<double>();
  test_all_maps<float>();
  test_all_maps<double>();
  test_all_maps<Float16>();
  test_all_maps<BFloat16>();
  test_all_alignments<float>();
  test_all_alignments<double>();
  testing::test_unproject();
  return testing::report();
}
