// One worker of the round benchmark, as a process: worker KIND TARGET GROUP RANK WORLD_SIZE, where KIND is syncbn or
// raw.
//
// It says "ready", then reads commands, a line each, until its input ends:
//   run CHANNELS LAYERS together|apart WARM_UP ROUNDS
// runs rounds of that many layers, in one message or each in its own, checks every result, and answers with the
// microseconds that each round after the warm-up took.

#include <chrono>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "tests/benchmarks/round/exchange.h"
#include "tests/benchmarks/round/raw_star.h"
#include "tests/benchmarks/round/round_data.h"
#include "tests/benchmarks/round/syncbn_exchange.h"

namespace syncbn::benchmarks {
namespace {

struct Command {
  uint32_t channels = 0;
  uint32_t layers = 0;
  bool together = false;
  int warm_up = 0;
  int rounds = 0;
};

bool ReadCommand(Command* command) {
  std::string verb, mode;
  if (!(std::cin >> verb >> command->channels >> command->layers >> mode >> command->warm_up >> command->rounds)) {
    return false;
  }
  command->together = mode == "together";
  return true;
}

class RoundRunner {
 public:
  RoundRunner(std::unique_ptr<Exchange> exchange, uint32_t rank, uint32_t world_size)
      : exchange_(std::move(exchange)), rank_(rank), world_size_(world_size) {}

  // Microseconds of each round after the warm-up.
  absl::StatusOr<std::vector<double>> Run(const Command& command) {
    if (absl::Status status = exchange_->Prepare(command.channels, command.layers); !status.ok()) return status;
    const RoundData& data = data_.try_emplace(command.channels, world_size_, rank_, command.channels).first->second;
    std::vector<double> latencies;
    for (int i = 0; i < command.warm_up + command.rounds; ++i) {
      const auto latency = command.together ? RunTogether(data, i, command.layers) : RunApart(data, i, command.layers);
      if (!latency.ok()) return latency.status();
      if (i >= command.warm_up) latencies.push_back(*latency);
    }
    return latencies;
  }

 private:
  // Layer i of a round has the round's data shifted by i, so that layers differ.
  absl::StatusOr<double> RunTogether(const RoundData& data, uint64_t round, uint32_t layers) {
    std::vector<const Contribution*> own;
    for (uint32_t i = 0; i < layers; ++i) own.push_back(&data.own(round + i));
    const auto begin = std::chrono::steady_clock::now();
    if (absl::Status status = exchange_->Run(0, own, &results_); !status.ok()) return status;
    const double latency = MicrosecondsSince(begin);
    for (uint32_t i = 0; i < layers; ++i) {
      if (!data.Matches(round + i, results_[i])) return WrongResult(round, i);
    }
    return latency;
  }

  absl::StatusOr<double> RunApart(const RoundData& data, uint64_t round, uint32_t layers) {
    double latency = 0.0;
    for (uint32_t i = 0; i < layers; ++i) {
      const Contribution* const own = &data.own(round + i);
      const auto begin = std::chrono::steady_clock::now();
      if (absl::Status status = exchange_->Run(i, {&own, 1}, &results_); !status.ok()) return status;
      latency += MicrosecondsSince(begin);
      if (!data.Matches(round + i, results_[0])) return WrongResult(round, i);
    }
    return latency;
  }

  static double MicrosecondsSince(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  }

  absl::Status WrongResult(uint64_t round, uint32_t layer) const {
    return absl::DataLossError(absl::StrCat("rank ", rank_, ", round ", round, ", layer ", layer, ": wrong result"));
  }

  const std::unique_ptr<Exchange> exchange_;
  const uint32_t rank_;
  const uint32_t world_size_;
  std::map<uint32_t, RoundData> data_;  // By channels.
  std::vector<MergedView> results_;
};

absl::StatusOr<std::unique_ptr<Exchange>> Open(const std::string& kind, const std::string& target,
                                               const std::string& group, uint32_t rank, uint32_t world_size) {
  if (kind == "raw") return RawExchange::Connect(target, rank);
  if (kind != "syncbn") return absl::InvalidArgumentError(absl::StrCat("no such kind: ", kind));
  Worker::Options options;
  options.target = target;
  options.group = group;
  options.rank = rank;
  options.world_size = world_size;
  return SyncbnExchange::Join(std::move(options));
}

absl::Status Main(char** argv) {
  const uint32_t rank = std::stoul(argv[4]), world_size = std::stoul(argv[5]);
  auto exchange = Open(argv[1], argv[2], argv[3], rank, world_size);
  if (!exchange.ok()) return exchange.status();
  RoundRunner runner(*std::move(exchange), rank, world_size);
  std::cout << "ready" << std::endl;
  for (Command command; ReadCommand(&command);) {
    const auto latencies = runner.Run(command);
    if (!latencies.ok()) return latencies.status();
    for (const double latency : *latencies) std::printf("%.2f ", latency);
    std::printf("\n");
    std::fflush(stdout);
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace syncbn::benchmarks

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: worker syncbn|raw TARGET GROUP RANK WORLD_SIZE\n");
    return 2;
  }
  const absl::Status status = syncbn::benchmarks::Main(argv);
  if (!status.ok()) std::fprintf(stderr, "worker: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
