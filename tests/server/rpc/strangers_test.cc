// Limits of what strangers may do with connections and calls, and their effect on workers.

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "plumbing/log.h"
#include "server/master_server.h"
#include "server/rpc/connections.h"
#include "syncbn/v1/inspection.grpc.pb.h"
#include "tests/server/rpc/idle_connection.h"
#include "tests/server/rpc/log_collector.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Minutes(1);
constexpr char kGetLayer[] = "/syncbn.v1.InspectionService/GetLayer";

MasterServer::Options OnLoopback() {
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  return options;
}

std::unique_ptr<MasterServer> Start(const MasterServer::Options& options = OnLoopback()) {
  auto server = MasterServer::Start(options);
  EXPECT_TRUE(server.ok()) << server.status();
  return server.ok() ? *std::move(server) : nullptr;
}

// A worker, alone in its group, on a connection of its own.
class Worker {
 public:
  explicit Worker(const std::string& target, const std::string& group = "honest") : stream_(Connect(target)) {
    v1::WorkerFrame frame = JoinFrame(group, 0, 1);
    *frame.add_layers() = SumLayer("v", 1);
    joined_ = stream_.Write(frame) && stream_.Read().has_value();
  }

  bool joined() const { return joined_; }
  bool CompletesARound() {
    v1::WorkerFrame frame;
    auto* const contribution = frame.add_contributions();
    *contribution->mutable_key() = Key("v", sequence_++, v1::PHASE_SUM);
    contribution->mutable_vector()->add_value(1.0);
    return stream_.Write(frame) && stream_.ReadResults().has_value();
  }

 private:
  RawStream stream_;
  uint64_t sequence_ = 0;
  bool joined_ = false;
};

// Calls until the condition holds, within a minute.
template <typename Condition>
bool Eventually(Condition condition) {
  const absl::Time end = absl::Now() + kPatience;
  while (absl::Now() < end) {
    if (condition()) return true;
    std::this_thread::yield();
  }
  return false;
}

// ---- Connections ----------------------------------------------------------------------------------------------------

TEST(PeerNameTest, OfGrpcsNames) {
  EXPECT_EQ(rpc::PeerName("ipv4:192.0.2.1:4711"), "192.0.2.1:4711");
  EXPECT_EQ(rpc::PeerName("ipv6:%5B::1%5D:4711"), "[::1]:4711");
  EXPECT_EQ(rpc::PeerName("ipv6:[2001:db8::1]:4711"), "[2001:db8::1]:4711");
  EXPECT_EQ(rpc::PeerName("unix:/run/a.sock"), "");
  EXPECT_EQ(rpc::PeerName("unknown"), "");
}

TEST(StrangersTest, IdleConnectionsMakeRoomForWorkers) {
  LogCollector log;
  MasterServer::Options options = OnLoopback();
  options.max_connections = 3;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  std::vector<std::unique_ptr<Idle>> strangers;
  for (int i = 0; i < 3; ++i) strangers.push_back(std::make_unique<Idle>(server->port()));
  EXPECT_TRUE(strangers.back()->Greeted());
  std::unique_ptr<Worker> worker;
  EXPECT_TRUE(Eventually([&] {
    worker = std::make_unique<Worker>(server->target());
    return worker->joined();
  }));
  EXPECT_TRUE(log.Sees("no worker has joined by it, and others need its place")) << log.Text();
  // A newcomer takes the place of another stranger from here on, never the worker's.
  for (int i = 0; i < 20; ++i) strangers.push_back(std::make_unique<Idle>(server->port()));
  Eventually([&] { return log.Count("refused a connection") > 0; });
  EXPECT_TRUE(worker->CompletesARound());
}

TEST(StrangersTest, TheConnectionOfAWorkerThatWasCutOffMakesRoom) {
  constexpr size_t kElements = 1 << 16;  // 512 KiB.
  MasterServer::Options options = OnLoopback();
  options.max_connections = 2;
  options.max_unread_bytes = 4 << 20;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  const auto connection = Connect(server->target());
  RawStream slow(connection), quick(Connect(server->target()));
  for (int rank = 0; rank < 2; ++rank) {
    v1::WorkerFrame join = JoinFrame("g", rank, 2);
    *join.add_layers() = SumLayer("v", kElements);
    ASSERT_TRUE((rank == 0 ? quick : slow).Write(join));
  }
  bool cut = false;
  for (int round = 0; round < 100 && !cut; ++round) {  // 50 MiB: beyond what any transport buffers.
    v1::WorkerFrame frame;
    auto* const contribution = frame.add_contributions();
    *contribution->mutable_key() = Key("v", round, v1::PHASE_SUM);
    contribution->mutable_vector()->mutable_value()->Resize(kElements, 1.0);
    slow.Write(frame);  // Fails once it is cut off.
    ASSERT_TRUE(quick.Write(frame));
    const auto answer = quick.ReadResults();
    ASSERT_TRUE(answer.has_value());
    cut = answer->results(0).has_error();
  }
  ASSERT_TRUE(cut);
  EXPECT_FALSE(slow.Finish().ok());
  std::unique_ptr<Worker> worker;
  EXPECT_TRUE(Eventually([&] {
    worker = std::make_unique<Worker>(server->target());
    return worker->joined();
  }));
}

TEST(StrangersTest, OneAddressHasItsShare) {
  LogCollector log;
  MasterServer::Options options = OnLoopback();
  options.max_connections_per_address = 2;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  Worker a(server->target(), "a"), b(server->target(), "b");
  ASSERT_TRUE(a.joined() && b.joined());
  EXPECT_FALSE(Idle(server->port()).Greeted());
  EXPECT_TRUE(log.Sees("2 of 127.0.0.1 are open, the limit max_connections_per_address")) << log.Text();
  EXPECT_TRUE(Idle(server->port(), "127.0.0.2").Greeted());
  EXPECT_TRUE(a.CompletesARound() && b.CompletesARound());
}

TEST(StrangersTest, ThisMachineHasNoShareByDefault) {
  MasterServer::Options options = OnLoopback();
  options.max_connections = 4;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  std::vector<std::unique_ptr<Worker>> workers;
  for (int i = 0; i < 4; ++i) workers.push_back(std::make_unique<Worker>(server->target(), absl::StrCat("g", i)));
  for (const auto& worker : workers) EXPECT_TRUE(worker->joined());
}

TEST(StrangersTest, AConnectionThatResetsItsCallsIsClosed) {
  LogCollector log;
  const auto server = Start();
  ASSERT_NE(server, nullptr);
  Worker worker(server->target());
  const auto channel = Connect(server->target());
  EXPECT_TRUE(Eventually([&] {
    RawStream(channel).Cancel();
    return log.Count("too many calls ended before a worker had joined") > 0;
  })) << log.Text();
  EXPECT_TRUE(worker.CompletesARound());
  EXPECT_TRUE(Worker(server->target(), "later").joined());
}

// More than are taken in a row before some of them have joined.
TEST(StrangersTest, CallersThatSayNothingKeepNobodyOut) {
  const auto server = Start();
  ASSERT_NE(server, nullptr);
  std::vector<std::unique_ptr<RawStream>> silent;
  for (int connection = 0; connection < 8; ++connection) {
    const auto channel = Connect(server->target());
    for (int call = 0; call < 50; ++call) silent.push_back(std::make_unique<RawStream>(channel));
  }
  Worker worker(server->target());
  ASSERT_TRUE(worker.joined());
  EXPECT_TRUE(worker.CompletesARound());
  silent.clear();
  EXPECT_TRUE(worker.CompletesARound());
  EXPECT_TRUE(Worker(server->target(), "later").joined());
}

class BytesTest : public ::testing::TestWithParam<const char*> {};

TEST_P(BytesTest, AreLimitedForAConnectionWithoutAWorkerAlone) {
  LogCollector log;
  MasterServer::Options options;
  options.addresses = {GetParam()};
  auto started = MasterServer::Start(options);
  if (!started.ok()) GTEST_SKIP() << started.status();
  const auto server = *std::move(started);
  RawStream stream(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 1);
  *join.add_layers() = SumLayer("v", 1 << 20);
  ASSERT_TRUE(stream.Write(join));
  ASSERT_TRUE(stream.Read().has_value());
  v1::WorkerFrame frame;
  auto* const contribution = frame.add_contributions();
  *contribution->mutable_key() = Key("v", 0, v1::PHASE_SUM);
  contribution->mutable_vector()->mutable_value()->Resize(1 << 20, 1.0);
  for (uint64_t sequence = 0; sequence < 4; ++sequence) {
    contribution->mutable_key()->set_sequence(sequence);
    ASSERT_TRUE(stream.Write(frame));
    ASSERT_TRUE(stream.ReadResults().has_value());
  }
  const auto channel = Connect(server->target());
  const std::string garbage(size_t{3} << 20, '\xff');
  EXPECT_TRUE(Eventually([&] {
    RawStream(channel).WriteBytes(garbage);
    return log.Count("it has sent more than a first frame") > 0;
  })) << log.Text();
  // All connections have been looked at by now.
  contribution->mutable_key()->set_sequence(4);
  EXPECT_TRUE(stream.Write(frame) && stream.ReadResults().has_value());
  EXPECT_GE(log.Count("closed a connection"), 1u) << log.Text();
}

INSTANTIATE_TEST_SUITE_P(Addresses, BytesTest, ::testing::Values("127.0.0.1:0", "[::1]:0"));

// ---- Answers that nobody reads --------------------------------------------------------------------------------------

TEST(StrangersTest, UnreadAnswersAreBoundedAndEnd) {
  constexpr uint32_t kChannels = 1 << 16;  // 2 MiB for each answer.
  const auto server = Start();
  ASSERT_NE(server, nullptr);
  RawStream worker(Connect(server->target()));
  v1::WorkerFrame frame = JoinFrame("g", 0, 1);
  *frame.add_layers() = BatchNormLayer("wide", kChannels);
  auto* const contribution = frame.add_contributions();
  *contribution->mutable_key() = Key("wide", 0, v1::PHASE_FORWARD);
  contribution->mutable_moments()->set_count(2);
  contribution->mutable_moments()->mutable_mean()->Resize(kChannels, 1.0);
  contribution->mutable_moments()->mutable_m2()->Resize(kChannels, 1.0);
  ASSERT_TRUE(worker.Write(frame));
  ASSERT_TRUE(worker.ReadResults().has_value());
  v1::GetLayerRequest request;
  request.set_group("g");
  request.set_layer("wide");
  const auto channel = Connect(server->target());
  const auto ask = [&] {
    auto call = std::make_unique<RawStream>(channel, kGetLayer);
    EXPECT_TRUE(call->Write(request) && call->WritesDone());
    return call;
  };
  std::vector<std::unique_ptr<RawStream>> unread;
  for (int i = 0; i < 12; ++i) unread.push_back(ask());
  const grpc::Status refused = ask()->Finish();
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << refused.error_message();
  EXPECT_EQ(InfoOf(refused).reason(), "LIMIT_EXCEEDED");
  EXPECT_EQ(InfoOf(refused).metadata().at("limit"), "max_unread_answers_of_address");
  // Once the unread ones have been cancelled, there is room for one that is read.
  EXPECT_TRUE(Eventually([&] { return ask()->Finish().ok(); }));
  EXPECT_FALSE(unread.front()->Finish().ok());
}

// Each stream leaves far less than max_unread_bytes.
TEST(StrangersTest, StreamsOfOneConnectionShareWhatTheyMayLeaveUnread) {
  constexpr uint32_t kChannels = 1 << 16;  // 1 MiB for each result.
  constexpr int kStreams = 16;
  LogCollector log;
  MasterServer::Options options = OnLoopback();
  options.max_unread_bytes = size_t{8} << 20;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  Worker worker(server->target());
  ASSERT_TRUE(worker.joined());
  const auto channel = Connect(server->target());
  std::vector<std::unique_ptr<RawStream>> deaf;
  for (int i = 0; i < kStreams; ++i) {
    v1::WorkerFrame frame = JoinFrame(absl::StrCat("deaf ", i), 0, 1);
    *frame.add_layers() = BatchNormLayer("wide", kChannels);
    auto* const contribution = frame.add_contributions();
    *contribution->mutable_key() = Key("wide", 0, v1::PHASE_FORWARD);
    contribution->mutable_moments()->set_backward_role(v1::BACKWARD_ROLE_NONE);
    deaf.push_back(std::make_unique<RawStream>(channel));
    deaf.back()->Write(frame);
  }
  EXPECT_TRUE(log.Sees("its workers leave too much unread")) << log.Text();
  EXPECT_TRUE(worker.CompletesARound());
  EXPECT_TRUE(Worker(server->target(), "later").joined());
}

TEST(StrangersTest, WatchersOfHealthAreLimited) {
  MasterServer::Options options = OnLoopback();
  options.max_watchers = 2;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  const auto watch = [channel = Connect(server->target())] {
    auto call = std::make_unique<RawStream>(channel, "/grpc.health.v1.Health/Watch");
    EXPECT_TRUE(call->WriteBytes("") && call->WritesDone() && call->ReadBytes().has_value());
    return call;
  };
  const auto first = watch(), second = watch();
  const grpc::Status refused = watch()->Finish();
  EXPECT_EQ(InfoOf(refused).reason(), "LIMIT_EXCEEDED") << refused.error_message();
  EXPECT_THAT(refused.error_message(), HasSubstr("max_watchers = 2"));
}

TEST(StrangersTest, AWatcherThatDoesNotReadLosesItsPlace) {
  MasterServer::Options options = OnLoopback();
  options.max_watchers = 1;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  RawStream worker(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 1);
  *join.add_layers() = SumLayer("v", 1);
  ASSERT_TRUE(worker.Write(join));
  ASSERT_TRUE(worker.Read().has_value());
  const auto stub = v1::InspectionService::NewStub(Connect(server->target()));
  v1::WatchRoundsRequest request;
  request.set_group("g");
  grpc::ClientContext stranger;
  const auto deaf = stub->WatchRounds(&stranger, request);
  deaf->WaitForInitialMetadata();
  uint64_t sequence = 0;
  EXPECT_TRUE(Eventually([&] {
    v1::WorkerFrame frame;
    for (int i = 0; i < 500; ++i) {
      auto* const contribution = frame.add_contributions();
      *contribution->mutable_key() = Key("v", sequence++, v1::PHASE_SUM);
      contribution->mutable_vector()->add_value(1.0);
    }
    EXPECT_TRUE(worker.Write(frame));
    for (int results = 0; results < 500;) {
      const auto answer = worker.ReadResults();
      if (!answer.has_value()) return true;
      results += answer->results_size();
    }
    grpc::ClientContext context;
    const auto operators = stub->WatchRounds(&context, request);
    operators->WaitForInitialMetadata();
    v1::WorkerFrame one;
    *one.add_contributions() = frame.contributions(0);
    one.mutable_contributions(0)->mutable_key()->set_sequence(sequence++);
    EXPECT_TRUE(worker.Write(one) && worker.ReadResults().has_value());
    v1::WatchRoundsResponse event;
    const bool admitted = operators->Read(&event);  // Otherwise it is refused, and sees nothing.
    context.TryCancel();
    operators->Finish();
    return admitted;
  }));
  if (HasFailure()) stranger.TryCancel();
  v1::WatchRoundsResponse event;
  while (deaf->Read(&event)) {
  }
  EXPECT_FALSE(deaf->Finish().ok());
}

// ---- A master that has stopped --------------------------------------------------------------------------------------

TEST(ProbeTest, TellsALoopThatIsStuck) {
  const auto server = Start();
  ASSERT_NE(server, nullptr);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(Eventually([&] { return server->Probe(); }));
  absl::Notification stuck, released;
  SetLogSink([&](LogLevel level, absl::string_view line) {
    if (level < LogLevel::kInfo || !absl::StrContains(line, "MALFORMED_FRAME")) return;
    if (!stuck.HasBeenNotified()) stuck.Notify();
    released.WaitForNotification();
  });
  RawStream stream(Connect(server->target()));
  ASSERT_TRUE(stream.WriteBytes("\xff\xff\xff"));
  stuck.WaitForNotification();
  server->Probe();  // May tell that the probe before was answered.
  for (int i = 0; i < 3; ++i) EXPECT_FALSE(server->Probe());
  released.Notify();
  EXPECT_TRUE(Eventually([&] { return server->Probe(); }));
  SetLogSink(nullptr);
  EXPECT_EQ(InfoOf(stream.Finish()).reason(), "MALFORMED_FRAME");
  server->Shutdown(absl::ZeroDuration());
  EXPECT_TRUE(server->Probe());
}

}  // namespace
}  // namespace syncbn::testing
