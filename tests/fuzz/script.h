// The bytes that a fuzzer chooses, as decisions.

#ifndef SYNCBN_TESTS_FUZZ_SCRIPT_H_
#define SYNCBN_TESTS_FUZZ_SCRIPT_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

namespace syncbn::fuzz {

// Each decision takes a few bytes. Beyond the last byte every decision is 0, so a shorter input is a simpler one.
class Script {
 public:
  Script(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  bool done() const { return size_ == 0; }

  // Returns a number below `n`, which is at most 256.
  size_t Choose(size_t n) { return Byte() % n; }
  // Returns true once in `n` times.
  bool OneIn(size_t n) { return Choose(n) == n - 1; }

  uint8_t Byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }

  // Returns a small number, one at the edge of what a type can hold, or any.
  uint64_t Number() {
    constexpr uint64_t kEdges[] = {0x7f,
                                   0x80,
                                   0xffff,
                                   0x10000,
                                   0x7fffffff,
                                   0x80000000,
                                   0xffffffff,
                                   uint64_t{1} << 32,
                                   uint64_t{1} << 40,
                                   (uint64_t{1} << 40) + 1,
                                   uint64_t{1} << 48,
                                   uint64_t{1} << 53,
                                   std::numeric_limits<int64_t>::max(),
                                   uint64_t{1} << 63,
                                   std::numeric_limits<uint64_t>::max() - 1,
                                   std::numeric_limits<uint64_t>::max()};
    const uint8_t kind = Byte();
    if (kind < 0xe0) return kind & 0x1f;
    if (kind < 0xf8) return kEdges[Choose(std::size(kEdges))];
    return Word();
  }

  // Returns a small number, one that a merge must take care with, or any.
  double Double() {
    constexpr double kEdges[] = {-0.0,
                                 -1.0,
                                 5e-324,
                                 1e-300,
                                 1e150,
                                 3.2733906078961419e150,
                                 3.2733906078961424e150,
                                 -1e300,
                                 1.7976931348623157e308,
                                 std::numeric_limits<double>::infinity(),
                                 -std::numeric_limits<double>::infinity(),
                                 std::numeric_limits<double>::quiet_NaN()};
    const uint8_t kind = Byte();
    if (kind < 0xe0) return kind / 16.0;
    if (kind < 0xf8) return kEdges[Choose(std::size(kEdges))];
    const uint64_t word = Word();
    double number = 0.0;
    std::memcpy(&number, &word, sizeof(number));
    return number;
  }

  // Returns `most` bytes, fewer if the script says so, or if it has no more.
  std::string Bytes(size_t most) {
    const size_t length = std::min({most, size_t{Byte()} | size_t{Byte()} << 8, size_});
    std::string bytes(reinterpret_cast<const char*>(data_), length);
    data_ += length;
    size_ -= length;
    return bytes;
  }

 private:
  uint64_t Word() {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word = word << 8 | Byte();
    return word;
  }

  const uint8_t* data_;
  size_t size_;
};

}  // namespace syncbn::fuzz

#endif  // SYNCBN_TESTS_FUZZ_SCRIPT_H_
