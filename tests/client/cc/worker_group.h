// A master and its workers in one process, for tests of the C++ client.

#ifndef SYNCBN_TESTS_CLIENT_CC_WORKER_GROUP_H_
#define SYNCBN_TESTS_CLIENT_CC_WORKER_GROUP_H_

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cc/errors.h"
#include "client/cc/worker.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "syncbn/v1/inspection.grpc.pb.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {

// On 127.0.0.1; `port` 0: any.
inline std::unique_ptr<MasterServer> StartMaster(int port = 0) {
  MasterServer::Options options;
  options.addresses = {absl::StrCat("127.0.0.1:", port)};
  auto started = MasterServer::Start(std::move(options));
  EXPECT_TRUE(started.ok()) << started.status();
  return started.ok() ? *std::move(started) : nullptr;
}

inline Worker::Options WorkerOptions(const std::string& target, uint32_t rank, uint32_t world_size) {
  Worker::Options options;
  options.target = target;
  options.rank = rank;
  options.world_size = world_size;
  return options;
}

inline std::unique_ptr<Worker> JoinOrDie(Worker::Options options) {
  auto worker = Worker::Join(std::move(options));
  EXPECT_TRUE(worker.ok()) << worker.status();
  return worker.ok() ? *std::move(worker) : nullptr;
}

inline std::vector<std::unique_ptr<Worker>> JoinAll(const std::string& target, uint32_t world_size,
                                                    const std::function<void(Worker::Options&)>& change = nullptr) {
  std::vector<std::unique_ptr<Worker>> workers;
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    Worker::Options options = WorkerOptions(target, rank, world_size);
    if (change) change(options);
    workers.push_back(JoinOrDie(std::move(options)));
  }
  return workers;
}

// Runs `body(rank)` on a thread for each rank.
inline void OnEachRank(uint32_t world_size, const std::function<void(uint32_t)>& body) {
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < world_size; ++rank) threads.emplace_back(body, rank);
  for (std::thread& thread : threads) thread.join();
}

inline LayerOptions BatchNormOptions(const std::string& name, uint32_t channels) {
  LayerOptions layer;
  layer.name = name;
  layer.channels = channels;
  layer.eps = 1e-5;
  return layer;
}

// A sum that is begun and waited for.
inline absl::StatusOr<std::vector<double>> Sum(Worker& worker, const std::string& name,
                                               const std::vector<double>& value) {
  auto round = worker.StartSum(name, Worker::kNextSequence, value);
  if (!round.ok()) return round.status();
  if (absl::Status status = round->Wait(); !status.ok()) return status;
  return round->result().vector();
}

// Returns once the master has this rank's contribution to a round of the layer that waits.
inline void AwaitArrival(MasterServer& master, const std::string& layer, uint32_t rank) {
  const auto inspection = v1::InspectionService::NewStub(Connect(master.target()));
  while (true) {
    grpc::ClientContext context;
    v1::GetGroupResponse group;
    const grpc::Status status = inspection->GetGroup(&context, {}, &group);
    ASSERT_TRUE(status.ok() || status.error_code() == grpc::StatusCode::NOT_FOUND) << status.error_message();
    for (const v1::PendingRound& round : group.pending()) {
      if (round.key().layer() != layer) continue;
      for (const uint32_t arrived : round.arrived_ranks()) {
        if (arrived == rank) return;
      }
    }
  }
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_CLIENT_CC_WORKER_GROUP_H_
