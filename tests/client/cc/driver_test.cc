// The driver of a session: waiting threads over a transport in the same process.

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "client/cc/errors.h"
#include "client/cc/worker_internal.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/cc/in_process_transport.h"

namespace syncbn::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

void Welcome(InProcessTransport* transport, absl::Duration round_timeout = absl::Minutes(1)) {
  v1::MasterFrame frame;
  v1::Joined* const joined = frame.mutable_joined();
  joined->set_incarnation(1);
  joined->set_run_id(1);
  joined->mutable_config()->mutable_round_timeout()->set_nanos(
      static_cast<int32_t>(absl::ToInt64Nanoseconds(round_timeout % absl::Seconds(1))));
  joined->mutable_config()->mutable_round_timeout()->set_seconds(absl::ToInt64Seconds(round_timeout));
  joined->mutable_membership()->add_present_ranks(0);
  transport->Send(frame);
}

// Answers every sum with ten times itself.
void Answer(InProcessTransport* transport, const v1::WorkerFrame& frame) {
  v1::MasterFrame answer;
  for (const v1::Contribution& contribution : frame.contributions()) {
    v1::RoundResult* const result = answer.add_results();
    *result->mutable_key() = contribution.key();
    for (const double value : contribution.vector().value()) result->mutable_vector()->add_value(10.0 * value);
  }
  if (answer.results_size() > 0) transport->Send(answer);
}

void Serve(InProcessTransport* transport, const v1::WorkerFrame& frame) {
  if (frame.has_join()) Welcome(transport);
  Answer(transport, frame);
}

// A worker over a transport that the test keeps a pointer to.
struct Pair {
  explicit Pair(InProcessTransport::Master master, size_t part_bytes = 1 << 20,
                absl::Duration join_timeout = absl::Seconds(60), MissingPolicy policy = MissingPolicy::kFail) {
    auto owned = std::make_unique<InProcessTransport>(std::move(master), part_bytes);
    transport = owned.get();
    Worker::Options options;
    options.target = "in-process:1";
    options.join_timeout = join_timeout;
    options.missing_policy = policy;
    auto joined = WorkerInternal::Join(std::move(options), std::move(owned));
    EXPECT_TRUE(joined.ok()) << joined.status();
    if (joined.ok()) worker = *std::move(joined);
  }

  absl::StatusOr<std::vector<double>> Sum(const std::string& name, const std::vector<double>& value) {
    auto round = worker->StartSum(name, Worker::kNextSequence, value);
    if (!round.ok()) return round.status();
    if (absl::Status status = round->Wait(); !status.ok()) return status;
    return round->result().vector();
  }

  InProcessTransport* transport = nullptr;
  std::unique_ptr<Worker> worker;
};

TEST(DriverTest, AJoinEndsThatIsCancelled) {
  for (const int before : {0, 3}) {
    int asked = 0;
    Worker::Options options;
    options.target = "in-process:1";
    options.join_timeout = absl::Hours(1);
    options.join_is_cancelled = [&] { return asked++ == before; };
    const auto silent = [](InProcessTransport*, const v1::WorkerFrame&) {};
    const auto joined = WorkerInternal::Join(std::move(options), std::make_unique<InProcessTransport>(silent));
    EXPECT_EQ(DetailsOf(joined.status()).reason, "INTERRUPTED") << joined.status();
    EXPECT_EQ(asked, before + 1);
  }
}

TEST(DriverTest, RoundsNeedNoNetwork) {
  Pair pair(Serve);
  for (int i = 0; i < 100; ++i) {
    const auto sum = pair.Sum("v", {1.0 * i, 2.0});
    ASSERT_TRUE(sum.ok()) << sum.status();
    EXPECT_THAT(*sum, ElementsAre(10.0 * i, 20.0));
  }
  EXPECT_EQ(pair.worker->incarnation(), 1u);
}

TEST(DriverTest, ALongSumGoesInChunksUnlessItMayLackRanks) {
  std::vector<double> value(40'000), expected(40'000);
  for (size_t i = 0; i < value.size(); ++i) expected[i] = 10.0 * (value[i] = 0.5 * static_cast<double>(i));
  for (const MissingPolicy policy : {MissingPolicy::kFail, MissingPolicy::kWait, MissingPolicy::kProceed}) {
    std::vector<std::string> rounds;
    const auto serve = [&rounds](InProcessTransport* transport, const v1::WorkerFrame& frame) {
      for (const auto& contribution : frame.contributions()) rounds.push_back(contribution.key().layer());
      Serve(transport, frame);
    };
    Pair pair(serve, 1 << 20, absl::Seconds(60), policy);
    const auto sum = pair.Sum("v", value);
    ASSERT_TRUE(sum.ok()) << sum.status();
    EXPECT_EQ(*sum, expected);
    if (policy == MissingPolicy::kProceed) {
      EXPECT_THAT(rounds, ElementsAre("v")) << "ranks are missing in all of a sum, or in none";
    } else {
      EXPECT_THAT(rounds, ElementsAre("v#0", "v#1", "v#2"));
    }
  }
}

TEST(DriverTest, ALongSumLacksTheRanksThatAnyOfItsChunksLacks) {
  const auto serve = [](InProcessTransport* transport, const v1::WorkerFrame& frame) {
    if (frame.has_join()) Welcome(transport);
    for (const v1::Contribution& contribution : frame.contributions()) {
      v1::MasterFrame answer;
      v1::RoundResult* const result = answer.add_results();
      *result->mutable_key() = contribution.key();
      *result->mutable_vector()->mutable_value() = contribution.vector().value();
      if (contribution.key().layer() == "v#0") result->add_missing_ranks(7);
      if (contribution.key().layer() != "v#1") result->add_missing_ranks(3);
      transport->Send(answer);
    }
  };
  Pair pair(serve);
  auto round = pair.worker->StartSum("v", Worker::kNextSequence, std::vector<double>(40'000, 1.0));
  ASSERT_TRUE(round.ok()) << round.status();
  ASSERT_TRUE(round->Wait().ok());
  EXPECT_THAT(round->result().missing_ranks, ElementsAre(3, 7));
}

TEST(DriverTest, AFrameMayArriveInParts) {
  for (const size_t part_bytes : {1, 2, 3, 7, 50}) {
    Pair pair(Serve, part_bytes);
    const auto sum = pair.Sum(std::string(200, 'v'), std::vector<double>(33, 1.5));
    ASSERT_TRUE(sum.ok()) << sum.status();
    EXPECT_EQ(*sum, std::vector<double>(33, 15.0)) << part_bytes;
  }
}

TEST(DriverTest, AFrameThatIsNoneEndsTheWorker) {
  Pair pair([](InProcessTransport* transport, const v1::WorkerFrame& frame) {
    if (frame.has_join()) return Welcome(transport);
    transport->SendBytes("\xff\xff\xff");
  });
  const absl::Status status = pair.Sum("v", {1.0}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("not a syncbn.v1.MasterFrame"));
  EXPECT_EQ(pair.worker->Flush(), status);
}

TEST(DriverTest, EveryThreadGetsItsAnswer) {
  constexpr int kThreads = 4, kRounds = 200;
  Pair pair(Serve);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&pair, t] {
      for (int i = 0; i < kRounds; ++i) {
        const auto sum = pair.Sum(absl::StrCat("v", t), {1.0 * i});
        ASSERT_TRUE(sum.ok()) << sum.status();
        ASSERT_THAT(*sum, ElementsAre(10.0 * i));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(DriverTest, AWaitWhoseTimeIsOverHasSentTheRound) {
  for (const int waits : {0, 1, 2}) {
    std::vector<std::string> rounds;
    Pair pair([&rounds](InProcessTransport* transport, const v1::WorkerFrame& frame) {
      if (frame.has_join()) Welcome(transport);
      for (const auto& contribution : frame.contributions()) rounds.push_back(contribution.key().layer());
    });
    pair.transport->SetWrittenAfter(waits);
    std::vector<Round> begun;
    for (const char* name : {"a", "b", "c"}) {
      auto round = pair.worker->StartSum(name, Worker::kNextSequence, {1.0});
      ASSERT_TRUE(round.ok()) << round.status();
      begun.push_back(*std::move(round));
      EXPECT_TRUE(IsPending(begun.back().Wait(absl::ZeroDuration())));
    }
    EXPECT_THAT(rounds, ElementsAre("a", "b", "c")) << "written after " << waits;
  }
}

TEST(DriverTest, WhatWasUnansweredIsSentAgainAfterABreak) {
  constexpr int kThreads = 3;
  std::atomic<int> streams{0}, contributions{0};
  absl::Notification all_have_come;
  Pair pair([&](InProcessTransport* transport, const v1::WorkerFrame& frame) {
    if (frame.has_join()) {
      EXPECT_EQ(frame.join().run_id(), streams > 0 ? 1u : 0u);
      ++streams;
      return Welcome(transport);
    }
    if (streams > 1) return Answer(transport, frame);
    if ((contributions += frame.contributions_size()) == kThreads) all_have_come.Notify();
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&pair, t] {
      const auto sum = pair.Sum(absl::StrCat("v", t), {1.0});
      EXPECT_TRUE(sum.ok()) << sum.status();
    });
  }
  all_have_come.WaitForNotification();
  pair.transport->Break(absl::UnavailableError("cut"));
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(streams, 2);
}

TEST(DriverTest, AMasterThatStopsEndsEveryWait) {
  Pair pair([](InProcessTransport* transport, const v1::WorkerFrame& frame) {
    if (frame.has_join()) Welcome(transport, absl::Milliseconds(100));
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {  // One drives, the others sleep.
    threads.emplace_back([&pair, t] {
      const absl::Status status = pair.Sum(absl::StrCat("v", t), {1.0}).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
      EXPECT_EQ(DetailsOf(status).reason, "UNREACHABLE") << status;
      EXPECT_EQ(DetailsOf(status).layer.substr(0, 1), "v");
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(DetailsOf(pair.worker->Flush()).reason, "UNREACHABLE");
}

TEST(DriverTest, AMasterThatNobodyReachesIsGivenUp) {
  Pair pair(Serve, 1 << 20, absl::Seconds(2));
  ASSERT_TRUE(pair.Sum("v", {1.0}).ok());
  pair.transport->SetReachable(false);
  pair.transport->Break(absl::UnavailableError("cut"));
  const absl::Status status = pair.Sum("v", {1.0}).status();
  EXPECT_EQ(DetailsOf(status).reason, "UNREACHABLE") << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("nobody listens"));
  EXPECT_GT(pair.transport->opened(), 1);
}

TEST(DriverTest, AnInterruptEndsAWaitAndTheRoundGoesOn) {
  absl::Notification sent;
  InProcessTransport* transport = nullptr;
  v1::WorkerFrame unanswered;
  Pair pair([&](InProcessTransport* from, const v1::WorkerFrame& frame) {
    if (frame.has_join()) return Welcome(from);
    if (frame.contributions_size() == 0) return;
    transport = from;
    unanswered = frame;
    sent.Notify();
  });
  auto round = pair.worker->StartSum("v", 0, std::vector<double>{1.0});
  ASSERT_TRUE(round.ok());
  std::thread waiting([&] { EXPECT_EQ(DetailsOf(round->Wait()).reason, "INTERRUPTED"); });
  sent.WaitForNotification();
  pair.worker->Interrupt();
  waiting.join();
  Answer(transport, unanswered);
  EXPECT_TRUE(round->Wait().ok());
  EXPECT_THAT(round->result().vector(), ElementsAre(10.0));
}

}  // namespace
}  // namespace syncbn::testing
