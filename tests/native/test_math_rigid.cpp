// SPDX-License-Identifier: Apache-2.0
// Proves csrc/math/rigid_align.h as test_math.cpp does the others.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "dual.h"
#include "math/rigid_align.h"
#include "test_math.h"

namespace {

using namespace tritool;
using testing::agree;

std::mt19937_64 generator(4);
double normal() { return std::normal_distribution<double>()(generator); }
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

template <class T>
struct ListedPoints {
  int count;
  bool weighted;
  const std::vector<Correspondence<T>>& points;
  const Correspondence<T>& operator()(int n) const { return points[static_cast<size_t>(n)]; }
};
template <class T>
ListedPoints<T> listed(const std::vector<Correspondence<T>>& points, bool weighted) {
  return {static_cast<int>(points.size()), weighted, points};
}

struct PointGradientSink {
  std::vector<CorrespondenceGradient<double>> gradients;
  void operator()(int, const CorrespondenceGradient<double>& gradient) { gradients.push_back(gradient); }
};

void random_rotation(double (&rotation)[3][3]) {
  double q[4], norm = 0;
  for (double& x : q) x = normal(), norm += x * x;
  for (double& x : q) x /= std::sqrt(norm);
  const double w = q[0], x = q[1], y = q[2], z = q[3];
  const double entries[3][3] = {{1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)},
                                {2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)},
                                {2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)}};
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) rotation[i][j] = entries[i][j];
}

enum class Shape { kGeneric, kPlanar, kMirrored, kCube };

// Points within metres of one another and far from the origin, and the same moved, scaled and disturbed, in
// millimetres.
std::vector<Correspondence<double>> random_points(int count, Shape shape) {
  double rotation[3][3];
  random_rotation(rotation);
  const double scale = uniform(0.5, 2), offset[3] = {3000 * normal(), 3000 * normal(), 3000 * normal()};
  std::vector<Correspondence<double>> points(static_cast<size_t>(shape == Shape::kCube ? 8 : count));
  for (size_t n = 0; n < points.size(); ++n) {
    Correspondence<double>& point = points[n];
    double local[3];
    for (int k = 0; k < 3; ++k) local[k] = shape == Shape::kCube ? ((n >> k) % 2 == 0 ? -400 : 400) : 400 * normal();
    if (shape == Shape::kPlanar) local[2] = 0;
    for (int k = 0; k < 3; ++k) point.source[k] = local[k] + 2 * offset[k];
    if (shape == Shape::kMirrored) local[0] *= -1;
    for (int i = 0; i < 3; ++i) {
      point.target[i] = offset[i] + (shape == Shape::kCube ? 0 : 20 * normal());
      for (int j = 0; j < 3; ++j) point.target[i] += scale * rotation[i][j] * local[j];
    }
    point.weight = shape == Shape::kCube ? 1 : std::pow(10.0, uniform(-1.5, 0.5));
  }
  return points;
}

void test_rigid_align_vjp() {
  for (int trial = 0; trial < 4000; ++trial) {
    const auto shape = static_cast<Shape>(trial % 4);
    // A plane's M has rank 2 only while the targets are in a plane, too: four points at least for the others.
    std::vector<Correspondence<double>> points = random_points(trial % 50 == 0 ? 77 : integer(4, 9), shape);
    const bool with_scale = trial % 8 < 4, weighted = trial % 16 < 8;
    if (!weighted)
      for (auto& point : points) point.weight = 1;
    if (trial % 5 == 0 && shape != Shape::kCube) {  // absent, in each of three ways
      Correspondence<double> absent = points[0];
      if (weighted && trial % 15 == 0) absent.weight = 0, absent.source[2] = HUGE_VAL;
      if (!weighted || trial % 15 == 5) absent.source[1] = NAN;
      if (trial % 15 == 10) absent.target[0] = NAN, absent.weight = weighted ? -1 : 1;
      points.insert(points.begin() + integer(0, static_cast<int>(points.size())), absent);
    }
    const RigidAlignment<double> solved = align<double>(listed(points, weighted), with_scale);
    // How well the points determine the rotation: mirror images may not.
    double least = HUGE_VAL, largest = 0;
    for (const double inverse : solved.inverse_sum)
      least = std::min(least, 1 / inverse), largest = std::max(largest, 1 / inverse);
    if (!(least > 0.02 * largest)) continue;
    CHECK(solved.valid);

    double grad_rotation[3][3], grad_translation[3], grad_scale = 300 * normal();
    for (int i = 0; i < 3; ++i) {
      for (double& g : grad_rotation[i]) g = 300 * normal();
      grad_translation[i] = normal() * (trial % 3 != 0);
    }
    PointGradientSink sink;
    rigid_align_points_vjp<double>(listed(points, weighted), with_scale, grad_rotation, grad_translation, grad_scale,
                                   sink);
    CHECK(sink.gradients.size() == points.size());

    // Along the source, the target, the weights, and all at once.
    for (int group = 0; group < 4; ++group) {
      if (group == 2 && (!weighted || shape == Shape::kCube)) continue;  // exact data do not move with the weights
      std::vector<Correspondence<Dual>> dual_points;
      double vjp = 0, terms = 0;
      for (size_t n = 0; n < points.size(); ++n) {
        const CorrespondenceGradient<double>& gradient = sink.gradients[n];
        const bool present = is_present(points[n]);
        const auto along = [&](double value, double size, bool wanted, double g) {
          const double direction = wanted && present ? size * normal() : 0.0;
          vjp += g * direction;
          terms += std::abs(g * direction);
          CHECK(present || g == 0.0);
          return Dual(value, direction);
        };
        Correspondence<Dual> dual;
        for (int k = 0; k < 3; ++k) {
          dual.source[k] = along(points[n].source[k], 1.0, group == 0 || group == 3, gradient.source[k]);
          dual.target[k] = along(points[n].target[k], 1.0, group == 1 || group == 3, gradient.target[k]);
        }
        dual.weight = along(points[n].weight, points[n].weight, weighted && group >= 2, gradient.weight);
        dual_points.push_back(dual);
      }
      Dual rotation[3][3], translation[3], scale;
      rigid_align_points<Dual>(listed(dual_points, weighted), with_scale, rotation, translation, scale);
      double jvp = with_scale ? grad_scale * scale.slope : 0;
      for (int i = 0; i < 3; ++i) {
        jvp += grad_translation[i] * translation[i].slope;
        for (int j = 0; j < 3; ++j) jvp += grad_rotation[i][j] * rotation[i][j].slope;
      }
      const char* names[] = {"rigid_align: source", "rigid_align: target", "rigid_align: weights", "rigid_align: all"};
      CHECK(agree(names[group], jvp, vjp, terms, 1e-9));
    }
  }
}

void test_rigid_align_degenerate() {
  for (int trial = 0; trial < 400; ++trial) {
    const int kind = trial % 10;
    std::vector<Correspondence<double>> points = random_points(6, Shape::kGeneric);
    if (kind == 0) points.clear();
    if (kind == 1) points.resize(1);
    if (kind == 2) points.resize(2);
    for (size_t n = 0; n < points.size(); ++n) {
      Correspondence<double>& point = points[n];
      for (int k = 0; k < 3; ++k) {
        if (kind == 3) point.source[k] = points[0].source[k];
        if (kind == 4) point.target[k] = points[0].target[k];
        // On a line; a cross of three pairs, whose mirror image can be laid on by infinitely many half turns.
        if (kind == 5) point.target[k] = points[0].target[k] + double(n) * 300 * (k - 0.7);
        if (kind == 6) point.source[k] = size_t(k) == n / 2 ? (n % 2 == 0 ? -300 : 300) : 0;
        if (kind == 6) point.target[k] = -2 * point.source[k];
      }
      if (kind == 6) point.weight = 1;
      if (kind == 7) point.weight = 0;
    }
    if (kind == 8) points[1].weight = trial % 3 == 0 ? -1 : trial % 3 == 1 ? HUGE_VAL : double(NAN);
    if (kind == 9) points[2].target[1] = -HUGE_VAL;
    const bool with_scale = trial % 20 < 10;
    double rotation[3][3], translation[3], scale;
    rigid_align_points<double>(listed(points, true), with_scale, rotation, translation, scale);
    for (int i = 0; i < 3; ++i) {
      CHECK(std::isnan(translation[i]));
      for (const double entry : rotation[i]) CHECK(std::isnan(entry));
    }
    CHECK(std::isnan(scale));
    const double grad_rotation[3][3] = {{1, NAN, 2}, {HUGE_VAL, 0, 1}, {1, 1, 1}}, grad_translation[3] = {1, NAN, 2};
    PointGradientSink sink;
    rigid_align_points_vjp<double>(listed(points, true), with_scale, grad_rotation, grad_translation, NAN, sink);
    for (const auto& gradient : sink.gradients) {
      CHECK(gradient.weight == 0);
      for (int k = 0; k < 3; ++k) CHECK(gradient.source[k] == 0 && gradient.target[k] == 0);
    }
  }
}

}  // namespace

void tritool::testing::test_rigid_align() {
  test_rigid_align_vjp();
  test_rigid_align_degenerate();
}
