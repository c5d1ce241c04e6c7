#include "client/cc/worker.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "client/cc/errors.h"
#include "client/cc/worker_internal.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/worker_group.h"

namespace syncbn::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& reason) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(DetailsOf(status).reason, reason) << status;
}

class WorkerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    master_ = StartMaster();
    ASSERT_NE(master_, nullptr);
  }
  std::string target() const { return master_->target(); }

  std::unique_ptr<MasterServer> master_;
};

// ---- Rounds ---------------------------------------------------------------------------------------------------------

TEST_F(WorkerTest, ForwardAndBackwardRounds) {
  const auto workers = JoinAll(target(), 2);
  OnEachRank(2, [&](uint32_t rank) {
    Worker& worker = *workers[rank];
    ASSERT_TRUE(worker.DeclareLayer(BatchNormOptions("bn", 2)).ok());
    const std::vector<double> mean = {rank == 0 ? 1.0 : 4.0, 7.0}, m2 = {2.0, 0.0};
    auto forward = worker.StartForward("bn", Worker::kNextSequence, rank == 0 ? 2 : 1, mean, m2,
                                       rank == 0 ? BackwardRole::kRequired : BackwardRole::kIfRequired);
    ASSERT_TRUE(forward.ok()) << forward.status();
    const absl::Status status = forward->Wait();
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(forward->sequence(), 0u);
    EXPECT_EQ(forward->result().count, 3);
    EXPECT_THAT(forward->result().mean(), ElementsAre(2.0, 7.0));
    EXPECT_THAT(forward->result().var(), ElementsAre(10.0 / 3.0, 0.0));
    EXPECT_TRUE(forward->result().backward_required);
    EXPECT_THAT(forward->result().missing_ranks, IsEmpty());
    auto backward = worker.StartBackward("bn", forward->sequence(), std::vector<double>{1.0 + rank, 0.5},
                                         std::vector<double>{-1.0, 10.0 * rank});
    ASSERT_TRUE(backward.ok()) << backward.status();
    ASSERT_TRUE(backward->Wait().ok());
    EXPECT_EQ(backward->result().count, 3);
    EXPECT_THAT(backward->result().sum_dy(), ElementsAre(3.0, 1.0));
    EXPECT_THAT(backward->result().sum_dy_xmu(), ElementsAre(-2.0, 10.0));
  });
}

TEST_F(WorkerTest, WhatIsReadyGoesInOneFrame) {
  // The peer speaks the protocol by hand, since it sees frames: contributions that arrive together are answered so.
  RawStream peer(Connect(target()));
  v1::WorkerFrame frame = JoinFrame("", 1, 2);
  for (const char* name : {"a", "b", "c"}) {
    *frame.add_layers() = SumLayer(name, 1);
    v1::Contribution* const contribution = frame.add_contributions();
    *contribution->mutable_key() = Key(name, 0, v1::PHASE_SUM);
    contribution->mutable_vector()->add_value(1.0);
  }
  ASSERT_TRUE(peer.Write(frame));
  AwaitArrival(*master_, "c", 1);
  const auto worker = JoinOrDie(WorkerOptions(target(), 0, 2));
  std::vector<Round> rounds;
  for (const char* name : {"a", "b", "c"}) {
    auto round = worker->StartSum(name, Worker::kNextSequence, std::vector<double>{2.0});
    ASSERT_TRUE(round.ok()) << round.status();
    rounds.push_back(*std::move(round));
  }
  for (Round& round : rounds) {
    ASSERT_TRUE(round.Wait().ok());
    EXPECT_THAT(round.result().vector(), ElementsAre(3.0));
  }
  const auto answer = peer.ReadResults();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->results_size(), 3);
}

TEST_F(WorkerTest, RoundsMayBeWaitedForInAnyOrder) {
  const auto workers = JoinAll(target(), 3);
  OnEachRank(3, [&](uint32_t rank) {
    std::vector<Round> rounds;
    for (int i = 0; i < 20; ++i) {
      auto round = workers[rank]->StartSum(absl::StrCat("v", (i + 7 * rank) % 20), 0, std::vector<double>{1.0 + rank});
      ASSERT_TRUE(round.ok()) << round.status();
      rounds.push_back(*std::move(round));
    }
    for (auto round = rounds.rbegin(); round != rounds.rend(); ++round) {
      ASSERT_TRUE(round->Wait().ok());
      EXPECT_THAT(round->result().vector(), ElementsAre(6.0));
    }
  });
}

TEST_F(WorkerTest, FlushSendsWithoutWaiting) {
  const auto worker = JoinOrDie(WorkerOptions(target(), 0, 2));
  auto round = worker->StartSum("v", 0, std::vector<double>{1.0});
  ASSERT_TRUE(round.ok());
  ASSERT_TRUE(worker->Flush().ok());
  AwaitArrival(*master_, "v", 0);
  EXPECT_TRUE(IsPending(round->Wait(absl::ZeroDuration())));
  const auto peer = JoinOrDie(WorkerOptions(target(), 1, 2));
  ASSERT_TRUE(Sum(*peer, "v", {2.0}).ok());
  EXPECT_TRUE(round->Wait().ok());
  EXPECT_THAT(round->result().vector(), ElementsAre(3.0));
}

TEST_F(WorkerTest, SequencesCountForEachLayerAndPhase) {
  const auto worker = JoinOrDie(WorkerOptions(target(), 0, 1));
  const auto sequence_of = [&](const std::string& name, uint64_t sequence) {
    auto round = worker->StartSum(name, sequence, std::vector<double>{1.0});
    EXPECT_TRUE(round.ok() && round->Wait().ok());
    return round->sequence();
  };
  EXPECT_EQ(sequence_of("a", Worker::kNextSequence), 0u);
  EXPECT_EQ(sequence_of("a", Worker::kNextSequence), 1u);
  EXPECT_EQ(sequence_of("b", Worker::kNextSequence), 0u);
  EXPECT_EQ(sequence_of("a", 10), 10u);
  EXPECT_EQ(sequence_of("a", Worker::kNextSequence), 11u);
  ASSERT_TRUE(worker->ResumeAt(100).ok());
  EXPECT_EQ(sequence_of("a", Worker::kNextSequence), 100u);
  EXPECT_EQ(sequence_of("b", Worker::kNextSequence), 100u);
}

TEST_F(WorkerTest, NoSequenceComesAfterTheGreatest) {
  const auto worker = JoinOrDie(WorkerOptions(target(), 0, 1));
  LayerOptions layer;
  layer.name = "bn";
  layer.channels = 1;
  ASSERT_TRUE(worker->DeclareLayer(layer).ok());
  const auto forward = [&](uint64_t sequence) {
    return worker->StartForward("bn", sequence, 1, std::vector<double>{1.0}, std::vector<double>{0.0},
                                BackwardRole::kNone);
  };
  const absl::Status refused = worker->ResumeAt(Worker::kNextSequence);
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("18446744073709551615, the greatest is 18446744073709551614"));
  auto first = forward(Worker::kNextSequence);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->sequence(), 0u) << "a refusal changes nothing";
  ASSERT_TRUE(worker->ResumeAt(Worker::kGreatestSequence).ok());
  auto last = forward(Worker::kNextSequence);
  ASSERT_TRUE(last.ok() && last->Wait().ok()) << last.status();
  EXPECT_EQ(last->sequence(), Worker::kGreatestSequence);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(forward(Worker::kNextSequence).status().code(), absl::StatusCode::kOutOfRange);
  }
  auto sum = worker->StartSum("v", Worker::kGreatestSequence, std::vector<double>{2.0});
  ASSERT_TRUE(sum.ok() && sum->Wait().ok());
  const absl::Status after = worker->StartSum("v", Worker::kNextSequence, std::vector<double>{2.0}).status();
  EXPECT_EQ(after.code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(after.message()), HasSubstr("\"v\" has used sequence 18446744073709551614"));
  ASSERT_TRUE(worker->ResumeAt(7).ok());
  EXPECT_EQ(forward(Worker::kNextSequence)->sequence(), 7u);
}

TEST_F(WorkerTest, VectorsLongerThanAPieceAreSummedWhole) {
  constexpr size_t kElements = (size_t{5} << 19) + 3;
  const auto workers = JoinAll(target(), 2);
  OnEachRank(2, [&](uint32_t rank) {
    std::vector<double> value(kElements);
    for (size_t i = 0; i < kElements; ++i) value[i] = static_cast<double>(i) * (rank == 0 ? 1.0 : 0.5);
    for (int i = 0; i < 2; ++i) {
      const auto sum = Sum(*workers[rank], "long", value);
      ASSERT_TRUE(sum.ok()) << sum.status();
      ASSERT_EQ(sum->size(), kElements);
      for (size_t j = 0; j < kElements; ++j) ASSERT_EQ((*sum)[j], static_cast<double>(j) * 1.5);
    }
  });
}

TEST_F(WorkerTest, VectorsLongerThanAMastersFrameAreSummedWhole) {
  const auto worker = JoinOrDie(WorkerOptions(target(), 0, 1));
  const std::vector<double> value(size_t{9} << 20, 1.25);  // 72 MiB; a frame has at most 64.
  const auto sum = Sum(*worker, "longer", value);
  ASSERT_TRUE(sum.ok()) << sum.status();
  EXPECT_TRUE(*sum == value);
}

TEST_F(WorkerTest, WrongCallsAreRefusedHere) {
  const auto worker = JoinOrDie(WorkerOptions(target(), 0, 1));
  const std::vector<double> one = {1.0}, two = {1.0, 2.0};
  EXPECT_EQ(worker->StartForward("bn", 0, 1, one, one, BackwardRole::kNone).status().code(),
            absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(worker->DeclareLayer(BatchNormOptions("bn", 1)).ok());
  EXPECT_EQ(worker->StartForward("bn", 0, 1, one, two, BackwardRole::kNone).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(worker->StartBackward("bn", 0, one, two).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(worker->StartSum("v", 0, {}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(worker->DeclareLayer(BatchNormOptions("bn", 0)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(worker->DeclareLayer(BatchNormOptions("", 1)).code(), absl::StatusCode::kInvalidArgument);
  Worker::Options options = WorkerOptions(target(), 1, 1);
  EXPECT_EQ(Worker::Join(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.target = "";
  EXPECT_EQ(Worker::Join(options).status().code(), absl::StatusCode::kInvalidArgument);
  options = WorkerOptions(target(), 0, 1);
  options.join_timeout = absl::Nanoseconds(-1);
  EXPECT_EQ(Worker::Join(options).status().message(), "join_timeout is -1ns; it is not negative");
}

TEST_F(WorkerTest, LayersWithNumbersThatNoLayerMayHaveAreRefusedByTheCall) {
  const auto worker = JoinOrDie(WorkerOptions(target(), 0, 1));
  const double infinity = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<LayerOptions> layers;
  for (const double eps : {-1e-5, infinity, nan}) layers.emplace_back(BatchNormOptions("bn", 1)).eps = eps;
  for (const double momentum : {-infinity, infinity, nan}) {
    layers.emplace_back(BatchNormOptions("bn", 1)).momentum = momentum;
  }
  for (const LayerOptions& layer : layers) {
    const absl::Status status = worker->DeclareLayer(layer);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_EQ(DetailsOf(status).reason, "") << "the master was not asked";
    Worker::Options options = WorkerOptions(target(), 0, 1);
    options.group = "other";
    options.layers = {layer};
    EXPECT_EQ(DetailsOf(Worker::Join(options).status()).reason, "") << status;
  }
  EXPECT_TRUE(Sum(*worker, "v", {1.0}).ok()) << "none of this has ended the worker";
}

// Protobuf cannot carry it, and the master would take the frame for a malformed one.
TEST_F(WorkerTest, TextThatIsNotUtf8IsRefusedByTheCall) {
  const auto expect_refused = [](const absl::Status& status, const std::string& message) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), message);
  };
  const auto worker = JoinOrDie(WorkerOptions(target(), 0, 1));
  const std::string name = "bn\xff";
  expect_refused(worker->DeclareLayer(BatchNormOptions(name, 1)), "a layer's name is not UTF-8: \"bn\\xff\"");
  expect_refused(worker->StartSum(name, 0, std::vector<double>{1.0}).status(),
                 "a layer's name is not UTF-8: \"bn\\xff\"");
  expect_refused(worker->Leave(name), "the reason to leave is not UTF-8: \"bn\\xff\"");
  EXPECT_TRUE(Sum(*worker, "v", {1.0}).ok()) << "none of this has ended the worker";
  for (std::string Worker::Options::*field :
       {&Worker::Options::job, &Worker::Options::group, &Worker::Options::description}) {
    Worker::Options options = WorkerOptions(target(), 0, 1);
    options.*field = name;
    EXPECT_EQ(Worker::Join(options).status().code(), absl::StatusCode::kInvalidArgument);
  }
  Worker::Options options = WorkerOptions(target(), 0, 1);
  options.layers = {BatchNormOptions(name, 1)};
  EXPECT_EQ(Worker::Join(options).status().code(), absl::StatusCode::kInvalidArgument);
}

// ---- Threads --------------------------------------------------------------------------------------------------------

TEST_F(WorkerTest, ThreadsShareAWorker) {
  constexpr int kThreads = 4, kRounds = 100;
  const auto workers = JoinAll(target(), 2);
  OnEachRank(2 * kThreads, [&](uint32_t i) {
    Worker& worker = *workers[i % 2];
    const std::string name = absl::StrCat("v", i / 2);
    for (int round = 0; round < kRounds; ++round) {
      const auto sum = Sum(worker, name, {1.0 * round + i % 2});
      ASSERT_TRUE(sum.ok()) << sum.status();
      ASSERT_THAT(*sum, ElementsAre(2.0 * round + 1.0));
    }
  });
}

TEST_F(WorkerTest, AThreadThatWaitsDoesNotKeepOthersFromSending) {
  const auto workers = JoinAll(target(), 2, [](auto& options) { options.round_timeout = absl::Seconds(10); });
  std::thread first([&] { EXPECT_TRUE(Sum(*workers[0], "first", {1.0}).ok()); });
  AwaitArrival(*master_, "first", 0);
  std::thread peer([&] {
    EXPECT_TRUE(Sum(*workers[1], "second", {1.0}).ok());
    EXPECT_TRUE(Sum(*workers[1], "first", {1.0}).ok());
  });
  const auto second = Sum(*workers[0], "second", {1.0});  // While the first thread drives the connection.
  EXPECT_TRUE(second.ok()) << second.status();
  first.join();
  peer.join();
}

TEST_F(WorkerTest, InterruptEndsAWaitAndTheRoundGoesOn) {
  const auto workers = JoinAll(target(), 2);
  auto round = workers[0]->StartSum("v", 0, std::vector<double>{1.0});
  ASSERT_TRUE(round.ok());
  std::thread waiting([&] { ExpectError(round->Wait(), absl::StatusCode::kCancelled, "INTERRUPTED"); });
  AwaitArrival(*master_, "v", 0);
  workers[0]->Interrupt();
  waiting.join();
  std::thread again([&] { EXPECT_TRUE(round->Wait().ok()); });
  EXPECT_TRUE(Sum(*workers[1], "v", {2.0}).ok());
  again.join();
  EXPECT_THAT(round->result().vector(), ElementsAre(3.0));
}

// ---- Membership -----------------------------------------------------------------------------------------------------

TEST_F(WorkerTest, WaitsForMembers) {
  const auto first = JoinOrDie(WorkerOptions(target(), 0, 2));
  EXPECT_TRUE(IsPending(first->WaitForMembers(absl::ZeroDuration())));
  std::unique_ptr<Worker> second;
  std::thread late([&] { second = JoinOrDie(WorkerOptions(target(), 1, 2)); });
  EXPECT_TRUE(first->WaitForMembers(absl::InfiniteDuration()).ok());
  late.join();
  EXPECT_TRUE(second->WaitForMembers(absl::InfiniteDuration()).ok());
  EXPECT_EQ(first->run_id(), second->run_id());
  EXPECT_EQ(first->incarnation(), 1u);
}

TEST_F(WorkerTest, WhoeverLeavesIsNotWaitedFor) {
  const auto workers = JoinAll(target(), 2);
  auto begun = workers[1]->StartSum("v", 0, std::vector<double>{2.0});
  ASSERT_TRUE(begun.ok());
  ASSERT_TRUE(workers[1]->Leave("finished").ok());  // Sends what was begun.
  ASSERT_TRUE(workers[1]->Leave("again").ok());
  ExpectError(begun->Wait(), absl::StatusCode::kFailedPrecondition, "LEFT");
  ExpectError(workers[1]->StartSum("v", 1, std::vector<double>{2.0}).status(), absl::StatusCode::kFailedPrecondition,
              "LEFT");
  for (uint64_t sequence = 0; sequence < 2; ++sequence) {
    auto round = workers[0]->StartSum("v", sequence, std::vector<double>{1.0});
    ASSERT_TRUE(round.ok() && round->Wait().ok());
    EXPECT_THAT(round->result().vector(), ElementsAre(sequence == 0 ? 3.0 : 1.0));
    EXPECT_EQ(round->result().missing_ranks, sequence == 0 ? std::vector<uint32_t>{} : std::vector<uint32_t>{1});
  }
}

TEST_F(WorkerTest, ADestroyedWorkerIsLostToTheOthersAndItsRoundsEnd) {
  auto workers = JoinAll(target(), 2);
  auto begun = workers[0]->StartSum("mine", 0, std::vector<double>{1.0});
  auto waiting = workers[1]->StartSum("theirs", 0, std::vector<double>{1.0});
  ASSERT_TRUE(begun.ok() && waiting.ok());
  ASSERT_TRUE(workers[1]->Flush().ok());
  AwaitArrival(*master_, "theirs", 1);
  workers[0].reset();
  ExpectError(begun->Wait(), absl::StatusCode::kCancelled, "CLOSED");
  const absl::Status status = waiting->Wait();
  ExpectError(status, absl::StatusCode::kUnavailable, "WORKER_LOST");
  EXPECT_THAT(DetailsOf(status).ranks, ElementsAre(0u));
  EXPECT_EQ(DetailsOf(status).layer, "theirs");
}

TEST_F(WorkerTest, ClosingEndsWhatAnotherThreadWaitsFor) {
  const auto workers = JoinAll(target(), 2);
  std::thread waiting(
      [&] { ExpectError(Sum(*workers[0], "v", {1.0}).status(), absl::StatusCode::kCancelled, "CLOSED"); });
  AwaitArrival(*master_, "v", 0);
  workers[0]->Close();
  waiting.join();
  ExpectError(Sum(*workers[0], "v", {1.0}).status(), absl::StatusCode::kCancelled, "CLOSED");
}

TEST_F(WorkerTest, AChildProcessIsToldToJoinForItself) {
  auto worker = JoinOrDie(WorkerOptions(target(), 0, 1));
  auto round = worker->StartSum("v", 0, std::vector<double>{1.0});
  ASSERT_TRUE(round.ok());
  const pid_t child = fork();
  if (child == 0) {
    const bool told = DetailsOf(worker->StartSum("v", 1, std::vector<double>{1.0}).status()).reason == "FORKED" &&
                      DetailsOf(worker->Flush()).reason == "FORKED" && DetailsOf(round->Wait()).reason == "FORKED" &&
                      DetailsOf(worker->Leave("child")).reason == "FORKED" &&
                      DetailsOf(worker->WaitForMembers(absl::ZeroDuration())).reason == "FORKED";
    worker->Interrupt();
    worker.reset();
    _exit(told ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_TRUE(round->Wait().ok());  // The parent's connection is as it was.
}

// A caller that polls comes to the result without ever waiting.
TEST_F(WorkerTest, PollingDrivesTheConnection) {
  auto worker = JoinOrDie(WorkerOptions(target(), 0, 1));
  auto round = worker->StartSum("v", 0, std::vector<double>{1.0});
  ASSERT_TRUE(round.ok());
  EXPECT_FALSE(round->HasOutcome());
  absl::Status status = round->Wait(absl::ZeroDuration());
  while (IsPending(status)) status = round->Wait(absl::ZeroDuration());
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(round->HasOutcome());
}

TEST_F(WorkerTest, WaitForAnyEndsWithAnOutcomeOrAWake) {
  const auto workers = JoinAll(target(), 2);
  auto lonely = workers[0]->StartSum("lonely", 0, std::vector<double>{1.0});
  auto common = workers[0]->StartSum("common", 0, std::vector<double>{1.0});
  ASSERT_TRUE(lonely.ok() && common.ok());
  const std::vector<Round> rounds = {*lonely, *common};
  const auto never = [] { return false; };
  WorkerInternal::WaitForAny(*workers[0], rounds, never, absl::ZeroDuration());
  EXPECT_FALSE(lonely->HasOutcome() || common->HasOutcome());
  std::thread peer([&] { EXPECT_TRUE(Sum(*workers[1], "common", {2.0}).ok()); });
  WorkerInternal::WaitForAny(*workers[0], rounds, never, absl::InfiniteDuration());
  EXPECT_TRUE(common->HasOutcome());
  peer.join();
  std::atomic<bool> woken{false};
  std::thread waker([&] {
    woken = true;
    WorkerInternal::Wake(*workers[0]);
  });
  WorkerInternal::WaitForAny(
      *workers[0], {*lonely}, [&] { return woken.load(); }, absl::InfiniteDuration());
  waker.join();
  EXPECT_FALSE(lonely->HasOutcome());
  workers[0]->Close();
  WorkerInternal::WaitForAny(*workers[0], {*lonely}, never, absl::InfiniteDuration());
  EXPECT_TRUE(lonely->HasOutcome());
}

TEST(WorkerOfLongVectorsTest, DoesNotSendFasterThanItReads) {
  constexpr size_t kElements = size_t{10} << 20;  // 10 pieces.
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  options.max_unread_bytes = size_t{40} << 20;
  const auto master = MasterServer::Start(std::move(options));
  ASSERT_TRUE(master.ok());
  const auto workers = JoinAll((*master)->target(), 2);
  OnEachRank(2, [&](uint32_t rank) {
    // The first has sent all that it may by the time that the second begins.
    if (rank == 1) AwaitArrival(**master, "v#3", 0);
    const auto sum = Sum(*workers[rank], "v", std::vector<double>(kElements, 1.0 + rank));
    ASSERT_TRUE(sum.ok()) << sum.status();
    EXPECT_EQ(sum->size(), kElements);
    EXPECT_EQ(sum->back(), 3.0);
  });
}

TEST(WorkerOfLongVectorsTest, DoesNotSendManyFasterThanItReads) {
  constexpr size_t kElements = size_t{1} << 20;
  constexpr int kVectors = 12;
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  options.max_unread_bytes = size_t{48} << 20;
  const auto master = MasterServer::Start(std::move(options));
  ASSERT_TRUE(master.ok());
  // Alone, so that what it has to read comes of what it sends. (Of two, the faster one may make the master cut the
  // slower one off.)
  const auto worker = JoinOrDie(WorkerOptions((*master)->target(), 0, 1));
  const std::vector<double> value(kElements, 3.0);
  std::vector<Round> rounds;
  for (int i = 0; i < kVectors; ++i) {
    auto round = worker->StartSum(absl::StrCat("v", i), 0, value);
    ASSERT_TRUE(round.ok());
    rounds.push_back(*std::move(round));
  }
  for (Round& round : rounds) {
    const absl::Status status = round.Wait();
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(round.result().vector().back(), 3.0);
  }
}

TEST_F(WorkerTest, LongVectorsBegunInDifferentOrders) {
  constexpr size_t kElements = size_t{5} << 20;
  const auto workers = JoinAll(target(), 2);
  OnEachRank(2, [&](uint32_t rank) {
    const std::vector<double> value(kElements, 1.0);
    std::vector<Round> rounds;
    for (const char* name : {rank == 0 ? "x" : "y", rank == 0 ? "y" : "x"}) {
      auto round = workers[rank]->StartSum(name, 0, value);
      ASSERT_TRUE(round.ok());
      rounds.push_back(*std::move(round));
    }
    for (Round& round : rounds) {
      const absl::Status status = round.Wait();
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(round.result().vector().size(), kElements);
    }
  });
}

// ---- Errors ---------------------------------------------------------------------------------------------------------

TEST_F(WorkerTest, ADeadlineNamesTheMissing) {
  const auto workers = JoinAll(target(), 3, [](auto& options) { options.round_timeout = absl::Milliseconds(50); });
  const absl::Status status = Sum(*workers[1], "v", {1.0}).status();
  ExpectError(status, absl::StatusCode::kDeadlineExceeded, "ROUND_TIMEOUT");
  EXPECT_FALSE(IsPending(status));
  EXPECT_THAT(DetailsOf(status).ranks, ElementsAre(0u, 2u));
  EXPECT_EQ(DetailsOf(status).layer, "v");
}

TEST_F(WorkerTest, WorkersThatDisagreeAboutALayerLearnItAtOnce) {
  const auto workers = JoinAll(target(), 2, [](auto& options) { options.round_timeout = absl::Hours(1); });
  OnEachRank(2, [&](uint32_t rank) {
    const uint32_t channels = rank == 0 ? 8 : 16;
    ASSERT_TRUE(workers[rank]->DeclareLayer(BatchNormOptions("bn", channels)).ok());
    const std::vector<double> zeros(channels, 0.0);
    auto round = workers[rank]->StartForward("bn", 0, 1, zeros, zeros, BackwardRole::kRequired);
    ASSERT_TRUE(round.ok());
    const absl::Status status = round->Wait();
    ExpectError(status, absl::StatusCode::kFailedPrecondition, "LAYER_SPEC_MISMATCH");
    EXPECT_EQ(DetailsOf(status).layer, "bn");
    EXPECT_THAT(std::string(status.message()), HasSubstr("8"));
    EXPECT_THAT(std::string(status.message()), HasSubstr("16"));
  });
}

TEST_F(WorkerTest, ALayerSetThatDiffersIsRefusedAtTheJoin) {
  Worker::Options options = WorkerOptions(target(), 0, 2);
  options.layers = {BatchNormOptions("a", 1), BatchNormOptions("b", 1)};
  const auto first = JoinOrDie(options);
  options.rank = 1;
  options.layers = {BatchNormOptions("a", 1), BatchNormOptions("c", 1)};
  const absl::Status status = Worker::Join(options).status();
  ExpectError(status, absl::StatusCode::kFailedPrecondition, "LAYER_SET_MISMATCH");
  EXPECT_THAT(std::string(status.message()), HasSubstr("it alone has \"c\"; it lacks \"b\""));
  // Rounds that wait for the refused worker would wait in vain.
  ExpectError(Sum(*first, "v", {1.0}).status(), absl::StatusCode::kFailedPrecondition, "LAYER_SET_MISMATCH");
  options.layers = {BatchNormOptions("a", 1), BatchNormOptions("b", 1)};
  const auto second = JoinOrDie(options);
  ASSERT_TRUE(second->ResumeAt(1).ok());
  OnEachRank(2, [&](uint32_t rank) { EXPECT_TRUE(Sum(rank == 0 ? *first : *second, "v", {1.0}).ok()); });
}

TEST_F(WorkerTest, ADisagreementThatIsOverFailsNoRound) {
  const auto workers = JoinAll(target(), 2);
  for (const uint32_t channels : {1, 2}) {  // One after the other they declare it anew; meanwhile they disagree.
    for (const auto& worker : workers) {
      ASSERT_TRUE(worker->DeclareLayer(BatchNormOptions("bn", channels)).ok());
      ASSERT_TRUE(worker->Flush().ok());
    }
  }
  const auto inspection = v1::InspectionService::NewStub(Connect(target()));
  v1::GetLayerRequest request;
  request.set_layer("bn");
  v1::GetLayerResponse layer;
  while (layer.summary().spec().channels() != 2 || layer.summary().has_conflict()) {
    grpc::ClientContext context;
    inspection->GetLayer(&context, request, &layer);
  }
  OnEachRank(2, [&](uint32_t rank) {
    const std::vector<double> zeros = {0.0, 0.0};
    auto round = workers[rank]->StartForward("bn", 0, 1, zeros, zeros, BackwardRole::kNone);
    ASSERT_TRUE(round.ok());
    const absl::Status status = round->Wait();
    EXPECT_TRUE(status.ok()) << status;
  });
}

TEST_F(WorkerTest, AGroupThatDiffersIsRefusedAtTheJoin) {
  const auto first = JoinOrDie(WorkerOptions(target(), 0, 2));
  ExpectError(Worker::Join(WorkerOptions(target(), 1, 3)).status(), absl::StatusCode::kFailedPrecondition,
              "GROUP_CONFIG_MISMATCH");
}

TEST_F(WorkerTest, ADeadlockIsToldAtOnce) {
  const auto workers = JoinAll(target(), 2, [](auto& options) { options.round_timeout = absl::Hours(1); });
  OnEachRank(2, [&](uint32_t rank) {
    const absl::Status status = Sum(*workers[rank], rank == 0 ? "x" : "y", {1.0}).status();
    ExpectError(status, absl::StatusCode::kAborted, "DEADLOCK");
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0 on the sum 0 of vector \"x\""));
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1 on the sum 0 of vector \"y\""));
  });
  OnEachRank(2, [&](uint32_t rank) { EXPECT_TRUE(Sum(*workers[rank], "z", {1.0}).ok()); });
}

TEST_F(WorkerTest, AWorkerOfTwoThreadsIsInNoDeadlock) {
  // The first thread waits alone; by the time that the worker would promise silence, a second thread uses it too.
  const auto workers = JoinAll(target(), 2, [](auto& options) { options.round_timeout = absl::Hours(1); });
  std::thread peer([&] {
    EXPECT_TRUE(Sum(*workers[1], "second", {1.0}).ok());
    EXPECT_TRUE(Sum(*workers[1], "first", {1.0}).ok());
  });
  AwaitArrival(*master_, "second", 1);
  auto second = workers[0]->StartSum("second", 0, std::vector<double>{1.0});
  ASSERT_TRUE(second.ok());
  std::thread first([&] {
    const auto sum = Sum(*workers[0], "first", {1.0});
    EXPECT_TRUE(sum.ok()) << sum.status();
  });
  EXPECT_TRUE(second->Wait().ok());
  first.join();
  peer.join();
}

TEST_F(WorkerTest, BadNumbersAreNamed) {
  const auto workers = JoinAll(target(), 2);
  OnEachRank(2, [&](uint32_t rank) {
    ASSERT_TRUE(workers[rank]->DeclareLayer(BatchNormOptions("bn", 2)).ok());
    const std::vector<double> mean = {0.0, rank == 1 ? std::numeric_limits<double>::quiet_NaN() : 0.0}, m2 = {0.0, 0.0};
    auto round = workers[rank]->StartForward("bn", 0, 1, mean, m2, BackwardRole::kNone);
    ASSERT_TRUE(round.ok());
    const absl::Status status = round->Wait();
    ExpectError(status, absl::StatusCode::kInvalidArgument, "NOT_FINITE");
    EXPECT_THAT(DetailsOf(status).ranks, ElementsAre(1u));
  });
}

TEST(WorkerWithoutMasterTest, SaysThatNobodyAnswersAndWhy) {
  const std::string target = StartMaster()->target();  // Free again.
  Worker::Options options = WorkerOptions(target, 0, 1);
  options.join_timeout = absl::Seconds(1);
  const absl::Status status = Worker::Join(options).status();
  ExpectError(status, absl::StatusCode::kUnavailable, "UNREACHABLE");
  EXPECT_THAT(std::string(status.message()), HasSubstr(target));
  EXPECT_THAT(std::string(status.message()), HasSubstr("Connection refused"));
}

}  // namespace
}  // namespace syncbn::testing
