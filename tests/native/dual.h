// SPDX-License-Identifier: Apache-2.0
// Dual numbers with the vocabulary of math/scalar.h: a formula run on them yields its value and the derivative along
// one direction, exact to rounding. Comparisons look at values, so every branch is the one the value takes.
#pragma once

#include "math/scalar.h"

TRITOOL_MATH_BEGIN

struct Dual {
  double value = 0.0;
  double slope = 0.0;

  Dual() = default;
  Dual(double constant) : value(constant) {}
  Dual(double at, double direction) : value(at), slope(direction) {}
};

template <>
struct RealOf<Dual> {
  using type = double;
};

// The chain rule for one argument. A value that does not move contributes nothing, also where the derivative is
// infinite.
inline Dual chain(double value, double derivative, const Dual& x) {
  return {value, x.slope == 0.0 ? 0.0 : derivative * x.slope};
}

inline Dual operator+(const Dual& a, const Dual& b) { return {a.value + b.value, a.slope + b.slope}; }
inline Dual operator-(const Dual& a, const Dual& b) { return {a.value - b.value, a.slope - b.slope}; }
inline Dual operator*(const Dual& a, const Dual& b) {
  return {a.value * b.value, chain(0.0, b.value, a).slope + chain(0.0, a.value, b).slope};
}
inline Dual operator/(const Dual& a, const Dual& b) {
  const double ratio = a.value / b.value;
  return {ratio, chain(0.0, 1.0 / b.value, a).slope - chain(0.0, ratio / b.value, b).slope};
}
inline bool operator<(const Dual& a, const Dual& b) { return a.value < b.value; }
inline bool operator>(const Dual& a, const Dual& b) { return a.value > b.value; }
inline bool operator<=(const Dual& a, const Dual& b) { return a.value <= b.value; }
inline bool operator>=(const Dual& a, const Dual& b) { return a.value >= b.value; }
inline bool operator==(const Dual& a, const Dual& b) { return a.value == b.value; }
inline bool operator!=(const Dual& a, const Dual& b) { return a.value != b.value; }

inline Dual select(bool condition, const Dual& a, const Dual& b) { return condition ? a : b; }
inline Dual sqrt_(const Dual& x) {
  const double root = sqrt_(x.value);
  return chain(root, 0.5 / root, x);
}
inline Dual rsqrt_(const Dual& x) {
  const double inverse = rsqrt_(x.value);
  return chain(inverse, -0.5 * inverse / x.value, x);
}
inline Dual abs_(const Dual& x) { return chain(abs_(x.value), x.value < 0.0 ? -1.0 : 1.0, x); }
// Steps: constant but for their jumps.
inline Dual ceil_(const Dual& x) { return Dual(ceil_(x.value)); }
inline Dual floor_(const Dual& x) { return Dual(floor_(x.value)); }
inline Dual inverse_power_of_two(const Dual& x) { return Dual(inverse_power_of_two(x.value)); }
inline Dual multiply_subtract(const Dual& a, const Dual& b, const Dual& c) {
  return {multiply_subtract(a.value, b.value, c.value), (a * b - c).slope};
}
inline Dual exp2_(const Dual& x) {
  const double power = exp2_(x.value);
  return chain(power, 0.69314718055994530942 * power, x);
}
inline Dual log2_(const Dual& x) { return chain(log2_(x.value), 1.4426950408889634074 / x.value, x); }

TRITOOL_MATH_END
