// SPDX-License-Identifier: Apache-2.0
// Softmax moments of a map of logits: mean (the soft-argmax), covariance, log-partition, the expectation of a second
// map, in one pass; and their vector-Jacobian product. Iskakov et al., ICCV 2019, equations (1)-(2) and (13)-(14);
// Iqbal et al., ECCV 2018, for the second map.
//
// A map has three axes (the first of size 1 for a 2D heat map). With c = alpha log2(e), every voxel weighs
//   p = exp2(c l - level), level = ceil(c max l) an integer,
// so that raising the level rescales all sums by a power of two, exactly. An ordinary online softmax rounds at every
// new maximum, which costs 3e-2 voxels on a rising ramp. c l - level is one fused operation. Derivation, measured
// errors: docs/ops/soft_argmax.md.
//
// A voxel at -inf is masked: weight 0, gradient 0. If all are, or one is NaN or +inf, the mean is NaN and the gradient
// 0. Values of the second map are ignored where the weight is 0; one that is not finite elsewhere makes the expectation
// NaN, and nothing else.
#pragma once

#include "math/half.h"
#include "math/scalar.h"

TRITOOL_MATH_BEGIN

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// The level under which a largest logit fits; -inf for -inf, so that it never wins.
template <class T>
TRITOOL_HD T level_of(T c, T largest) {
  return ceil_(c * largest);
}

// The weight of a logit; `level` of a map in which nothing but -inf has been seen is -inf.
template <class T>
TRITOOL_HD T softmax_weight(T c, T logit, T level) {
  return exp2_(multiply_subtract(c, logit, select(level == T(0) - infinity<T>(), T(0), level)));
}

// What is summed besides the weights and the mean.
enum class Keep { kMean, kCovariance, kExpectation };

// The running sum of p v, v the values of the second map. Those that are not finite stay out of it: whether they weigh
// anything is only known at the end, when the level is.
template <class T>
struct ValueSum {
  T sum;
  T spoilt;  // the largest logit whose value is not finite

  TRITOOL_HD void reset() {
    sum = T(0);
    spoilt = T(0) - infinity<T>();
  }
  TRITOOL_HD void add(T p, T logit, T v) {
    const auto known = is_finite(v);
    sum = sum + p * select(known, v, T(0));
    spoilt = select(known, spoilt, max_(logit, spoilt));
  }
  // Another sum of the same level.
  TRITOOL_HD void add(const ValueSum& other) {
    sum = sum + other.sum;
    spoilt = max_(other.spoilt, spoilt);
  }
};

// The running sums of a map, or of part of one. Coordinates count from `origin`: the map's centre for the mean alone;
// for the covariance the voxel at which the level was last raised, because second moments about a far point cancel.
template <class T, Keep kKeep>
struct MomentState {
  static constexpr bool kSecond = kKeep == Keep::kCovariance, kValue = kKeep == Keep::kExpectation;
  T level, sum;
  T first[3];                 // sum of p d, d = coordinate - origin
  T second[kSecond ? 6 : 1];  // sum of p d d^T: 00 01 02 11 12 22
  T origin[3];
  ValueSum<T> value;  // left alone without kValue

  TRITOOL_HD void reset(const T (&centre)[3]) {
    level = T(0) - infinity<T>();
    for (int a = 0; a < 3; ++a) origin[a] = centre[a];
    clear();
  }

  // Forgets the sums, not what they are counted by.
  TRITOOL_HD void clear() {
    sum = T(0);
    for (T& moment : first) moment = T(0);
    for (T& moment : second) moment = T(0);
    value.reset();
  }

  TRITOOL_HD void scale(T factor) {
    sum = sum * factor;
    for (int a = 0; a < 3; ++a) first[a] = first[a] * factor;
    if constexpr (kSecond)
      for (T& moment : second) moment = moment * factor;
    if constexpr (kValue) value.sum = value.sum * factor;
  }

  // The same sums, counted from another origin.
  TRITOOL_HD void move_origin(const T (&target)[3]) {
    T shift[3];
    for (int a = 0; a < 3; ++a) shift[a] = origin[a] - target[a];
    if constexpr (kSecond) {
      int k = 0;
      for (int a = 0; a < 3; ++a)
        for (int b = a; b < 3; ++b, ++k)
          second[k] = second[k] + first[a] * shift[b] + first[b] * shift[a] + sum * shift[a] * shift[b];
    }
    for (int a = 0; a < 3; ++a) {
      first[a] = first[a] + sum * shift[a];
      origin[a] = target[a];
    }
  }

  // Raises the level to `to` where that is higher; `at`: the voxel that asks for it.
  TRITOOL_HD void raise(T to, const T (&at)[3]) {
    const auto higher = to > level;
    scale(select(higher, exp2_(level - to), T(1)));
    if constexpr (kSecond) {
      T target[3];
      for (int a = 0; a < 3; ++a) target[a] = select(higher, at[a], origin[a]);
      move_origin(target);
    }
    level = select(higher, to, level);
  }

  // One voxel of weight p.
  TRITOOL_HD void add(T p, T i, T j, T k) {
    const T d[3] = {i - origin[0], j - origin[1], k - origin[2]};
    add_row(p, p * d[2], kSecond ? p * d[2] * d[2] : T(0), i, j);
  }

  // The voxels (i, j, .): the sums of their weights, of p d and of p d^2 along the last axis.
  TRITOOL_HD void add_row(T p, T p_d, T p_dd, T i, T j) {
    const T d0 = i - origin[0], d1 = j - origin[1];
    sum = sum + p;
    first[0] = first[0] + p * d0;
    first[1] = first[1] + p * d1;
    first[2] = first[2] + p_d;
    if constexpr (kSecond) {
      second[0] = second[0] + p * d0 * d0;
      second[1] = second[1] + p * d0 * d1;
      second[2] = second[2] + p_d * d0;
      second[3] = second[3] + p * d1 * d1;
      second[4] = second[4] + p_d * d1;
      second[5] = second[5] + p_dd;
    }
  }

  TRITOOL_HD void merge(MomentState other) {
    const auto other_higher = other.level > level;
    const T top = select(other_higher, other.level, level);
    if constexpr (kSecond) {
      T target[3];
      for (int a = 0; a < 3; ++a) target[a] = select(other_higher, other.origin[a], origin[a]);
      move_origin(target);
      other.move_origin(target);
    }
    // -inf - -inf would be NaN; two empty states stay empty.
    const auto nothing = top == T(0) - infinity<T>();
    scale(select(nothing, T(1), exp2_(level - select(nothing, T(0), top))));
    other.scale(select(nothing, T(1), exp2_(other.level - select(nothing, T(0), top))));
    sum = sum + other.sum;
    for (int a = 0; a < 3; ++a) first[a] = first[a] + other.first[a];
    if constexpr (kSecond)
      for (int k = 0; k < 6; ++k) second[k] = second[k] + other.second[k];
    if constexpr (kValue) value.add(other.value);
    level = top;
  }

  TRITOOL_HD T mean(int axis) const { return origin[axis] + first[axis] / sum; }
  TRITOOL_HD T covariance(int a, int b) const {
    static_assert(kSecond || sizeof(T) == 0, "second moments were not kept");
    const int low = a < b ? a : b, high = a < b ? b : a;
    const int k = low == 0 ? high : low + high + 1;
    const T value = second[k] / sum - first[a] / sum * (first[b] / sum);
    return a == b ? select(value < T(0), T(0), value) : value;
  }
  // spoilt_weight: softmax_weight of value.spoilt, computed like those in the sums.
  TRITOOL_HD T expectation(T spoilt_weight) const {
    static_assert(kValue || sizeof(T) == 0, "no values were kept");
    return select(spoilt_weight > T(0), quiet_nan<T>(), value.sum / sum);
  }
  // log sum exp(alpha l)
  TRITOOL_HD T log_partition() const { return T(Real<T>(kLn2)) * (level + log2_(sum)); }
};

// The part of the second map in the gradient: to the logit of a voxel of value v, alpha p / sum g (v - expectation); to
// v, p / sum g. Weights up to `floor` take no part, whatever v: 0, and infinity where there is no expectation.
template <class T>
struct ValueCotangent {
  T grad, expectation, floor;

  TRITOOL_HD T term(T weight, T v) const { return grad * (select(weight > floor, v, expectation) - expectation); }
};

// One for a gradient and an expectation that may be NaN.
template <class T>
TRITOOL_HD ValueCotangent<T> value_cotangent(T grad, T expectation) {
  const auto known = is_finite(expectation);
  return {select(known, grad, T(0)), select(known, expectation, T(0)), select(known, T(0), infinity<T>())};
}

// What the backward knows of a map: gradients to its mean, covariance, log-partition and expectation, and the values
// they belong to. d/dl = alpha p / sum t, t = g.d + d^T G d - <G, C> + g_log + value.term, d = coordinate - mean.
template <class T>
struct MomentCotangent {
  T mean[3];
  T level, inverse_sum;
  T grad_mean[3];
  T grad_second[6];  // symmetrised G: 00 01 02 11 12 22
  T constant;        // g_log - <G, C>
  ValueCotangent<T> value;
  bool valid;

  // Along the row (i, j, .), t is the polynomial t[0] + t[1] d + t[2] d^2 of d = k - mean[2].
  TRITOOL_HD void row(T i, T j, T (&t)[3]) const {
    const T d0 = i - mean[0], d1 = j - mean[1];
    t[0] = constant + grad_mean[0] * d0 + grad_mean[1] * d1 + grad_second[0] * d0 * d0 +
           T(2) * grad_second[1] * d0 * d1 + grad_second[3] * d1 * d1;
    t[1] = grad_mean[2] + T(2) * (grad_second[2] * d0 + grad_second[4] * d1);
    t[2] = grad_second[5];
  }
};

TRITOOL_MATH_END
