// SPDX-License-Identifier: Apache-2.0
// test_lanes.cpp is compiled once per instruction set, as the CPU kernels are.
#pragma once

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
