// Workers of the memory benchmark, several in a process: workers TARGET GROUP FIRST_RANK WORKERS WORLD_SIZE LAYERS
// CHANNELS ROUNDS. Each round is a forward and a backward round of all layers, a frame each. Ends with one line: the
// process's resident KiB before the first worker joined, and after the last round. Waits for the end of its input, then
// leaves.

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/cc/worker.h"
#include "tests/benchmarks/round/round_data.h"

namespace syncbn::benchmarks {
namespace {

struct Plan {
  std::string target, group;
  uint32_t first_rank, workers, world_size, layers, channels, rounds;
};

// VmRSS of this process.
long ResidentKibibytes() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (absl::StartsWith(line, "VmRSS:")) return std::atol(line.c_str() + 6);
  }
  return 0;
}

std::string LayerName(uint32_t layer) { return absl::StrCat("layer", layer, ".bn"); }

class Member {
 public:
  Member(const Plan& plan, uint32_t rank) : plan_(plan), rank_(rank), data_(plan.world_size, rank, plan.channels) {}

  absl::Status Join() {
    Worker::Options options;
    options.target = plan_.target;
    options.group = plan_.group;
    options.rank = rank_;
    options.world_size = plan_.world_size;
    auto worker = Worker::Join(std::move(options));
    if (!worker.ok()) return worker.status();
    worker_ = *std::move(worker);
    for (uint32_t i = 0; i < plan_.layers; ++i) {
      LayerOptions layer;
      layer.name = LayerName(i);
      layer.channels = plan_.channels;
      layer.eps = 1e-5;
      if (absl::Status status = worker_->DeclareLayer(layer); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status AwaitOthers() { return worker_->WaitForMembers(absl::Seconds(60)); }

  absl::Status Start(uint32_t index, bool backward) {
    rounds_.clear();
    for (uint32_t i = 0; i < plan_.layers; ++i) {
      const Contribution& own = data_.own(index + i);
      auto round = backward ? worker_->StartBackward(LayerName(i), Worker::kNextSequence, own.mean, own.m2)
                            : worker_->StartForward(LayerName(i), Worker::kNextSequence, own.count, own.mean, own.m2,
                                                    BackwardRole::kRequired);
      if (!round.ok()) return round.status();
      rounds_.push_back(*std::move(round));
    }
    return worker_->Flush();
  }

  absl::Status Finish(uint32_t index, bool backward) {
    for (uint32_t i = 0; i < plan_.layers; ++i) {
      if (absl::Status status = rounds_[i].Wait(); !status.ok()) return status;
      const RoundResult& result = rounds_[i].result();
      if (backward || data_.Matches(index + i, {result.count, result.first, result.second})) continue;
      return absl::DataLossError(absl::StrCat("rank ", rank_, ", round ", index, ", layer ", i, ": wrong result"));
    }
    return absl::OkStatus();
  }

  absl::Status Leave() { return worker_->Leave("finished"); }

 private:
  const Plan& plan_;
  const uint32_t rank_;
  const RoundData data_;
  std::unique_ptr<Worker> worker_;
  std::vector<Round> rounds_;
};

absl::Status RunRounds(const Plan& plan, std::vector<std::unique_ptr<Member>>* members) {
  for (auto& member : *members) {
    if (absl::Status status = member->AwaitOthers(); !status.ok()) return status;
  }
  for (uint32_t index = 0; index < plan.rounds; ++index) {
    for (const bool backward : {false, true}) {
      for (auto& member : *members) {
        if (absl::Status status = member->Start(index, backward); !status.ok()) return status;
      }
      for (auto& member : *members) {
        if (absl::Status status = member->Finish(index, backward); !status.ok()) return status;
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Main(const Plan& plan) {
  std::vector<std::unique_ptr<Member>> members;
  for (uint32_t i = 0; i < plan.workers; ++i) members.push_back(std::make_unique<Member>(plan, plan.first_rank + i));
  const long before = ResidentKibibytes();
  for (auto& member : members) {
    if (absl::Status status = member->Join(); !status.ok()) return status;
  }
  if (absl::Status status = RunRounds(plan, &members); !status.ok()) return status;
  std::cout << before << " " << ResidentKibibytes() << std::endl;
  std::cin.ignore(std::numeric_limits<std::streamsize>::max());
  for (auto& member : members) {
    if (absl::Status status = member->Leave(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace syncbn::benchmarks

int main(int argc, char** argv) {
  if (argc != 9) {
    std::fprintf(stderr, "usage: workers TARGET GROUP FIRST_RANK WORKERS WORLD_SIZE LAYERS CHANNELS ROUNDS\n");
    return 2;
  }
  const auto number = [argv](int i) { return static_cast<uint32_t>(std::atoi(argv[i])); };
  const absl::Status status =
      syncbn::benchmarks::Main({argv[1], argv[2], number(3), number(4), number(5), number(6), number(7), number(8)});
  if (!status.ok()) std::fprintf(stderr, "workers: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
