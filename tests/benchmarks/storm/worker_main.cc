// A worker of the kill storm: worker TARGET RANK WORLD_SIZE SEED FIRST_STEP.
//
// Each step is a forward round and a sum, in one frame. Their contributions follow from seed, rank and step, so the
// worker knows every result and compares its bits, by the arithmetic of PROTOCOL.md. After each step it writes the
// number of steps that are done to its output, as a uint64_t. It ends with 1 at the first error or wrong bit, and by
// SIGPIPE when nobody reads any longer.

#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cc/worker.h"

namespace syncbn::benchmarks {
namespace {

constexpr uint32_t kChannels = 37;
constexpr char kLayer[] = "bn", kSum[] = "gradients";
// Longer than the storm waits for a step, so that a hang is the storm's to find.
constexpr absl::Duration kPatience = absl::Minutes(9);

using Vector = std::array<double, kChannels>;

struct Plan {
  std::string target;
  uint32_t rank, world_size;
  uint64_t seed, first_step;
};

struct Contribution {
  int64_t count;
  Vector mean, m2, gradients;
};

// The next value of the SplitMix64 sequence.
uint64_t Draw(uint64_t* state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// A number in [0, 1) whose 53 bits are all drawn, so that sums have to be rounded.
double DrawFraction(uint64_t* state) { return static_cast<double>(Draw(state) >> 11) * 0x1p-53; }

Contribution Contribute(const Plan& plan, uint32_t rank, uint64_t step) {
  uint64_t state = (plan.seed * 1000 + rank) << 32 | step;
  Contribution made;
  made.count = static_cast<int64_t>(Draw(&state) % 8);
  for (uint32_t i = 0; i < kChannels; ++i) {
    made.mean[i] = made.count == 0 ? 0.0 : DrawFraction(&state) - 0.5;
    made.m2[i] = made.count < 2 ? 0.0 : DrawFraction(&state);
    made.gradients[i] = DrawFraction(&state) - 0.5;
  }
  return made;
}

// Contributions merged in the order of ranks. `m2` ends as the biased variance.
Contribution Merge(const Plan& plan, uint64_t step) {
  Contribution merged = {};
  for (uint32_t rank = 0; rank < plan.world_size; ++rank) {
    const Contribution part = Contribute(plan, rank, step);
    for (uint32_t i = 0; i < kChannels; ++i) merged.gradients[i] += part.gradients[i];
    if (part.count == 0) continue;
    const auto own = static_cast<double>(merged.count), other = static_cast<double>(part.count);
    merged.count += part.count;
    const double share = other / static_cast<double>(merged.count);
    for (uint32_t i = 0; i < kChannels; ++i) {
      const double delta = part.mean[i] - merged.mean[i];
      merged.mean[i] = own == 0 ? part.mean[i] : merged.mean[i] + delta * share;
      merged.m2[i] = own == 0 ? part.m2[i] : (merged.m2[i] + part.m2[i]) + (delta * delta) * (own * share);
    }
  }
  if (merged.count == 0) return merged;
  for (double& value : merged.m2) value /= static_cast<double>(merged.count);
  return merged;
}

bool SameBits(absl::Span<const double> got, const Vector& expected) {
  return got.size() == expected.size() && std::memcmp(got.data(), expected.data(), sizeof(expected)) == 0;
}

absl::Status RunStep(const Plan& plan, uint64_t step, Worker* worker) {
  const Contribution own = Contribute(plan, plan.rank, step);
  const bool empty = own.count == 0;
  auto forward =
      worker->StartForward(kLayer, step, own.count, empty ? absl::Span<const double>() : absl::MakeConstSpan(own.mean),
                           empty ? absl::Span<const double>() : absl::MakeConstSpan(own.m2), BackwardRole::kNone);
  if (!forward.ok()) return forward.status();
  auto sum = worker->StartSum(kSum, step, own.gradients);
  if (!sum.ok()) return sum.status();
  for (Round* round : {&*forward, &*sum}) {
    if (absl::Status status = round->Wait(); !status.ok()) return status;
  }
  const Contribution expected = Merge(plan, step);
  const RoundResult &moments = forward->result(), &gradients = sum->result();
  if (moments.count == expected.count && SameBits(moments.first, expected.mean) &&
      SameBits(moments.second, expected.m2) && SameBits(gradients.first, expected.gradients)) {
    return absl::OkStatus();
  }
  return absl::DataLossError(absl::StrCat("wrong result of step ", step));
}

absl::Status Main(const Plan& plan) {
  Worker::Options options;
  options.target = plan.target;
  options.group = "storm";
  options.rank = plan.rank;
  options.world_size = plan.world_size;
  options.missing_policy = MissingPolicy::kWait;
  options.round_timeout = kPatience;
  options.rejoin_grace = kPatience;
  options.join_timeout = kPatience;
  auto worker = Worker::Join(std::move(options));
  if (!worker.ok()) return worker.status();
  LayerOptions layer;
  layer.name = kLayer;
  layer.channels = kChannels;
  layer.eps = 1e-5;
  if (absl::Status status = (*worker)->DeclareLayer(layer); !status.ok()) return status;
  for (uint64_t step = plan.first_step;;) {
    if (absl::Status status = RunStep(plan, step, worker->get()); !status.ok()) return status;
    ++step;
    if (write(STDOUT_FILENO, &step, sizeof(step)) != sizeof(step)) return absl::CancelledError("nobody reads");
  }
}

}  // namespace
}  // namespace syncbn::benchmarks

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: worker TARGET RANK WORLD_SIZE SEED FIRST_STEP\n");
    return 2;
  }
  const auto number = [argv](int i) { return std::strtoull(argv[i], nullptr, 10); };
  const absl::Status status = syncbn::benchmarks::Main(
      {argv[1], static_cast<uint32_t>(number(2)), static_cast<uint32_t>(number(3)), number(4), number(5)});
  std::fprintf(stderr, "storm worker: rank %s: %s\n", argv[2], status.ToString().c_str());
  return 1;
}
