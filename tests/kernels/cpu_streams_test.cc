// Outputs that go around the caches, beside those that do not: the bits of both, at any address.

#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/batch_norm.h"
#include "tests/kernels/cpu_cases.h"

namespace syncbn::kernels::testing {
namespace {

constexpr int64_t kNever = int64_t{1} << 60;
constexpr int64_t kAlways = 1;

// An output, `offset` elements past a line of the cache, with guards at both sides.
class Output {
 public:
  Output(const TensorShape& shape, size_t offset)
      : bytes_(SizeOf(shape.type) * static_cast<size_t>(shape.size())),
        memory_(bytes_ + 3 * kLine, kGuard),
        begin_(kLine + offset * SizeOf(shape.type) + kLine - reinterpret_cast<uintptr_t>(memory_.data()) % kLine) {}

  uint8_t* data() { return memory_.data() + begin_; }
  Bytes content() const { return Bytes(memory_.data() + begin_, memory_.data() + begin_ + bytes_); }
  bool guards_are_whole() const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      if ((i < begin_ || i >= begin_ + bytes_) && memory_[i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kLine = 64;
  static constexpr uint8_t kGuard = 0xA5;
  size_t bytes_;
  Bytes memory_;
  size_t begin_;
};

std::vector<TensorShape> Shapes() {
  std::vector<TensorShape> shapes;
  for (const DataType type : kTypes) {
    for (const Layout layout : {Layout::kChannelsFirst, Layout::kChannelsLast}) {
      shapes.push_back({3, 16, 56, type, layout});
      shapes.push_back({2, 7, 49, type, layout});
      shapes.push_back({5, 24, 961, type, layout});  // More than one unit.
      shapes.push_back({9, 3, 1, type, layout});
    }
  }
  return shapes;
}

class StreamsTest : public ::testing::TestWithParam<std::tuple<int, size_t>> {
 protected:
  static int threads() { return std::get<0>(GetParam()); }
  static size_t offset() { return std::get<1>(GetParam()); }
};

TEST_P(StreamsTest, ForwardHasTheSameBits) {
  std::mt19937_64 rng(kSeed);
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, 0.5, &rng);
    const Tensor x(shape.type, c.x), residual(shape.type, c.residual);
    for (const bool adds : {false, true}) {
      for (const bool masks : {false, true}) {
        Bytes content[2], mask[2];
        for (const bool streams : {false, true}) {
          mask[streams].assign(ReluMaskBytes(shape.size()), 0);
          const Epilogue epilogue = {adds ? residual.data() : nullptr, adds, masks ? mask[streams].data() : nullptr};
          Output y(shape, offset());
          cpu::BatchNormElemt({threads(), streams ? kAlways : kNever}, shape, x.data(), c.forward(), epilogue,
                              y.data());
          EXPECT_TRUE(y.guards_are_whole());
          content[streams] = y.content();
        }
        EXPECT_EQ(content[0], content[1]);
        EXPECT_EQ(mask[0], mask[1]);
      }
    }
  }
}

TEST_P(StreamsTest, BackwardHasTheSameBits) {
  std::mt19937_64 rng(kSeed);
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, 0.5, &rng);
    const Tensor x(shape.type, c.x), dy(shape.type, c.dy);
    const Bytes mask(ReluMaskBytes(shape.size()), 0x5A);
    for (const ReluGate& gate : {ReluGate{}, ReluGate{mask.data(), {}}, ReluGate{nullptr, c.forward()}}) {
      for (const bool residual : {false, true}) {
        Bytes dx_bytes[2], residual_bytes[2];
        for (const bool streams : {false, true}) {
          Output dx(shape, offset()), d_residual(shape, offset());
          cpu::BatchNormBackwardElemt({threads(), streams ? kAlways : kNever}, shape, dy.data(), x.data(), c.backward(),
                                      gate, dx.data(), residual ? d_residual.data() : nullptr);
          EXPECT_TRUE(dx.guards_are_whole());
          EXPECT_TRUE(d_residual.guards_are_whole());
          dx_bytes[streams] = dx.content();
          residual_bytes[streams] = d_residual.content();
        }
        EXPECT_EQ(dx_bytes[0], dx_bytes[1]);
        EXPECT_EQ(residual_bytes[0], residual_bytes[1]);
      }
    }
  }
}

TEST_P(StreamsTest, AnOutputMayBeAnInput) {
  std::mt19937_64 rng(kSeed);
  for (const TensorShape& shape : Shapes()) {
    SCOPED_TRACE(Describe(shape));
    const Case c = MakeCase(shape, 0.5, &rng);
    const Tensor x(shape.type, c.x);
    Output apart(shape, offset()), in_place(shape, offset());
    std::memcpy(in_place.data(), x.data(), x.content().size());
    const cpu::Context context = {threads(), kAlways};
    cpu::BatchNormElemt(context, shape, x.data(), c.forward(), {}, apart.data());
    cpu::BatchNormElemt(context, shape, in_place.data(), c.forward(), {}, in_place.data());
    EXPECT_EQ(apart.content(), in_place.content());
  }
}

INSTANTIATE_TEST_SUITE_P(ThreadsAndOffsets, StreamsTest,
                         ::testing::Combine(::testing::Values(1, 3), ::testing::Values(0, 1, 8)));

}  // namespace
}  // namespace syncbn::kernels::testing
