// The gRPC layer around the round engine: frames that are not frames, streams that end, readers that do not read.

#include <atomic>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "syncbn/v1/inspection.grpc.pb.h"
#include "tests/server/rpc/raw_stream.h"
#include "tests/testing/seed.h"

namespace syncbn::testing {
namespace {

using ::testing::HasSubstr;

std::unique_ptr<MasterServer> StartServer(MasterServer::Options options = {}) {
  options.addresses = {"127.0.0.1:0"};
  auto started = MasterServer::Start(std::move(options));
  EXPECT_TRUE(started.ok()) << started.status();
  return started.ok() ? *std::move(started) : nullptr;
}

v1::WorkerFrame SumFrame(const std::string& name, uint64_t sequence, const std::vector<double>& value) {
  v1::WorkerFrame frame;
  *frame.mutable_contributions()->Add()->mutable_key() = Key(name, sequence, v1::PHASE_SUM);
  frame.mutable_contributions(0)->mutable_vector()->mutable_value()->Add(value.begin(), value.end());
  return frame;
}

// The status of a call whose worker has said nothing but this.
grpc::Status StatusAfter(MasterServer& server, const v1::WorkerFrame& frame) {
  RawStream stream(Connect(server.target()));
  stream.Write(frame);
  return stream.Finish();
}

void ExpectError(const grpc::Status& status, grpc::StatusCode code, const std::string& reason,
                 const std::string& message) {
  EXPECT_EQ(status.error_code(), code) << status.error_message();
  const google::rpc::ErrorInfo info = InfoOf(status);
  EXPECT_EQ(info.reason(), reason);
  EXPECT_EQ(info.domain(), "syncbn");
  EXPECT_THAT(status.error_message(), HasSubstr(message));
}

// ---- Bad frames -----------------------------------------------------------------------------------------------------

TEST(WorkerStreamTest, BytesThatAreNoFrameEndTheCall) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  ASSERT_TRUE(stream.WriteBytes("\xff\xff\xff"));
  ExpectError(stream.Finish(), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME", "not a syncbn.v1.WorkerFrame");
}

TEST(WorkerStreamTest, AMalformedFrameOfAMemberLosesItToTheOthers) {
  const auto server = StartServer();
  RawStream good(Connect(server->target())), bad(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 2);
  *join.add_layers() = SumLayer("v", 1);
  *join.add_contributions() = SumFrame("v", 0, {1.0}).contributions(0);
  ASSERT_TRUE(good.Write(join));
  ASSERT_TRUE(good.Read().has_value());  // It is a member before the other one goes, who would else leave no group.
  ASSERT_TRUE(bad.Write(JoinFrame("g", 1, 2)));
  ASSERT_TRUE(bad.Read().has_value());
  ASSERT_TRUE(bad.WriteBytes("\xff"));
  ExpectError(bad.Finish(), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME", "");
  const auto frame = good.ReadResults();
  ASSERT_TRUE(frame.has_value());
  const google::rpc::ErrorInfo info = InfoOf(frame->results(0).error());
  EXPECT_EQ(info.reason(), "WORKER_LOST");
  EXPECT_EQ(info.metadata().at("ranks"), "1");
  EXPECT_EQ(info.metadata().at("layer"), "v");
  EXPECT_EQ(info.metadata().at("sequence"), "0");
  EXPECT_EQ(info.metadata().at("phase"), "SUM");
}

TEST(WorkerStreamTest, RulesOfTheFrameAreNamed) {
  const auto server = StartServer();
  const auto expect_malformed = [&](const v1::WorkerFrame& frame, const std::string& message) {
    ExpectError(StatusAfter(*server, frame), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME", message);
  };
  v1::WorkerFrame frame = JoinFrame("g", 0, 1);
  *frame.add_contributions()->mutable_key() = Key("v", 3, v1::PHASE_UNSPECIFIED);
  expect_malformed(frame, "the key of layer \"v\", sequence 3, has phase 0");

  frame = JoinFrame("g", 0, 1);  // The wrong phase for its payload.
  *frame.mutable_contributions()->Add() = SumFrame("v", 0, {1.0}).contributions(0);
  frame.mutable_contributions(0)->mutable_key()->set_phase(v1::PHASE_FORWARD);
  expect_malformed(frame, "carries no moments");
  frame.mutable_contributions(0)->mutable_key()->set_phase(v1::PHASE_BACKWARD);
  expect_malformed(frame, "carries no gradient_sums");

  frame = JoinFrame("g", 0, 1);
  *frame.add_layers() = SumLayer("v", 1);
  frame.mutable_layers(0)->set_kind(v1::LAYER_KIND_UNSPECIFIED);
  expect_malformed(frame, "layer \"v\" has kind 0");
  frame.mutable_layers(0)->set_kind(v1::LAYER_KIND_SUM);
  frame.mutable_layers(0)->set_eps_mode(static_cast<v1::EpsMode>(9));
  expect_malformed(frame, "eps_mode = 9 is not known");

  expect_malformed(JoinFrame("g", 2, 2), "rank 2 is not below the world size of 2");
  expect_malformed(JoinFrame("g", 0, 0), "world_size is 0");
}

TEST(WorkerStreamTest, AContributionOfTheWrongKindIsRefusedAndTheStreamGoesOn) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  v1::WorkerFrame frame = JoinFrame("g", 0, 1);
  *frame.add_layers() = BatchNormLayer("bn", 1);
  *frame.add_contributions() = SumFrame("bn", 0, {1.0}).contributions(0);
  ASSERT_TRUE(stream.Write(frame));
  auto answer = stream.ReadResults();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(InfoOf(answer->results(0).error()).reason(), "INVALID_CONTRIBUTION");
  v1::WorkerFrame forward;
  *forward.add_contributions()->mutable_key() = Key("bn", 0, v1::PHASE_FORWARD);
  forward.mutable_contributions(0)->mutable_moments()->set_count(0);
  ASSERT_TRUE(stream.Write(forward));
  answer = stream.ReadResults();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->results(0).moments().count(), 0);
  EXPECT_EQ(answer->results(0).moments().mean_size(), 1);
}

TEST(WorkerStreamTest, TheFirstFrameAndOnlyItCarriesTheJoin) {
  const auto server = StartServer();
  ExpectError(StatusAfter(*server, SumFrame("v", 0, {1.0})), grpc::StatusCode::INVALID_ARGUMENT, "JOIN_REQUIRED",
              "first frame");
  RawStream twice(Connect(server->target()));
  ASSERT_TRUE(twice.Write(JoinFrame("g", 0, 1)));
  ASSERT_TRUE(twice.Write(JoinFrame("g", 0, 1)));
  ExpectError(twice.Finish(), grpc::StatusCode::INVALID_ARGUMENT, "JOIN_REQUIRED", "only a stream's first frame");
  RawStream silent(Connect(server->target()));
  ASSERT_TRUE(silent.WritesDone());
  ExpectError(silent.Finish(), grpc::StatusCode::INVALID_ARGUMENT, "JOIN_REQUIRED", "before its first frame");
}

TEST(WorkerStreamTest, VersionsAreNegotiated) {
  const auto server = StartServer();
  v1::WorkerFrame frame = JoinFrame("g", 0, 1);
  frame.mutable_join()->set_max_protocol_version(7);
  RawStream stream(Connect(server->target()));
  ASSERT_TRUE(stream.Write(frame));
  const auto joined = stream.Read();
  ASSERT_TRUE(joined.has_value());
  EXPECT_EQ(joined->joined().protocol_version(), 1u);
  EXPECT_EQ(joined->joined().incarnation(), 1u);
  EXPECT_NE(joined->joined().run_id(), 0u);
  EXPECT_EQ(joined->joined().config().round_timeout().seconds(), 600);
  EXPECT_EQ(joined->joined().config().rejoin_grace().nanos(), 50000000);
  frame = JoinFrame("other", 0, 1);
  frame.mutable_join()->set_min_protocol_version(2);
  frame.mutable_join()->set_max_protocol_version(3);
  ExpectError(StatusAfter(*server, frame), grpc::StatusCode::FAILED_PRECONDITION, "VERSION_UNSUPPORTED",
              "speaks protocol versions 2 to 3");
}

TEST(WorkerStreamTest, LimitsAreNamed) {
  MasterServer::Options options;
  options.limits.max_channels = 8;
  options.limits.max_workers = 3;
  options.limits.max_groups = 1;
  const auto server = StartServer(options);
  const auto expect_limit = [&](const v1::WorkerFrame& frame, const std::string& message) {
    ExpectError(StatusAfter(*server, frame), grpc::StatusCode::RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED", message);
  };
  v1::WorkerFrame frame = JoinFrame("g", 0, 1);
  *frame.add_layers() = BatchNormLayer("bn", 9);
  expect_limit(frame, "max_channels = 8");
  expect_limit(JoinFrame("g", 0, 4), "max_workers = 3");
  expect_limit(JoinFrame(std::string(256, 'g'), 0, 1), "max_name_bytes = 255");
  RawStream holder(Connect(server->target()));
  ASSERT_TRUE(holder.Write(JoinFrame("g", 0, 1)));
  ASSERT_TRUE(holder.Read().has_value());
  expect_limit(JoinFrame("another", 0, 1), "max_groups = 1");
}

TEST(WorkerStreamTest, OneConnectionCannotTakeAllGroups) {
  MasterServer::Options options;
  options.limits.max_groups = 8;
  const auto server = StartServer(options);
  const auto channel = Connect(server->target());
  std::vector<std::unique_ptr<RawStream>> held;
  const auto join = [&](const std::shared_ptr<grpc::Channel>& by) {
    held.push_back(std::make_unique<RawStream>(by));
    EXPECT_TRUE(held.back()->Write(JoinFrame("g" + std::to_string(held.size()), 0, 1)));
    return held.back()->Read().has_value();
  };
  EXPECT_TRUE(join(channel));
  EXPECT_TRUE(join(channel));
  EXPECT_FALSE(join(channel));
  ExpectError(held.back()->Finish(), grpc::StatusCode::RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED",
              "max_groups_per_connection = 2");
  EXPECT_TRUE(join(Connect(server->target())));
}

TEST(WorkerStreamTest, AFrameThatIsTooLongEndsTheCall) {
  MasterServer::Options options;
  options.max_frame_bytes = 4096;
  const auto server = StartServer(options);
  RawStream stream(Connect(server->target()));
  ASSERT_TRUE(stream.Write(JoinFrame("g", 0, 1)));
  ASSERT_TRUE(stream.Read().has_value());
  ASSERT_TRUE(stream.Write(SumFrame("v", 0, std::vector<double>(1024))));
  EXPECT_EQ(stream.Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST(WorkerStreamTest, ARankIsTakenWhileItsStreamIsAlive) {
  const auto server = StartServer();
  RawStream first(Connect(server->target())), second(Connect(server->target())), again(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 1);
  join.mutable_join()->set_description("host=node7 pid=4711");
  ASSERT_TRUE(first.Write(join));
  const auto joined = first.Read();
  ASSERT_TRUE(joined.has_value());
  ASSERT_TRUE(second.Write(JoinFrame("g", 0, 1)));
  EXPECT_FALSE(second.Read().has_value());
  ExpectError(second.Finish(), grpc::StatusCode::ALREADY_EXISTS, "RANK_TAKEN", "host=node7 pid=4711");
  // The incarnation that holds it may come back, whatever its old stream looks like.
  join.mutable_join()->set_incarnation(joined->joined().incarnation());
  join.mutable_join()->set_run_id(joined->joined().run_id());
  ASSERT_TRUE(again.Write(join));
  ASSERT_TRUE(again.Read().has_value());
  ExpectError(first.Finish(), grpc::StatusCode::ABORTED, "FENCED", "incarnation 1 of rank 0 has joined on another");
}

// ---- Streams that end -----------------------------------------------------------------------------------------------

TEST(WorkerStreamTest, AHalfClosedStreamStillGetsItsAnswer) {
  const auto server = StartServer();
  RawStream early(Connect(server->target())), late(Connect(server->target()));
  v1::WorkerFrame frame = SumFrame("v", 0, {1.0, 2.0});
  *frame.mutable_join() = JoinFrame("g", 0, 2).join();
  *frame.add_layers() = SumLayer("v", 2);
  ASSERT_TRUE(early.Write(frame));
  ASSERT_TRUE(early.WritesDone());
  *frame.mutable_join() = JoinFrame("g", 1, 2).join();
  ASSERT_TRUE(late.Write(frame));
  for (RawStream* stream : {&early, &late}) {
    const auto answer = stream->ReadResults();
    ASSERT_TRUE(answer.has_value());
    EXPECT_THAT(answer->results(0).vector().value(), ::testing::ElementsAre(2.0, 4.0));
  }
  EXPECT_TRUE(early.Finish().ok());
}

TEST(WorkerStreamTest, AHalfClosedStreamThatRepeatedItselfEndsToo) {
  const auto server = StartServer();
  RawStream early(Connect(server->target())), late(Connect(server->target()));
  v1::WorkerFrame frame = SumFrame("v", 0, {1.0});
  *frame.add_contributions() = frame.contributions(0);
  *frame.mutable_join() = JoinFrame("g", 0, 2).join();
  *frame.add_layers() = SumLayer("v", 1);
  ASSERT_TRUE(early.Write(frame));
  ASSERT_TRUE(early.WritesDone());
  *frame.mutable_join() = JoinFrame("g", 1, 2).join();
  ASSERT_TRUE(late.Write(frame));
  EXPECT_TRUE(early.ReadResults().has_value());
  EXPECT_TRUE(early.Finish().ok());
}

TEST(WorkerStreamTest, LeaveEndsTheCall) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  v1::WorkerFrame frame = JoinFrame("g", 0, 1);
  frame.mutable_leave()->set_reason("finished");
  ASSERT_TRUE(stream.Write(frame));
  EXPECT_TRUE(stream.Finish().ok());
}

TEST(WorkerStreamTest, AStreamThatNeverJoinsIsClosed) {
  MasterServer::Options options;
  options.join_timeout = absl::Milliseconds(20);
  const auto server = StartServer(options);
  RawStream stream(Connect(server->target()));
  ExpectError(stream.Finish(), grpc::StatusCode::INVALID_ARGUMENT, "JOIN_REQUIRED", "no join arrived within 20ms");
}

TEST(WorkerStreamTest, ShuttingDownIsToldToEveryWorker) {
  const auto server = StartServer();
  RawStream waiting(Connect(server->target())), idle(Connect(server->target()));
  v1::WorkerFrame frame = SumFrame("v", 0, {1.0});
  *frame.mutable_join() = JoinFrame("g", 0, 2).join();
  *frame.add_layers() = SumLayer("v", 1);
  ASSERT_TRUE(waiting.Write(frame));
  ASSERT_TRUE(waiting.Read().has_value());
  ASSERT_TRUE(idle.Write(JoinFrame("g", 1, 2)));
  ASSERT_TRUE(idle.Read().has_value());
  std::thread shutdown([&] { server->Shutdown(absl::Seconds(20)); });
  ExpectError(waiting.Finish(), grpc::StatusCode::UNAVAILABLE, "SHUTTING_DOWN", "");
  ExpectError(idle.Finish(), grpc::StatusCode::UNAVAILABLE, "SHUTTING_DOWN", "");
  shutdown.join();
  EXPECT_EQ(StatusAfter(*server, JoinFrame("g", 0, 2)).error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(WorkerStreamTest, DestructionEndsOpenCalls) {
  auto server = StartServer();
  RawStream stream(Connect(server->target()));
  ASSERT_TRUE(stream.Write(JoinFrame("g", 0, 1)));
  ASSERT_TRUE(stream.Read().has_value());
  server.reset();
  EXPECT_FALSE(stream.Finish().ok());
}

// Joins "calm", a group of two, with a contribution of `value`; null if the master does not let it in. A busy machine
// may be late with the join, for which the master then no longer waits.
std::unique_ptr<RawStream> JoinCalm(const MasterServer& server, uint32_t rank, double value) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    auto stream = std::make_unique<RawStream>(Connect(server.target()));
    v1::WorkerFrame frame = SumFrame("v", 0, {value});
    *frame.mutable_join() = JoinFrame("calm", rank, 2).join();
    *frame.add_layers() = SumLayer("v", 1);
    if (stream->Write(frame) && stream->Read().has_value()) return stream;
  }
  return nullptr;
}

// Demands that a call has ended as one may: well, or with a reason of the protocol's, or cut off for what it left
// unread, or with the server.
void ExpectOrderlyEnd(const grpc::Status& status) {
  if (status.ok() || !InfoOf(status).reason().empty()) return;
  EXPECT_THAT(status.error_code(), ::testing::AnyOf(grpc::StatusCode::CANCELLED, grpc::StatusCode::UNAVAILABLE))
      << status.error_message();
}

TEST(WorkerStreamTest, StreamsThatEndAtAnyMomentHarmNothing) {
  constexpr int kThreads = 4;
  constexpr int kStreams = 60;  // For each thread; the master is shut down in the midst of them.
  const uint32_t seed = Seed();
  MasterServer::Options options;
  options.join_timeout = absl::Milliseconds(20);
  options.limits.group_linger = absl::Milliseconds(5);
  options.max_unread_bytes = 1000;
  const auto server = StartServer(options);
  std::atomic<int> ended{0};
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < kThreads; ++rank) {
    threads.emplace_back([&, rank] {
      std::mt19937 random(seed + rank);
      const auto channel = Connect(server->target());
      for (int i = 0; i < kStreams; ++i, ++ended) {
        RawStream stream(channel);  // Its destructor cancels.
        const uint32_t stage = random() % 9;
        if (stage == 0) continue;
        if (stage == 1) ExpectOrderlyEnd(stream.Finish());  // By the master, since it does not join.
        if (stage == 2) stream.WriteBytes("\x0a\xff");
        if (stage == 3) stream.WritesDone();
        if (stage <= 3) continue;
        v1::WorkerFrame frame = JoinFrame("g", rank, kThreads);
        frame.mutable_join()->set_generation(random() % 16 == 0 ? i : 0);
        frame.mutable_join()->mutable_config()->mutable_round_timeout()->set_nanos(20'000'000);
        *frame.add_layers() = SumLayer("v", 1);
        stream.Write(frame);
        const uint32_t frames = random() % 40;
        for (uint32_t sent = 0; sent < frames; ++sent) {  // Without reading the answers.
          frame = SumFrame("v", random() % 4, {1.0 * (random() % 2)});
          if (random() % 2 == 0) *frame.add_blocked_on() = frame.contributions(0).key();
          stream.Write(frame);
        }
        if (stage == 4) continue;
        if (stage == 5) frame.mutable_leave();
        if (stage == 6) *frame.mutable_join() = JoinFrame("g", rank, kThreads).join();
        stream.Write(frame);
        if (stage == 7) stream.WritesDone();
        if (stage != 8) ExpectOrderlyEnd(stream.Finish());
      }
    });
  }
  // Another group is served meanwhile.
  const auto first = JoinCalm(*server, 0, 1.0), second = JoinCalm(*server, 1, 2.0);
  for (RawStream* const stream : {first.get(), second.get()}) {
    EXPECT_NE(stream, nullptr);
    if (stream == nullptr) continue;
    const auto answer = stream->ReadResults();
    EXPECT_EQ(answer.has_value() ? answer->results(0).vector().value(0) : 0.0, 3.0);
  }
  while (ended < kThreads * kStreams / 2) std::this_thread::yield();
  server->Shutdown(absl::ZeroDuration());
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(StatusAfter(*server, JoinFrame("g", 0, 1)).error_code(), grpc::StatusCode::UNAVAILABLE);
}

// ---- Rounds that wait for long --------------------------------------------------------------------------------------

TEST(WorkerStreamTest, ALateRoundIsToldAndGoesOn) {
  MasterServer::Options options;
  options.limits.late_round_after = absl::Milliseconds(10);
  const auto server = StartServer(options);
  RawStream early(Connect(server->target())), late(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 2);
  *join.add_layers() = SumLayer("v", 1);
  *join.add_contributions() = SumFrame("v", 3, {1.0}).contributions(0);
  ASSERT_TRUE(early.Write(join));
  std::optional<v1::MasterFrame> frame;
  do {
    frame = early.Read();
    ASSERT_TRUE(frame.has_value());
  } while (frame->late_rounds_size() == 0);
  const v1::LateRound& round = frame->late_rounds(0);
  EXPECT_EQ(round.key().layer(), "v");
  EXPECT_EQ(round.key().sequence(), 3u);
  EXPECT_GE(round.age().seconds() + 1e-9 * round.age().nanos(), 0.01);
  EXPECT_THAT(round.missing_ranks(), ::testing::ElementsAre(1));
  EXPECT_EQ(round.missing(), 1u);
  join = JoinFrame("g", 1, 2);
  *join.add_contributions() = SumFrame("v", 3, {2.0}).contributions(0);
  ASSERT_TRUE(late.Write(join));
  const auto answer = early.ReadResults();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->results(0).vector().value(0), 3.0);
}

// ---- Errors that are long -------------------------------------------------------------------------------------------

TEST(WorkerStreamTest, ALongErrorArrivesInPart) {
  const auto server = StartServer();
  // 250 bytes of two-byte characters each, which trailers carry escaped.
  std::string name;
  for (int i = 0; i < 124; ++i) name += "\u00e9";
  v1::WorkerFrame first = JoinFrame("g", 0, 2), second = JoinFrame("g", 1, 2);
  for (int i = 0; i < 100; ++i) {
    *first.mutable_join()->add_layers() = BatchNormLayer(name + std::to_string(i), 1);
    *second.mutable_join()->add_layers() = BatchNormLayer(name + std::to_string(i), 2);
  }
  RawStream member(Connect(server->target()));
  ASSERT_TRUE(member.Write(first));
  ASSERT_TRUE(member.Read().has_value());
  const grpc::Status status = StatusAfter(*server, second);
  ExpectError(status, grpc::StatusCode::FAILED_PRECONDITION, "LAYER_SET_MISMATCH", "channels 2 instead of 1");
  EXPECT_LE(status.error_message().size(), 1024u);
  EXPECT_THAT(status.error_message(), ::testing::EndsWith("\u00e9..."));
}

// ---- A reader that does not read ------------------------------------------------------------------------------------

TEST(WorkerStreamTest, ASlowReaderIsCutOffAndTheOthersLearnOfIt) {
  constexpr size_t kElements = 1 << 16;  // 512 KiB.
  constexpr int kMostRounds = 100;       // 50 MiB: beyond what any transport buffers.
  MasterServer::Options options;
  options.max_unread_bytes = 4 << 20;
  const auto server = StartServer(options);
  RawStream slow(Connect(server->target())), quick(Connect(server->target()));
  const std::vector<double> vector(kElements, 1.0);
  v1::WorkerFrame join = JoinFrame("g", 0, 2);
  *join.add_layers() = SumLayer("v", kElements);
  ASSERT_TRUE(quick.Write(join));
  *join.mutable_join() = JoinFrame("g", 1, 2).join();
  ASSERT_TRUE(slow.Write(join));
  bool cut = false;
  int rounds = 0;
  for (; rounds < kMostRounds && !cut; ++rounds) {
    slow.Write(SumFrame("v", rounds, vector));  // Fails once it is cut off.
    ASSERT_TRUE(quick.Write(SumFrame("v", rounds, vector)));
    const auto answer = quick.ReadResults();
    ASSERT_TRUE(answer.has_value());
    if (!answer->results(0).has_error()) continue;
    const google::rpc::ErrorInfo info = InfoOf(answer->results(0).error());
    EXPECT_EQ(info.reason(), "WORKER_LOST");
    EXPECT_EQ(info.metadata().at("ranks"), "1");
    cut = true;
  }
  EXPECT_TRUE(cut) << rounds << " rounds";
  // The bytes in the transport's buffers are still read; then the call is over.
  EXPECT_FALSE(slow.Finish().ok());
}

}  // namespace
}  // namespace syncbn::testing
