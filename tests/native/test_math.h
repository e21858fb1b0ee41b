// SPDX-License-Identifier: Apache-2.0
// What the files of the executable test_math share.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <string>

namespace tritool::testing {

// The largest relative disagreement of the two sides seen under a name, printed at the end.
inline std::map<std::string, double> worst;

// Compares <v, J u> with <J^T v, u>; `terms` is the sum of the latter's absolute terms.
inline bool agree(const char* name, double jvp, double vjp, double terms, double bound) {
  const double error = std::abs(jvp - vjp) / std::max(terms, 1e-300);
  worst[name] = std::max(worst[name], std::isnan(error) ? HUGE_VAL : error);
  return error <= bound;
}

void test_rigid_align();
void test_unproject();

}  // namespace tritool::testing

// test_lanes.cpp is compiled once per instruction set, as the CPU kernels are.
namespace tritool::cpu {

namespace baseline {
void test_lanes();
}
namespace avx2 {
void test_lanes();
}
namespace avx512 {
void test_lanes();
}

}  // namespace tritool::cpu
