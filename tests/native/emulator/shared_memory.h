// SPDX-License-Identifier: Apache-2.0
//
// The shared memory of the running block: arrays filled with NaN, cut from one stretch of memory
// between red zones.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator.h"

namespace tritool::emulator {

void* map_pages(size_t bytes);  // throws std::runtime_error

class SharedMemory {
 public:
  static constexpr size_t kMaxStaticBytes = 48 << 10;
  static constexpr size_t kMaxDynamicBytes = 227 << 10;  // the largest of devices (sm_90, sm_100)

  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void begin_block(size_t dynamic_bytes);

  // The array of `key` in this block, made at the first call. Null with *error set if it does not
  // fit. Called by fibers.
  void* array(const void* key, size_t bytes, size_t alignment, Site site, const char** error);
  void* dynamic() const { return arrays_[0].begin; }

  // Ends the block. Returns the declaration of an array next to which something was written, or a
  // Site without a file.
  Site end_block();

 private:
  static constexpr size_t kRedZoneBytes = 64;  // a multiple of every alignment
  static constexpr int kMaxArrays = 64;
  static constexpr size_t kMaxBlockBytes = kMaxStaticBytes + kMaxDynamicBytes + (kMaxArrays + 1) * 2 * kRedZoneBytes;
  static constexpr size_t kMappedBytes = 8 << 20;
  static_assert(kMaxBlockBytes < kMappedBytes);

  struct Array {
    const void* key;
    unsigned char* begin;
    size_t bytes;
    Site site;  // of its declaration
  };

  void map();
  void unmap();
  unsigned char* cut(const void* key, size_t bytes, Site site);

  unsigned char* memory_ = nullptr;
  size_t used_ = 0;         // by this and earlier blocks
  size_t block_begin_ = 0;  // of this block
  size_t static_bytes_ = 0;
  int count_ = 0;
  Array arrays_[kMaxArrays];  // the first is the dynamic shared memory
};

}  // namespace tritool::emulator
