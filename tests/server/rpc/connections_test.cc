// Connections: how many, what becomes of them when the listener or the process gets into trouble, and what gRPC would
// let a stranger do with one.

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "syncbn/v1/inspection.grpc.pb.h"
#include "syncbn/v1/statistics.grpc.pb.h"
#include "tests/server/rpc/idle_connection.h"
#include "tests/server/rpc/log_collector.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

using ::testing::HasSubstr;

constexpr int kPatienceMs = 60000;

std::unique_ptr<MasterServer> Start(const std::string& address, size_t max_connections = 0) {
  MasterServer::Options options;
  options.addresses = {address};
  options.max_connections = max_connections;
  auto server = MasterServer::Start(std::move(options));
  EXPECT_TRUE(server.ok()) << server.status();
  return server.ok() ? *std::move(server) : nullptr;
}

bool Joins(RawStream& stream, const std::string& group, uint32_t rank, uint32_t world_size) {
  return stream.Write(JoinFrame(group, rank, world_size)) && stream.Read().has_value();
}

// Tries until it has joined: a master that is full closes connections as they come.
bool JoinsInTime(const std::string& target) {
  const absl::Time end = absl::Now() + absl::Milliseconds(kPatienceMs);
  while (absl::Now() < end) {
    RawStream stream(Connect(target));
    if (Joins(stream, "g", 0, 1)) return true;
  }
  return false;
}

// The listening sockets of this process.
std::vector<int> ListeningDescriptors() {
  std::vector<int> found;
  for (int descriptor = 0; descriptor < 1024; ++descriptor) {
    int listening = 0;
    socklen_t length = sizeof(listening);
    if (getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &listening, &length) == 0 && listening != 0) {
      found.push_back(descriptor);
    }
  }
  return found;
}

std::string SocketPath(const std::string& name) {
  static const std::string folder = [] {
    char made[] = "/tmp/syncbn-test-XXXXXX";
    return std::string(mkdtemp(made));
  }();
  return absl::StrCat(folder, "/", name);
}

// ---- How many -------------------------------------------------------------------------------------------------------

TEST(ConnectionsTest, BeyondTheLimitTheyAreClosedAtOnce) {
  LogCollector log;
  const auto server = Start("127.0.0.1:0", 3);
  ASSERT_NE(server, nullptr);
  EXPECT_EQ(server->max_connections(), 3u);
  std::vector<std::unique_ptr<RawStream>> members;
  for (uint32_t rank = 0; rank < 3; ++rank) {
    members.push_back(std::make_unique<RawStream>(Connect(server->target())));
    ASSERT_TRUE(Joins(*members.back(), "full", rank, 3));
  }
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(Idle(server->port()).Greeted());
  EXPECT_TRUE(log.Sees("3 are open, the limit max_connections"));
  EXPECT_LE(log.Count("max_connections"), 6u) << "refusals are told one by one";
  members.pop_back();
  EXPECT_TRUE(JoinsInTime(server->target())) << "a place that has become free is not given again";
}

TEST(ConnectionsTest, ManyMoreThanTheLimitAndThenPeace) {
  const auto server = Start("127.0.0.1:0", 16);
  ASSERT_NE(server, nullptr);
  {
    std::vector<std::unique_ptr<Idle>> crowd;
    for (int i = 0; i < 200; ++i) crowd.push_back(std::make_unique<Idle>(server->port()));
  }
  EXPECT_TRUE(JoinsInTime(server->target()));
}

TEST(ConnectionsTest, TheDefaultLeavesDescriptorsForOtherThings) {
  rlimit limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const auto server = Start("127.0.0.1:0");
  ASSERT_NE(server, nullptr);
  EXPECT_LT(server->max_connections(), limit.rlim_cur);
  EXPECT_GE(server->max_connections(), limit.rlim_cur * 3 / 4);
}

// ---- The listener ---------------------------------------------------------------------------------------------------

TEST(ConnectionsTest, AListenerThatDiesIsOpenedAgain) {
  LogCollector log;
  const std::string path = SocketPath("dies.sock");
  for (const std::string& address : {std::string("127.0.0.1:0"), absl::StrCat("unix:", path)}) {
    const std::vector<int> before = ListeningDescriptors();
    const auto server = Start(address);
    ASSERT_NE(server, nullptr);
    for (const int descriptor : ListeningDescriptors()) {
      if (std::find(before.begin(), before.end(), descriptor) == before.end()) shutdown(descriptor, SHUT_RDWR);
    }
    EXPECT_TRUE(log.Sees(absl::StrCat("listening on ", server->target(), " again")));
    EXPECT_TRUE(JoinsInTime(server->target()));
  }
}

TEST(ConnectionsTest, ASocketsFileThatIsRemovedComesBack) {
  LogCollector log;
  const std::string path = SocketPath("removed.sock");
  const auto server = Start(absl::StrCat("unix:", path));
  ASSERT_NE(server, nullptr);
  ASSERT_EQ(unlink(path.c_str()), 0);
  EXPECT_TRUE(log.Sees("again"));
  EXPECT_TRUE(JoinsInTime(server->target()));
}

TEST(ConnectionsTest, HealthFailsWhileNobodyCanConnect) {
  const std::string path = SocketPath("blocked.sock");
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0", absl::StrCat("unix:", path)};
  const auto server = MasterServer::Start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  RawStream watch(Connect((*server)->target()), "/grpc.health.v1.Health/Watch");
  ASSERT_TRUE(watch.WriteBytes(""));
  ASSERT_TRUE(watch.WritesDone());
  EXPECT_EQ(watch.ReadBytes(), "\x08\x01");  // SERVING.
  // A folder in its place, so that it cannot be opened again.
  ASSERT_EQ(unlink(path.c_str()), 0);
  ASSERT_EQ(mkdir(path.c_str(), 0700), 0);
  EXPECT_EQ(watch.ReadBytes(), "\x08\x02");  // NOT_SERVING.
  ASSERT_EQ(rmdir(path.c_str()), 0);
  EXPECT_EQ(watch.ReadBytes(), "\x08\x01");
  EXPECT_TRUE(JoinsInTime(absl::StrCat("unix:", path)));
}

// ---- Forks ----------------------------------------------------------------------------------------------------------

TEST(ConnectionsTest, AForkedChildHoldsNeitherPortNorConnections) {
  auto server = Start("127.0.0.1:0");
  ASSERT_NE(server, nullptr);
  const std::string target = server->target();
  RawStream stream(Connect(target));
  ASSERT_TRUE(Joins(stream, "g", 0, 1));
  int lifeline[2];
  ASSERT_EQ(pipe2(lifeline, O_CLOEXEC), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(lifeline[1]);
    const bool held = !ListeningDescriptors().empty();
    server->Shutdown(absl::ZeroDuration());
    server.reset();  // Waits for no thread that the child does not have.
    char byte;
    const ssize_t end = read(lifeline[0], &byte, 1);  // Lives on until the test is over.
    _exit(held || end != 0 ? 1 : 0);
  }
  server.reset();
  EXPECT_FALSE(stream.Finish().ok());
  const auto next = Start(target);
  ASSERT_NE(next, nullptr);
  EXPECT_TRUE(JoinsInTime(target));
  close(lifeline[0]);
  close(lifeline[1]);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0) << "the child held a listening socket";
}

// ---- What a connection may do ---------------------------------------------------------------------------------------

TEST(ConnectionsTest, CompressedFramesAreRefused) {
  const auto server = Start("127.0.0.1:0");
  ASSERT_NE(server, nullptr);
  const auto stub = v1::StatisticsService::NewStub(Connect(server->target()));
  for (const auto algorithm : {GRPC_COMPRESS_GZIP, GRPC_COMPRESS_DEFLATE}) {
    grpc::ClientContext context;
    context.set_compression_algorithm(algorithm);
    const auto call = stub->Synchronize(&context);
    v1::WorkerFrame frame = JoinFrame("g", 0, 1);
    frame.mutable_join()->set_description(std::string(1 << 20, 'a'));
    call->Write(frame);
    const grpc::Status status = call->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(algorithm == GRPC_COMPRESS_GZIP ? "gzip" : "deflate"));
  }
}

TEST(ConnectionsTest, CompressedCallsAreRefused) {
  const auto server = Start("127.0.0.1:0");
  ASSERT_NE(server, nullptr);
  const auto stub = v1::InspectionService::NewStub(Connect(server->target()));
  grpc::ClientContext context;
  context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  v1::GetLayerRequest request;
  request.set_layer(std::string(1 << 20, 'a'));
  v1::GetLayerResponse response;
  const grpc::Status status = stub->GetLayer(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("gzip"));
}

TEST(ConnectionsTest, CallsTakeNoThreadEach) {
  const auto server = Start("127.0.0.1:0");
  ASSERT_NE(server, nullptr);
  const auto threads = [] {
    std::filesystem::directory_iterator tasks("/proc/self/task");
    return std::distance(begin(tasks), end(tasks));
  };
  const auto channel = Connect(server->target());
  RawStream warm(channel, "/no.such.Service/Method");
  EXPECT_EQ(warm.Finish().error_code(), grpc::StatusCode::UNIMPLEMENTED);
  const auto before = threads();
  std::vector<std::unique_ptr<RawStream>> held;
  int refused = 0;
  for (int i = 0; i < 60; ++i) {
    held.push_back(
        std::make_unique<RawStream>(channel, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"));
    // list_services: answered, or refused.
    if (!held.back()->WriteBytes("\x3a\x01*") || !held.back()->ReadBytes().has_value()) ++refused;
  }
  EXPECT_LT(threads() - before, 30);
  EXPECT_GT(refused, 0);
  RawStream worker(channel);
  EXPECT_TRUE(Joins(worker, "g", 0, 1));
}

TEST(ConnectionsTest, ReflectionIsForThisHostUnlessAskedFor) {
  const auto has_reflection = [](const std::string& address, std::optional<bool> reflection) {
    MasterServer::Options options;
    options.addresses = {address};
    options.insecure = true;
    options.reflection = reflection;
    const auto server = MasterServer::Start(options);
    EXPECT_TRUE(server.ok()) << server.status();
    RawStream stream(Connect(absl::StrCat("127.0.0.1:", (*server)->port())),
                     "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo");
    return stream.WriteBytes("\x3a\x01*") && stream.ReadBytes().has_value();
  };
  EXPECT_TRUE(has_reflection("127.0.0.1:0", std::nullopt));
  EXPECT_FALSE(has_reflection("0.0.0.0:0", std::nullopt));
  EXPECT_TRUE(has_reflection("0.0.0.0:0", true));
  EXPECT_FALSE(has_reflection("127.0.0.1:0", false));
}

}  // namespace
}  // namespace syncbn::testing
