// SPDX-License-Identifier: Apache-2.0
// Proves the formulas of csrc/math and the index arithmetic of csrc/kernels.
//
// The vector-Jacobian products, written by hand, against dual numbers: <v, J u> = <J^T v, u> for random v and u. Both
// sides are exact to rounding, so the bounds are a few thousand roundings, where finite differences leave 1e-6.
#include "test_math.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "dual.h"
#include "kernels/isa.h"
#include "kernels/shared_sum.h"
#include "math/half.h"
#include "math/project.h"
#include "math/soft_argmax.h"
#include "math/triangulate.h"

namespace {

using namespace tritool;
using testing::agree;

std::mt19937_64 generator(1);
double normal() { return std::normal_distribution<double>()(generator); }
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// ---- Triangulation ----

template <class T>
struct ListedViews {
  int count;
  const std::vector<Observation<T>>& views;
  const Observation<T>& operator()(int view) const { return views[static_cast<size_t>(view)]; }
};
template <class T>
ListedViews<T> listed(const std::vector<Observation<T>>& views) {
  return {static_cast<int>(views.size()), views};
}

struct GradientSink {
  std::vector<ObservationGradient<double>> gradients;
  void operator()(int, const ObservationGradient<double>& gradient) { gradients.push_back(gradient); }
};

// Cameras 3 to 7 m from a point, looking its way, in pixels and millimetres; 3 px of noise.
std::vector<Observation<double>> random_views(int count) {
  const double point[3] = {uniform(-1000, 1000), uniform(-1000, 1000), uniform(0, 1900)};
  std::vector<Observation<double>> views;
  while (static_cast<int>(views.size()) < count) {
    double back[3] = {normal(), normal(), normal()}, side[3] = {normal(), normal(), normal()};
    const double length = std::sqrt(back[0] * back[0] + back[1] * back[1] + back[2] * back[2]);
    for (double& b : back) b /= length;
    const double along = side[0] * back[0] + side[1] * back[1] + side[2] * back[2];
    for (int k = 0; k < 3; ++k) side[k] -= along * back[k];
    const double side_length = std::sqrt(side[0] * side[0] + side[1] * side[1] + side[2] * side[2]);
    if (side_length < 0.1) continue;
    for (double& s : side) s /= side_length;
    double rotation[3][4] = {{side[0], side[1], side[2], 0},
                             {back[1] * side[2] - back[2] * side[1], back[2] * side[0] - back[0] * side[2],
                              back[0] * side[1] - back[1] * side[0], 0},
                             {-back[0], -back[1], -back[2], 0}};
    const double distance = uniform(3000, 7000);
    for (auto& row : rotation)
      for (int k = 0; k < 3; ++k) row[3] -= row[k] * (point[k] + distance * back[k] + uniform(-300, 300));
    Observation<double> view;
    const double focal = uniform(600, 2000), centre[2] = {uniform(400, 600), uniform(300, 500)};
    for (int j = 0; j < 4; ++j) {
      view.projection[0][j] = focal * rotation[0][j] + centre[0] * rotation[2][j];
      view.projection[1][j] = focal * rotation[1][j] + centre[1] * rotation[2][j];
      view.projection[2][j] = rotation[2][j];
    }
    const Projection<double> image = project_point(point, view.projection);
    view.u = image.pixel[0] + 3 * normal();
    view.v = image.pixel[1] + 3 * normal();
    view.weight = std::pow(10.0, uniform(-1.5, 0.5));
    views.push_back(view);
  }
  return views;
}

void test_triangulate_vjp() {
  for (int trial = 0; trial < 4000; ++trial) {
    std::vector<Observation<double>> views = random_views(trial % 50 == 0 ? 31 : integer(2, 6));
    const int count = static_cast<int>(views.size());
    if (trial % 3 == 0 && count > 2) {  // absent, in each of three ways
      Observation<double>& absent = views[static_cast<size_t>(integer(0, count - 1))];
      if (trial % 9 == 0) absent.weight = 0;
      if (trial % 9 == 3) absent.u = NAN;
      if (trial % 9 == 6) absent.v = NAN, absent.projection[1][2] = NAN;
    }
    const bool homogeneous = trial % 2 == 0;
    const Triangulation<double> solved = factor<double>(listed(views), homogeneous);
    // How ill-posed the point is; a rig of random cameras is mostly fine.
    const double ratio =
        std::sqrt(solved.svd.s_squared[2] / std::max(solved.svd.s_squared[0], solved.svd.s_squared[1]));
    if (!(ratio > 1e-3 && solved.gap > 0.2 * solved.svd.s_squared[2])) continue;

    const double grad[3] = {normal(), normal(), normal()};
    GradientSink sink;
    triangulate_point_vjp<double>(listed(views), homogeneous, grad, sink);
    CHECK(static_cast<int>(sink.gradients.size()) == count);

    // Along the pixels, the weights, the projections, and all at once.
    for (int group = 0; group < 4; ++group) {
      std::vector<Observation<Dual>> dual_views;
      double vjp = 0, terms = 0;
      for (int c = 0; c < count; ++c) {
        const Observation<double>& view = views[static_cast<size_t>(c)];
        const ObservationGradient<double>& gradient = sink.gradients[static_cast<size_t>(c)];
        Observation<Dual> dual;
        const bool present = is_present(view);
        // A direction of the input's own size, and its share of <J^T v, u>.
        const auto along = [&](double value, double size, bool wanted, double g) {
          const double direction = wanted && present ? size * normal() : 0.0;
          vjp += g * direction;
          terms += std::abs(g * direction);
          CHECK(present || g == 0.0);
          return Dual(value, direction);
        };
        dual.u = along(view.u, 1.0, group == 0 || group == 3, gradient.u);
        dual.v = along(view.v, 1.0, group == 0 || group == 3, gradient.v);
        dual.weight = along(view.weight, view.weight, group == 1 || group == 3, gradient.weight);
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 4; ++j)
            dual.projection[i][j] = along(view.projection[i][j], 0.01 * std::abs(view.projection[i][j]), group >= 2,
                                          gradient.projection[i][j]);
        dual_views.push_back(dual);
      }
      Dual point[3];
      triangulate_point<Dual>(listed(dual_views), homogeneous, point);
      double jvp = 0;
      for (int k = 0; k < 3; ++k) jvp += grad[k] * point[k].slope;
      const char* names[] = {"triangulate: pixels", "triangulate: weights", "triangulate: projections",
                             "triangulate: all"};
      // The gradient to a weight is a difference of large terms.
      CHECK(agree(names[group], jvp, vjp, terms, group == 1 ? 1e-8 : 1e-10));
    }
  }
}

void test_triangulate_degenerate() {
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<Observation<double>> views = random_views(3);
    const int kind = trial % 6;
    if (kind == 0) views.resize(1);
    if (kind == 1) views.resize(0);
    if (kind == 2) views[1] = views[2] = views[0];
    if (kind == 3) views[1].weight = NAN;
    if (kind == 4) views[0].weight = -1;
    if (kind == 5) views[2].projection[2][3] = HUGE_VAL;
    double point[3];
    triangulate_point<double>(listed(views), trial % 4 < 2, point);
    for (const double coordinate : point) CHECK(std::isnan(coordinate));
    const double grad[3] = {NAN, 1, HUGE_VAL};
    GradientSink sink;
    triangulate_point_vjp<double>(listed(views), trial % 4 < 2, grad, sink);
    for (const auto& gradient : sink.gradients) {
      CHECK(gradient.u == 0 && gradient.v == 0 && gradient.weight == 0);
      for (const auto& row : gradient.projection)
        for (const double g : row) CHECK(g == 0);
    }
  }
}

// ---- Projection ----

void test_project_vjp() {
  for (int trial = 0; trial < 2000; ++trial) {
    const Observation<double> view = random_views(1)[0];
    double point[3] = {uniform(-1500, 1500), uniform(-1500, 1500), uniform(-500, 2500)};
    if (trial % 20 == 0) point[trial / 20 % 3] = trial % 40 == 0 ? NAN : HUGE_VAL;
    double grad[2] = {normal(), normal()};
    if (!project_point(point, view.projection).visible) grad[0] = NAN;

    double grad_point[3] = {0, 0, 0}, grad_matrix[3][4];
    project_point_vjp(point, view.projection, grad, grad_point, grad_matrix);
    Dual dual_point[3], matrix[3][4];
    double vjp = 0, terms = 0;
    const auto along = [&](double value, double size, double g) {
      const double direction = size * normal();
      vjp += g * direction;
      terms += std::abs(g * direction);
      return Dual(value, direction);
    };
    for (int k = 0; k < 3; ++k) dual_point[k] = along(point[k], 100, grad_point[k]);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j)
        matrix[i][j] = along(view.projection[i][j], std::abs(view.projection[i][j]), grad_matrix[i][j]);
    const Projection<Dual> image = project_point(dual_point, matrix);
    if (!image.visible) {
      CHECK(std::isnan(image.pixel[0].value) && std::isnan(image.pixel[1].value) && terms == 0);
      continue;
    }
    const double jvp = grad[0] * image.pixel[0].slope + grad[1] * image.pixel[1].slope;
    CHECK(agree("project", jvp, vjp, terms, 1e-12));
  }
}

// ---- Softmax moments ----

template <class T>
struct Map {
  int size[3];
  std::vector<T> logits, values;
};

// Every voxel to one of `parts` states, as threads would, and the states merged.
template <class T, Keep kKeep = Keep::kCovariance>
MomentState<T, kKeep> moments(const Map<T>& map, T c, int parts) {
  std::vector<MomentState<T, kKeep>> states(static_cast<size_t>(parts));
  const T centre[3] = {T(0.5 * (map.size[0] - 1)), T(0.5 * (map.size[1] - 1)), T(0.5 * (map.size[2] - 1))};
  for (auto& state : states) state.reset(centre);
  size_t index = 0;
  for (int i = 0; i < map.size[0]; ++i)
    for (int j = 0; j < map.size[1]; ++j)
      for (int k = 0; k < map.size[2]; ++k, ++index) {
        MomentState<T, kKeep>& state = states[index % states.size()];
        const T at[3] = {T(double(i)), T(double(j)), T(double(k))};
        state.raise(level_of(c, map.logits[index]), at);
        const T weight = softmax_weight(c, map.logits[index], state.level);
        state.add(weight, at[0], at[1], at[2]);
        if constexpr (kKeep == Keep::kExpectation) state.value.add(weight, map.logits[index], map.values[index]);
      }
  for (size_t part = 1; part < states.size(); ++part) states[0].merge(states[part]);
  return states[0];
}

void test_soft_argmax_vjp() {
  for (int trial = 0; trial < 1500; ++trial) {
    Map<double> map{{integer(1, 5), integer(1, 6), integer(2, 7)}, {}, {}};
    const double alpha = trial % 3 == 0 ? 30.0 : uniform(0.05, 3), c = alpha * kLog2E;
    const int count = map.size[0] * map.size[1] * map.size[2];
    for (int n = 0; n < count; ++n)
      map.logits.push_back(trial % 4 == 0 && integer(0, 2) == 0 && n > 0 ? -HUGE_VAL : 100 * (trial % 2) + normal());
    const int parts = integer(1, 5);
    const MomentState<double, Keep::kCovariance> state = moments(map, c, parts);

    MomentCotangent<double> cotangent{};
    cotangent.level = state.level;
    cotangent.inverse_sum = 1 / state.sum;
    cotangent.valid = true;
    cotangent.constant = normal();  // the gradient to the log-partition
    const double grad_log = cotangent.constant;
    double grad_covariance[3][3];
    for (int a = 0, k = 0; a < 3; ++a) {
      cotangent.mean[a] = state.mean(a);
      cotangent.grad_mean[a] = normal();
      for (int b = a; b < 3; ++b, ++k) {
        grad_covariance[a][b] = grad_covariance[b][a] = cotangent.grad_second[k] = normal();
        cotangent.constant -= (a == b ? 1 : 2) * cotangent.grad_second[k] * state.covariance(a, b);
      }
    }

    Map<Dual> dual{{map.size[0], map.size[1], map.size[2]}, {}, {}};
    double vjp = 0, terms = 0;
    for (int n = 0; n < count; ++n) {
      const double logit = map.logits[static_cast<size_t>(n)];
      const double direction = std::isinf(logit) ? 0.0 : normal();
      dual.logits.emplace_back(logit, direction);
      double t[3];
      const int row = n / map.size[2];
      cotangent.row(row / map.size[1], row % map.size[1], t);
      const double d = n % map.size[2] - cotangent.mean[2];
      const double weight = softmax_weight(c, logit, cotangent.level);
      const double gradient = alpha * weight * cotangent.inverse_sum * (t[0] + d * (t[1] + d * t[2]));
      vjp += gradient * direction;
      terms += std::abs(alpha * weight * cotangent.inverse_sum * direction) *
               (std::abs(cotangent.constant) + std::abs(t[0]) + std::abs(d * t[1]) + std::abs(d * d * t[2]));
    }
    const MomentState<Dual, Keep::kCovariance> moved = moments(dual, Dual(c), parts);
    double jvp = grad_log * moved.log_partition().slope;
    for (int a = 0; a < 3; ++a) {
      jvp += cotangent.grad_mean[a] * moved.mean(a).slope;
      for (int b = 0; b < 3; ++b) jvp += grad_covariance[a][b] * moved.covariance(a, b).slope;
    }
    CHECK(agree("softmax moments", jvp, vjp, terms, 1e-11));
  }
}

template <class T>
T expectation_of(const MomentState<T, Keep::kExpectation>& state, T c) {
  return state.expectation(softmax_weight(c, state.value.spoilt, state.level));
}

void test_expectation_vjp() {
  for (int trial = 0; trial < 1500; ++trial) {
    Map<double> map{{1, integer(1, 6), integer(2, 7)}, {}, {}};
    const double alpha = trial % 3 == 0 ? 30.0 : uniform(0.05, 3), c = alpha * kLog2E;
    const int count = map.size[1] * map.size[2];
    // What a value holds is no matter where nothing weighs; elsewhere a NaN or an infinity leaves the mean alone.
    const bool spoilt = trial % 5 == 0;
    for (int n = 0; n < count; ++n) {
      const bool masked = trial % 4 == 0 && integer(0, 2) == 0 && n > 0;
      map.logits.push_back(masked ? -HUGE_VAL : 100 * (trial % 2) + normal());
      map.values.push_back(masked && n % 2 == 0 ? NAN : 20 * normal());
    }
    if (spoilt) map.values[0] = trial % 2 == 0 ? NAN : HUGE_VAL;
    const int parts = integer(1, 5);
    const auto state = moments<double, Keep::kExpectation>(map, c, parts);
    const double expectation = expectation_of(state, c);
    CHECK(std::isnan(expectation) == spoilt && !std::isnan(state.mean(1) + state.mean(2)));

    MomentCotangent<double> cotangent{};
    cotangent.level = state.level;
    for (int a = 1; a < 3; ++a) {
      cotangent.mean[a] = state.mean(a);
      cotangent.grad_mean[a] = normal();
    }
    // An incoming NaN is no matter either where there is no expectation.
    cotangent.value = value_cotangent(spoilt ? NAN : normal(), expectation);

    Map<Dual> dual{{1, map.size[1], map.size[2]}, {}, {}};
    double vjp = 0, terms = 0;
    for (int n = 0; n < count; ++n) {
      const double logit = map.logits[static_cast<size_t>(n)], value = map.values[static_cast<size_t>(n)];
      const double direction = std::isinf(logit) ? 0.0 : normal();
      const double value_direction = std::isfinite(value) ? 20 * normal() : 0.0;
      dual.logits.emplace_back(logit, direction);
      dual.values.emplace_back(value, value_direction);
      double t[3];
      cotangent.row(0, n / map.size[2], t);
      const double d = n % map.size[2] - cotangent.mean[2];
      const double weight = softmax_weight(c, logit, state.level), p = weight / state.sum;
      const double of_value = cotangent.value.term(weight, value);
      vjp += alpha * p * (t[0] + d * t[1] + of_value) * direction + p * cotangent.value.grad * value_direction;
      // Of the differences d and value - expectation, what they are differences of.
      const double sizes = map.size[1] * std::abs(cotangent.grad_mean[1]) + map.size[2] * std::abs(t[1]) +
                           std::abs(cotangent.value.grad) * (std::isfinite(value) ? std::abs(value) : 0);
      terms += std::abs(alpha * p * direction) * sizes + std::abs(p * cotangent.value.grad * value_direction);
      CHECK(std::isfinite(of_value));
    }
    const auto moved = moments<Dual, Keep::kExpectation>(dual, Dual(c), parts);
    double jvp = cotangent.grad_mean[1] * moved.mean(1).slope + cotangent.grad_mean[2] * moved.mean(2).slope;
    if (!spoilt) jvp += cotangent.value.grad * expectation_of(moved, Dual(c)).slope;
    CHECK(agree("expectation", jvp, vjp, terms, 1e-11));
  }
}

// Whether a value counts is decided by its final weight, wherever it stood and whatever was summed with it.
void test_values_that_fade() {
  for (const double logit : {-1100.0, -60.0}) {  // 2^logit against 1: nothing, and something
    for (const int place : {0, 1, 2}) {
      Map<double> map{{1, 1, 3}, {-10, -10, -10}, {4, 4, 4}};
      map.logits[static_cast<size_t>(place)] = logit;
      map.values[static_cast<size_t>(place)] = NAN;
      map.logits[static_cast<size_t>(place + 1) % 3] = 0;
      for (const int parts : {1, 2, 3}) {
        const double found = expectation_of(moments<double, Keep::kExpectation>(map, 1.0, parts), 1.0);
        CHECK(logit < -1000 ? found == 4.0 : std::isnan(found));
      }
    }
  }
}

void test_moments_of_nothing() {
  Map<double> map{{1, 2, 3}, std::vector<double>(6, -HUGE_VAL), {}};
  for (const int parts : {1, 2, 6}) {
    const MomentState<double, Keep::kCovariance> state = moments(map, 2.0, parts);
    CHECK(state.sum == 0 && state.level == -HUGE_VAL && std::isnan(state.mean(0)));
    CHECK(state.log_partition() == -HUGE_VAL);
    map.logits[4] = NAN;
    CHECK(std::isnan(moments(map, 2.0, parts).mean(2)));
    map.logits[4] = HUGE_VAL;
    CHECK(std::isnan(moments(map, 2.0, parts).mean(1)));
    map.logits[4] = -HUGE_VAL;
  }
}

// ---- Numbers ----

void test_inverse_power_of_two() {
  for (int exponent = -126; exponent <= 126; ++exponent)
    for (const float mantissa : {1.0f, 1.5f, 1.9999999f}) {
      const float x = std::ldexp(mantissa, exponent);
      CHECK(inverse_power_of_two(x) == std::ldexp(1.0f, -exponent) &&
            inverse_power_of_two(-x) == inverse_power_of_two(x));
    }
  for (int exponent = -1022; exponent <= 1022; ++exponent)
    CHECK(inverse_power_of_two(std::ldexp(1.7, exponent)) == std::ldexp(1.0, -exponent));
  for (const float x : {0.0f, 1e-40f, 2e38f, HUGE_VALF, NAN}) CHECK(inverse_power_of_two(x) == 1.0f);
  for (const double x : {0.0, 1e-310, 1e308, HUGE_VAL, double(NAN)}) CHECK(inverse_power_of_two(x) == 1.0);
}

// The value of a binary16 or bfloat16 number by the definition of its format.
double value_of(uint16_t bits, int mantissa_bits) {
  const int exponent_bits = 15 - mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int mantissa = bits & ((1 << mantissa_bits) - 1),
            exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? NAN : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

template <class Half>
void check_rounding(float x, uint16_t expected) {
  Half half;
  store(&half, x);
  CHECK(half.bits == expected);
  store(&half, -x);
  CHECK(half.bits == (expected ^ 0x8000));
}

// Every number is read exactly, and written back as itself; floats between two neighbours go to the nearer one, or,
// half way, to the one whose last bit is 0.
template <class Half>
void test_half(int mantissa_bits) {
  const auto infinity_bits = static_cast<uint16_t>(((1 << (15 - mantissa_bits)) - 1) << mantissa_bits);
  for (int bits = 0; bits < 65536; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const double value = value_of(half.bits, mantissa_bits);
    const float loaded = load(&half);
    Half back;
    store(&back, loaded);
    if (std::isnan(value)) {
      CHECK(std::isnan(loaded) && std::isnan(load(&back)));
      continue;
    }
    CHECK(double(loaded) == value && std::signbit(loaded) == std::signbit(value) && back.bits == half.bits);
    if (bits >= infinity_bits) continue;  // each pair of neighbours once, from the lower one
    const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1);
    const double below = value_of(low, mantissa_bits);
    // Beyond the largest number the next one would be 2^128 (bfloat16: not a float) or 65536.
    const double above =
        high < infinity_bits ? value_of(high, mantissa_bits) : 2 * below - value_of(low - 1, mantissa_bits);
    const auto middle = static_cast<float>(below + (above - below) / 2);
    check_rounding<Half>(middle, low % 2 == 0 ? low : high);
    check_rounding<Half>(std::nextafter(middle, 0.0f), low);
    check_rounding<Half>(std::nextafter(middle, HUGE_VALF), high);
    check_rounding<Half>(static_cast<float>(below + (above - below) * uniform(0, 0.49)), low);
    check_rounding<Half>(static_cast<float>(below + (above - below) * uniform(0.51, 0.99)), high);
  }
  check_rounding<Half>(std::numeric_limits<float>::infinity(), infinity_bits);
  check_rounding<Half>(std::numeric_limits<float>::max(), infinity_bits);
  check_rounding<Half>(1e-45f, 0);
}

// ---- Batches and shared sums ----

void test_batches() {
  for (int trial = 0; trial < 3000; ++trial) {
    // Operand 0 is the owner: contiguous in its own dimensions, 0 in the others. 1 and 2 have any strides.
    int64_t size[4], strides[3][4];
    const int dims = integer(0, 4);
    int64_t count = 1, own = 1;
    for (int d = dims - 1; d >= 0; --d) {
      size[d] = trial % 40 == 0 ? integer(0, 3) : integer(1, 6);
      const bool owned = integer(0, 1) == 1;
      strides[0][d] = owned ? own : 0;
      own *= owned ? size[d] : 1;
      strides[1][d] = count;  // contiguous: so that dimensions merge
      strides[2][d] = integer(-3, 3);
      count *= size[d];
    }
    const int64_t* const pointers[3] = {strides[0], strides[1], strides[2]};
    for (const int owner : {-1, 0}) {
      Batch<3> batch;
      CHECK(make_batch(size, dims, pointers, batch, owner));
      CHECK(batch.count == count);
      if (count == 0) {
        CHECK(shared_sum_plan(batch, owner == 0, 7, 5).units == 0);
        continue;
      }
      std::vector<int> visits(static_cast<size_t>(count), 0);
      std::vector<int64_t> owner_of;
      for (int64_t item = 0; item < count; ++item) {
        int64_t offset[3];
        batch.offsets(item, offset);
        int32_t narrow[3];
        batch.offsets(static_cast<int32_t>(item), narrow);
        CHECK(narrow[0] == offset[0] && narrow[1] == offset[1] && narrow[2] == offset[2]);
        // Operand 1 tells the multi-index, and that the offsets of the others.
        int64_t expected[2] = {0, 0};
        for (int d = 0; d < dims; ++d) {
          const int64_t index = offset[1] / strides[1][d] % size[d];
          expected[0] += index * strides[0][d];
          expected[1] += index * strides[2][d];
        }
        CHECK(offset[1] >= 0 && offset[1] < count && ++visits[static_cast<size_t>(offset[1])] == 1);
        CHECK(offset[0] == expected[0] && offset[2] == expected[1]);
        CHECK(owner == 0 || offset[1] == item);  // without an owner: row-major order
        owner_of.push_back(offset[0]);
      }
      if (owner < 0) {
        CHECK(batch.shared == 1);
        continue;
      }
      CHECK(count % batch.shared == 0 && count / batch.shared == own);
      for (int64_t item = 0; item < count; ++item)  // those of one owner are neighbours; owners come in order
        CHECK(owner_of[static_cast<size_t>(item)] ==
                  owner_of[static_cast<size_t>(item / batch.shared * batch.shared)] &&
              (item == 0 || item % batch.shared != 0 ||
               owner_of[static_cast<size_t>(item)] > owner_of[static_cast<size_t>(item - 1)]));

      for (const int64_t per_unit : {1, 2, 5, 32, 1024}) {
        const SharedSumPlan plan = shared_sum_plan(batch, true, 7, per_unit);
        CHECK(plan.partial_count == (plan.units_per_owner > 1 ? plan.units * 7 : 0));
        int64_t next = 0;
        for (int64_t unit = 0; unit < plan.units; ++unit) {  // every item once, in order
          const ItemRange items = unit_items(plan, count, batch.shared, unit);
          CHECK(items.begin == next && items.end > items.begin &&
                items.end - items.begin <= std::max(per_unit, int64_t(1)));
          if (plan.units_per_owner > 1)  // a part of the one owner whose partial sum it is
            CHECK(items.begin / batch.shared == unit / plan.units_per_owner &&
                  (items.end - 1) / batch.shared == unit / plan.units_per_owner);
          else  // whole owners
            CHECK(items.begin % batch.shared == 0 && items.end % batch.shared == 0);
          next = items.end;
        }
        CHECK(next == count);
      }
    }
  }
  // More dimensions than fit, none of which merge.
  int64_t size[10], strides[10];
  for (int d = 0; d < 10; ++d) size[d] = 2, strides[d] = d % 2 == 0 ? 1 : 3;
  const int64_t* const pointers[1] = {strides};
  Batch<1> batch;
  CHECK(make_batch(size, 8, pointers, batch));
  CHECK(!make_batch(size, 9, pointers, batch));
}

void test_offsets_that_fit_int32() {
  constexpr int64_t kMost = 2147483647;
  const auto fits = [](std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, int64_t within) {
    Batch<1> batch;
    const int64_t* const pointers[1] = {strides.begin()};
    CHECK(make_batch(sizes.begin(), static_cast<int>(sizes.size()), pointers, batch));
    return batch.fits_int32(0, within);
  };
  CHECK(fits({}, {}, kMost) && !fits({}, {}, kMost + 1) && !fits({}, {}, -kMost - 1));
  CHECK(fits({2}, {kMost}, 0) && !fits({2}, {kMost}, 1) && !fits({2}, {kMost + 1}, 0));
  CHECK(fits({2}, {-kMost}, 0) && !fits({2}, {-kMost}, 1));
  CHECK(fits({1}, {kMost + 1}, 6) && fits({0, 5}, {kMost + 1, 1}, 6));  // never taken
  CHECK(fits({3, 5}, {kMost / 2 - 10, 5}, 1) && !fits({3, 5}, {kMost / 2 - 10, 5}, 2));
  CHECK(fits({kMost}, {0}, 2) && !fits({kMost + 1}, {0}, 2));  // the items themselves
}

}  // namespace

int main() {
  test_triangulate_vjp();
  test_triangulate_degenerate();
  test_project_vjp();
  testing::test_rigid_align();
  testing::test_unproject();
  test_soft_argmax_vjp();
  test_expectation_vjp();
  test_values_that_fade();
  test_moments_of_nothing();
  test_inverse_power_of_two();
  test_half<Float16>(10);
  test_half<BFloat16>(7);
  test_batches();
  test_offsets_that_fit_int32();
  for (const auto& [name, error] : testing::worst)
    std::printf("%-26s <v, J u> and <J^T v, u> agree to %.1e\n", name.c_str(), error);
  cpu::baseline::test_lanes();
#if defined(TRITOOL_X86_VARIANTS)
  if (isa() >= Isa::kAvx2) cpu::avx2::test_lanes();
  if (isa() >= Isa::kAvx512) cpu::avx512::test_lanes();
#endif
  return testing::report();
}
