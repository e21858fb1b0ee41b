// SPDX-License-Identifier: Apache-2.0
// CHECK and its count, for the native test executables.
#pragma once

#include <cstdio>

namespace tritool::testing {

inline int passed = 0;
inline int failed = 0;

inline bool check(bool condition, const char* text, const char* file, int line) {
  ++(condition ? passed : failed);
  if (!condition && failed <= 50) std::printf("%s:%d: failed: %s\n", file, line, text);
  return condition;
}

// The last line of a test, and its exit code.
inline int report() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace tritool::testing

// True where the condition holds, so that a failure can print what it saw.
#define CHECK(condition) ::tritool::testing::check((condition), #condition, __FILE__, __LINE__)
