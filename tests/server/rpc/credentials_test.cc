// Tokens and life keys on the wire, and the credential of inspection.

#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "grpcpp/client_context.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "syncbn/v1/inspection.grpc.pb.h"
#include "tests/server/rpc/log_collector.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kToken[] = "an-open-sesame-of-the-test";

std::unique_ptr<MasterServer> Start(const MasterServer::Options& options) {
  auto server = MasterServer::Start(options);
  EXPECT_TRUE(server.ok()) << server.status();
  return server.ok() ? *std::move(server) : nullptr;
}

MasterServer::Options OnLoopback() {
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  return options;
}

v1::WorkerFrame JoinWith(const std::string& token, uint32_t rank = 0, uint32_t world_size = 2) {
  v1::WorkerFrame frame = JoinFrame("g", rank, world_size);
  frame.mutable_join()->set_token(token);
  return frame;
}

// The status that refuses the join; OK if it does not.
grpc::Status Refusal(const std::string& target, const v1::WorkerFrame& join) {
  RawStream stream(Connect(target));
  EXPECT_TRUE(stream.Write(join));
  if (stream.Read().has_value()) return grpc::Status::OK;
  return stream.Finish();
}

grpc::Status ListGroups(const std::string& target, const std::string& authorization) {
  grpc::ClientContext context;
  if (!authorization.empty()) context.AddMetadata("authorization", authorization);
  v1::ListGroupsResponse response;
  return v1::InspectionService::NewStub(Connect(target))->ListGroups(&context, {}, &response);
}

TEST(TokenTest, EveryJoinNeedsTheMasters) {
  LogCollector log;
  MasterServer::Options options = OnLoopback();
  options.token = kToken;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  EXPECT_TRUE(Refusal(server->target(), JoinWith(kToken)).ok());
  std::vector<grpc::Status> refusals;
  for (const std::string& token :
       {std::string(), std::string("wrong"), std::string(kToken) + "2", std::string(1024, 'x')}) {
    refusals.push_back(Refusal(server->target(), JoinWith(token)));
    EXPECT_EQ(refusals.back().error_code(), grpc::StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(InfoOf(refusals.back()).reason(), "TOKEN_MISMATCH");
    EXPECT_EQ(refusals.back().error_message(), refusals.front().error_message());
  }
  for (const std::string& no_token :
       {std::string(1025, 'x'), std::string("an open sesame"), std::string("caf\u00e9")}) {
    const grpc::Status refusal = Refusal(server->target(), JoinWith(no_token));
    EXPECT_EQ(InfoOf(refusal).reason(), "MALFORMED_FRAME");
    EXPECT_EQ(refusal.error_message().find(no_token), std::string::npos) << "the text shows it";
  }
  EXPECT_TRUE(log.Sees("TOKEN_MISMATCH"));
  EXPECT_EQ(log.Count(kToken), 0u) << "the log shows the token";
}

// A group that was begun with it could be joined by no worker whose library checks its token.
TEST(TokenTest, NoJobIsBegunWithWhatIsNoToken) {
  const auto server = Start(OnLoopback());
  ASSERT_NE(server, nullptr);
  EXPECT_EQ(InfoOf(Refusal(server->target(), JoinWith("an open sesame"))).reason(), "MALFORMED_FRAME");
}

TEST(TokenTest, WithoutOneTheFirstJoinOfAJobDecides) {
  const auto server = Start(OnLoopback());
  ASSERT_NE(server, nullptr);
  RawStream first(Connect(server->target()));
  ASSERT_TRUE(first.Write(JoinWith(kToken)));
  ASSERT_TRUE(first.Read().has_value());
  EXPECT_EQ(InfoOf(Refusal(server->target(), JoinWith("", 1))).reason(), "TOKEN_MISMATCH");
  EXPECT_TRUE(Refusal(server->target(), JoinWith(kToken, 1)).ok());
}

TEST(TokenTest, OptionsAreChecked) {
  for (std::string MasterServer::Options::*token :
       {&MasterServer::Options::token, &MasterServer::Options::inspection_token}) {
    MasterServer::Options options = OnLoopback();
    options.*token = "my secret";
    const auto server = MasterServer::Start(options);
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(server.status().message()), Not(HasSubstr("my secret")));
  }
}

TEST(LifeKeyTest, AStrangerCannotReconnectAsAnother) {
  const auto server = Start(OnLoopback());
  ASSERT_NE(server, nullptr);
  v1::WorkerFrame join = JoinFrame("g", 0, 2);
  join.mutable_join()->set_life_key("the key of a life");
  RawStream worker(Connect(server->target()));
  ASSERT_TRUE(worker.Write(join));
  const auto joined = worker.Read();
  ASSERT_TRUE(joined.has_value());
  v1::WorkerFrame thief = JoinFrame("g", 0, 2);
  thief.mutable_join()->set_incarnation(joined->joined().incarnation());
  thief.mutable_join()->set_run_id(joined->joined().run_id());
  for (const std::string& key : {std::string(), std::string("a guess")}) {
    thief.mutable_join()->set_life_key(key);
    const grpc::Status refusal = Refusal(server->target(), thief);
    EXPECT_EQ(refusal.error_code(), grpc::StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(InfoOf(refusal).reason(), "LIFE_KEY_MISMATCH");
  }
  thief.mutable_join()->set_life_key(std::string(65, 'x'));
  EXPECT_EQ(InfoOf(Refusal(server->target(), thief)).reason(), "MALFORMED_FRAME");
  thief.mutable_join()->set_life_key("the key of a life");
  EXPECT_TRUE(Refusal(server->target(), thief).ok()) << "the worker itself cannot come back";
  EXPECT_EQ(InfoOf(worker.Finish()).reason(), "FENCED");
}

// ---- Inspection -----------------------------------------------------------------------------------------------------

TEST(InspectionCredentialTest, IsTheTokenUnlessItHasItsOwn) {
  MasterServer::Options options = OnLoopback();
  options.token = kToken;
  {
    const auto server = Start(options);
    ASSERT_NE(server, nullptr);
    for (const std::string& wrong : {std::string(), std::string("Bearer wrong"), std::string(kToken),
                                     std::string("Basic ") + kToken, std::string("Bearer ")}) {
      const grpc::Status refused = ListGroups(server->target(), wrong);
      EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNAUTHENTICATED) << wrong;
      EXPECT_EQ(InfoOf(refused).reason(), "TOKEN_MISMATCH");
    }
    EXPECT_TRUE(ListGroups(server->target(), std::string("Bearer ") + kToken).ok());
    EXPECT_TRUE(ListGroups(server->target(), std::string("bearer ") + kToken).ok());
  }
  options.inspection_token = "for-operators";
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  EXPECT_FALSE(ListGroups(server->target(), std::string("Bearer ") + kToken).ok());
  EXPECT_TRUE(ListGroups(server->target(), "Bearer for-operators").ok());
  EXPECT_EQ(InfoOf(Refusal(server->target(), JoinWith("for-operators"))).reason(), "TOKEN_MISMATCH");
}

TEST(InspectionCredentialTest, WatchersNeedItToo) {
  MasterServer::Options options = OnLoopback();
  options.token = kToken;
  const auto server = Start(options);
  ASSERT_NE(server, nullptr);
  RawStream worker(Connect(server->target()));
  ASSERT_TRUE(worker.Write(JoinWith(kToken, 0, 1)));
  ASSERT_TRUE(worker.Read().has_value());
  const auto stub = v1::InspectionService::NewStub(Connect(server->target()));
  v1::WatchRoundsRequest request;
  request.set_group("g");
  v1::WatchRoundsResponse event;
  grpc::ClientContext stranger;
  const auto refused = stub->WatchRounds(&stranger, request);
  EXPECT_FALSE(refused->Read(&event));
  EXPECT_EQ(InfoOf(refused->Finish()).reason(), "TOKEN_MISMATCH");
  grpc::ClientContext context;
  context.AddMetadata("authorization", std::string("Bearer ") + kToken);
  const auto watcher = stub->WatchRounds(&context, request);
  watcher->WaitForInitialMetadata();
  v1::WorkerFrame round;
  *round.add_layers() = SumLayer("s", 1);
  auto* const contribution = round.add_contributions();
  *contribution->mutable_key() = Key("s", 0, v1::PHASE_SUM);
  contribution->mutable_vector()->add_value(1.0);
  ASSERT_TRUE(worker.Write(round));
  EXPECT_TRUE(watcher->Read(&event));
  context.TryCancel();
  EXPECT_FALSE(watcher->Finish().ok());
}

TEST(InspectionCredentialTest, IsOffWhereOtherHostsCanConnectUnlessAskedFor) {
  MasterServer::Options options;
  options.addresses = {"0.0.0.0:0"};
  options.insecure = true;
  const auto local = [](const MasterServer& server) { return "127.0.0.1:" + std::to_string(server.port()); };
  {
    const auto server = Start(options);
    ASSERT_NE(server, nullptr);
    const grpc::Status off = ListGroups(local(*server), "");
    EXPECT_EQ(off.error_code(), grpc::StatusCode::PERMISSION_DENIED);
    EXPECT_EQ(InfoOf(off).reason(), "INSPECTION_OFF");
    EXPECT_TRUE(Refusal(local(*server), JoinWith("")).ok());
  }
  options.inspection = true;
  EXPECT_TRUE(ListGroups(local(*Start(options)), "").ok());
  options.addresses = {"127.0.0.1:0"};
  options.inspection = false;
  EXPECT_EQ(InfoOf(ListGroups(local(*Start(options)), "")).reason(), "INSPECTION_OFF");
}

}  // namespace
}  // namespace syncbn::testing
