// SPDX-License-Identifier: Apache-2.0
//
// Each block takes up where the last one stopped: at an address that it shared with another block,
// ThreadSanitizer would see a race between the two. When the memory is used up it is mapped anew,
// which makes ThreadSanitizer forget what it knew of it. Compiled like emulator.cpp.
#include "shared_memory.h"

#include <sys/mman.h>

#include <stdexcept>

#include "sanitizers.h"

namespace tritool::emulator {
namespace {

constexpr unsigned char kRedZoneByte = 0xFB;
constexpr unsigned char kUnsetByte = 0xFF;  // of a NaN, as float and as double

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Words, not bytes, for speed; volatile, so that the loop does not become a call of memset, which
// the sanitizers intercept. `begin` is aligned to 8.
void fill(unsigned char* begin, size_t bytes, unsigned char byte) {
  const uint64_t word = 0x0101010101010101ull * byte;
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) *reinterpret_cast<volatile uint64_t*>(begin + i) = word;
  for (; i < bytes; ++i) *static_cast<volatile unsigned char*>(begin + i) = byte;
}

bool is_filled(const unsigned char* begin, const unsigned char* end, unsigned char byte) {
  for (; begin != end; ++begin) {
    if (*begin != byte) return false;
  }
  return true;
}

}  // namespace

void* map_pages(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("tritool emulator: out of memory");
  return p;
}

SharedMemory::SharedMemory() { map(); }
SharedMemory::~SharedMemory() { unmap(); }

void SharedMemory::map() {
  memory_ = static_cast<unsigned char*>(map_pages(kMappedBytes));
  forbid_access(memory_, kMappedBytes);
  used_ = 0;
}

void SharedMemory::unmap() {
  allow_access(memory_, kMappedBytes);
  munmap(memory_, kMappedBytes);
}

// Leaves a red zone behind the array; the one in front is that of the array before it.
unsigned char* SharedMemory::cut(const void* key, size_t bytes, Site site) {
  const size_t padded = round_up(bytes, kRedZoneBytes) + kRedZoneBytes;
  unsigned char* const begin = memory_ + used_;
  used_ += padded;
  allow_access(begin, bytes);
  fill(begin, padded, kRedZoneByte);
  fill(begin, bytes, kUnsetByte);
  arrays_[count_++] = {key, begin, bytes, site};
  return begin;
}

void SharedMemory::begin_block(size_t dynamic_bytes) {
  if (used_ + kMaxBlockBytes > kMappedBytes) {
    unmap();
    map();
  }
  block_begin_ = used_;
  static_bytes_ = 0;
  count_ = 0;
  fill(memory_ + used_, kRedZoneBytes, kRedZoneByte);
  used_ += kRedZoneBytes;
  cut(nullptr, dynamic_bytes, {"dynamic shared memory", 0});
}

void* SharedMemory::array(const void* key, size_t bytes, size_t alignment, Site site, const char** error) {
  for (int i = 1; i < count_; ++i) {
    if (arrays_[i].key == key) return arrays_[i].begin;
  }
  static_bytes_ = round_up(static_bytes_, alignment) + bytes;
  if (static_bytes_ > kMaxStaticBytes) {
    *error = "more than 48 KiB of static shared memory";
    return nullptr;
  }
  if (count_ == kMaxArrays) {
    *error = "more than 63 shared arrays";
    return nullptr;
  }
  return cut(key, bytes, site);
}

Site SharedMemory::end_block() {
  Site damaged{};
  const unsigned char* gap = memory_ + block_begin_;
  for (int i = 0; i < count_; ++i) {
    const Array& array = arrays_[i];
    if (!is_filled(gap, array.begin, kRedZoneByte)) damaged = arrays_[i == 0 ? 0 : i - 1].site;
    gap = array.begin + array.bytes;
  }
  if (!is_filled(gap, memory_ + used_, kRedZoneByte)) damaged = arrays_[count_ - 1].site;
  forbid_access(memory_ + block_begin_, used_ - block_begin_);
  return damaged;
}

}  // namespace tritool::emulator
