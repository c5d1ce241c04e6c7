// A master from outside: inspection, its watchers, health, reflection, channelz.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "grpcpp/ext/channelz_service_plugin.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "syncbn/v1/inspection.grpc.pb.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class InspectionTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { grpc::channelz::experimental::InitChannelzService(); }

  void SetUp() override {
    MasterServer::Options options;
    options.addresses = {"127.0.0.1:0"};
    options.max_watchers = 2;
    auto started = MasterServer::Start(std::move(options));
    ASSERT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
    channel_ = Connect(server_->target());
    inspection_ = v1::InspectionService::NewStub(channel_);
  }

  // A member that has been told so.
  std::unique_ptr<RawStream> Join(const std::string& group, uint32_t rank, uint32_t world_size) {
    auto stream = std::make_unique<RawStream>(Connect(server_->target()));
    v1::WorkerFrame frame = JoinFrame(group, rank, world_size);
    frame.mutable_join()->set_description("a test's worker");
    *frame.add_layers() = BatchNormLayer("bn", 2);
    EXPECT_TRUE(stream->Write(frame));
    EXPECT_TRUE(stream->Read().has_value());
    return stream;
  }

  static v1::WorkerFrame ForwardFrame(uint64_t sequence, double mean) {
    v1::WorkerFrame frame;
    *frame.add_contributions()->mutable_key() = Key("bn", sequence, v1::PHASE_FORWARD);
    v1::Moments* const moments = frame.mutable_contributions(0)->mutable_moments();
    moments->set_count(2);
    for (int c = 0; c < 2; ++c) {
      moments->add_mean(mean + c);
      moments->add_m2(0.0);
    }
    return frame;
  }

  grpc::Status GetLayer(const std::string& layer) {
    grpc::ClientContext context;
    v1::GetLayerRequest request;
    request.set_group("g");
    request.set_layer(layer);
    v1::GetLayerResponse response;
    return inspection_->GetLayer(&context, request, &response);
  }

  v1::GetGroupResponse GetGroup(const std::string& group) {
    grpc::ClientContext context;
    v1::GetGroupRequest request;
    request.set_group(group);
    v1::GetGroupResponse response;
    const grpc::Status status = inspection_->GetGroup(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }

  std::unique_ptr<MasterServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::InspectionService::Stub> inspection_;
};

TEST_F(InspectionTest, ListsGroups) {
  grpc::ClientContext nobody;
  v1::ListGroupsResponse response;
  ASSERT_TRUE(inspection_->ListGroups(&nobody, {}, &response).ok());
  EXPECT_EQ(response.groups_size(), 0);
  const auto a = Join("", 0, 1), b = Join("b", 1, 3);
  grpc::ClientContext context;
  ASSERT_TRUE(inspection_->ListGroups(&context, {}, &response).ok());
  ASSERT_EQ(response.groups_size(), 2);
  EXPECT_EQ(response.groups(0).group(), "b");
  EXPECT_EQ(response.groups(0).world_size(), 3u);
  EXPECT_EQ(response.groups(0).present(), 1u);
  EXPECT_EQ(response.groups(1).job(), "default");
  EXPECT_EQ(response.groups(1).group(), "default");
  EXPECT_EQ(response.groups(1).layers(), 1u);
}

TEST_F(InspectionTest, ShowsMembersAndWaitingRounds) {
  const auto first = Join("g", 0, 3), second = Join("g", 2, 3);
  v1::WorkerFrame frame = ForwardFrame(7, 1.0);
  *frame.add_blocked_on() = frame.contributions(0).key();
  ASSERT_TRUE(second->Write(frame));
  v1::GetGroupResponse group;
  while (group.pending_size() == 0) group = GetGroup("g");
  EXPECT_EQ(group.config().round_timeout().seconds(), 600);
  EXPECT_EQ(group.summary().rounds_in_flight(), 1u);
  ASSERT_EQ(group.members_size(), 3);
  EXPECT_EQ(group.members(0).state(), v1::MEMBER_STATE_PRESENT);
  EXPECT_EQ(group.members(0).description(), "a test's worker");
  EXPECT_EQ(group.members(1).state(), v1::MEMBER_STATE_ABSENT);
  EXPECT_EQ(group.members(2).contributions(), 1u);
  ASSERT_EQ(group.members(2).blocked_on_size(), 1);
  EXPECT_EQ(group.members(2).blocked_on(0).sequence(), 7u);
  EXPECT_EQ(group.pending(0).key().layer(), "bn");
  EXPECT_THAT(group.pending(0).arrived_ranks(), ElementsAre(2u));
  EXPECT_THAT(group.pending(0).missing_ranks(), ElementsAre(0u, 1u));
  first->Cancel();
  while (GetGroup("g").members(0).state() != v1::MEMBER_STATE_LOST) {
  }
}

TEST_F(InspectionTest, ShowsALayersStatistics) {
  const auto worker = Join("g", 0, 1);
  grpc::ClientContext before;
  v1::GetLayerRequest request;
  request.set_group("g");
  request.set_layer("bn");
  v1::GetLayerResponse layer;
  ASSERT_TRUE(inspection_->GetLayer(&before, request, &layer).ok());
  EXPECT_FALSE(layer.has_batch());
  EXPECT_FALSE(layer.summary().has_newest_sequence());
  EXPECT_THAT(layer.running().var(), ElementsAre(1.0, 1.0));
  ASSERT_TRUE(worker->Write(ForwardFrame(4, 3.0)));
  ASSERT_TRUE(worker->ReadResults().has_value());
  grpc::ClientContext after;
  ASSERT_TRUE(inspection_->GetLayer(&after, request, &layer).ok());
  EXPECT_EQ(layer.summary().newest_sequence(), 4u);
  EXPECT_EQ(layer.summary().rounds_completed(), 1u);
  EXPECT_THAT(layer.batch().mean(), ElementsAre(3.0, 4.0));
  EXPECT_EQ(layer.running().updates(), 1u);
  EXPECT_THAT(layer.running().mean(), ElementsAre(3.0, 4.0));  // A cumulative average of one.
  EXPECT_THAT(layer.running().var(), ElementsAre(0.0, 0.0));
  grpc::ClientContext list_context;
  v1::ListLayersRequest list_request;
  list_request.set_group("g");
  v1::ListLayersResponse list;
  ASSERT_TRUE(inspection_->ListLayers(&list_context, list_request, &list).ok());
  ASSERT_EQ(list.layers_size(), 1);
  EXPECT_EQ(list.layers(0).spec().channels(), 2u);
}

TEST_F(InspectionTest, WhatIsNotThereIsNotFound) {
  const auto worker = Join("here", 0, 1);
  const auto expect_not_found = [](const grpc::Status& status, const std::string& reason, const std::string& message) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
    EXPECT_EQ(InfoOf(status).reason(), reason);
    EXPECT_THAT(status.error_message(), HasSubstr(message));
  };
  grpc::ClientContext contexts[4];
  v1::GetGroupRequest group;
  v1::GetGroupResponse group_response;
  group.set_group("gone");
  expect_not_found(inspection_->GetGroup(&contexts[0], group, &group_response), "GROUP_UNKNOWN", "\"here\"");
  v1::GetLayerRequest layer;
  v1::GetLayerResponse layer_response;
  layer.set_group("gone");
  expect_not_found(inspection_->GetLayer(&contexts[1], layer, &layer_response), "GROUP_UNKNOWN", "\"here\"");
  layer.set_group("here");
  layer.set_layer("gone");
  expect_not_found(inspection_->GetLayer(&contexts[2], layer, &layer_response), "LAYER_UNKNOWN", "no layer \"gone\"");
  v1::WatchRoundsRequest watch;
  watch.set_group("gone");
  auto reader = inspection_->WatchRounds(&contexts[3], watch);
  v1::WatchRoundsResponse event;
  EXPECT_FALSE(reader->Read(&event));
  expect_not_found(reader->Finish(), "GROUP_UNKNOWN", "\"here\"");
}

// ---- Watchers -------------------------------------------------------------------------------------------------------

TEST_F(InspectionTest, WatchersSeeRoundsAsTheyEnd) {
  const auto worker = Join("g", 0, 1);
  grpc::ClientContext context;
  v1::WatchRoundsRequest request;
  request.set_group("g");
  auto watcher = inspection_->WatchRounds(&context, request);
  watcher->WaitForInitialMetadata();  // It is being watched from here on.
  ASSERT_TRUE(worker->Write(ForwardFrame(0, 1.0)));
  v1::WorkerFrame bad = ForwardFrame(1, 1.0);
  bad.mutable_contributions(0)->mutable_moments()->set_count(-5);
  ASSERT_TRUE(worker->Write(bad));
  v1::WatchRoundsResponse event;
  ASSERT_TRUE(watcher->Read(&event));
  EXPECT_EQ(event.key().sequence(), 0u);
  EXPECT_EQ(event.status().code(), 0);
  EXPECT_EQ(event.count(), 2);
  EXPECT_EQ(event.contributors(), 1u);
  ASSERT_TRUE(watcher->Read(&event));
  EXPECT_EQ(event.key().sequence(), 1u);
  EXPECT_EQ(InfoOf(event.status()).reason(), "INVALID_CONTRIBUTION");
  context.TryCancel();
  EXPECT_EQ(watcher->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(InspectionTest, AWatcherMayAskForOneLayer) {
  const auto worker = Join("g", 0, 1);
  grpc::ClientContext context;
  v1::WatchRoundsRequest request;
  request.set_group("g");
  request.set_layer("other");
  auto watcher = inspection_->WatchRounds(&context, request);
  watcher->WaitForInitialMetadata();
  v1::WorkerFrame frame = ForwardFrame(0, 1.0);
  *frame.add_layers() = BatchNormLayer("other", 2);
  *frame.add_contributions() = frame.contributions(0);
  frame.mutable_contributions(1)->mutable_key()->set_layer("other");
  ASSERT_TRUE(worker->Write(frame));
  v1::WatchRoundsResponse event;
  ASSERT_TRUE(watcher->Read(&event));
  EXPECT_EQ(event.key().layer(), "other");
}

TEST_F(InspectionTest, WatchersAreLimitedAndEndWithTheirGroup) {
  const auto worker = Join("g", 0, 1);
  v1::WatchRoundsRequest request;
  request.set_group("g");
  grpc::ClientContext contexts[3];
  std::vector<std::unique_ptr<grpc::ClientReader<v1::WatchRoundsResponse>>> watchers;
  for (grpc::ClientContext& context : contexts) {
    watchers.push_back(inspection_->WatchRounds(&context, request));
    watchers.back()->WaitForInitialMetadata();
  }
  v1::WatchRoundsResponse event;
  EXPECT_FALSE(watchers[2]->Read(&event));
  const grpc::Status status = watchers[2]->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("max_watchers = 2"));
  // A newer generation ends the group.
  RawStream next(channel_);
  v1::WorkerFrame frame = JoinFrame("g", 0, 1);
  frame.mutable_join()->set_generation(1);
  ASSERT_TRUE(next.Write(frame));
  for (int i = 0; i < 2; ++i) {
    EXPECT_FALSE(watchers[i]->Read(&event));
    EXPECT_TRUE(watchers[i]->Finish().ok());
  }
  EXPECT_EQ(InfoOf(worker->Finish()).reason(), "GENERATION_SUPERSEDED");
}

TEST_F(InspectionTest, AWatcherThatDoesNotReadLosesEventsAndIsToldHowMany) {
  constexpr uint64_t kRounds = 5000;  // More than the transport and the watcher's queue hold.
  const auto worker = Join("g", 0, 1);
  grpc::ClientContext context;
  v1::WatchRoundsRequest request;
  request.set_group("g");
  auto watcher = inspection_->WatchRounds(&context, request);
  watcher->WaitForInitialMetadata();
  for (uint64_t sequence = 0; sequence < kRounds; sequence += 100) {
    v1::WorkerFrame frame;
    for (uint64_t i = 0; i < 100; ++i) *frame.add_contributions() = ForwardFrame(sequence + i, 1.0).contributions(0);
    ASSERT_TRUE(worker->Write(frame));
    ASSERT_TRUE(worker->ReadResults().has_value());
  }
  // Each event that is read makes room for one more, which tells the loss before it.
  v1::WatchRoundsResponse event;
  uint64_t dropped = 0;
  for (uint64_t seen = 1; dropped == 0; ++seen) {
    ASSERT_TRUE(watcher->Read(&event));
    dropped += event.dropped();
    ASSERT_EQ(event.key().sequence() + 1, seen + dropped);
    ASSERT_TRUE(worker->Write(ForwardFrame(kRounds + seen - 1, 1.0)));
    ASSERT_TRUE(worker->ReadResults().has_value());
  }
  EXPECT_GT(dropped, 0u);
}

// ---- The standard services ------------------------------------------------------------------------------------------

TEST_F(InspectionTest, Health) {
  RawStream check(channel_, "/grpc.health.v1.Health/Check");
  ASSERT_TRUE(check.WriteBytes(""));
  ASSERT_TRUE(check.WritesDone());
  const auto answer = check.ReadBytes();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(*answer, "\x08\x01");  // status: SERVING.
  EXPECT_TRUE(check.Finish().ok());
}

TEST_F(InspectionTest, ReflectionListsEveryService) {
  RawStream reflection(channel_, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo");
  ASSERT_TRUE(reflection.WriteBytes("\x3a\x01*"));  // list_services: "*".
  ASSERT_TRUE(reflection.WritesDone());
  const auto answer = reflection.ReadBytes();
  ASSERT_TRUE(answer.has_value());
  for (const char* service : {"syncbn.v1.StatisticsService", "syncbn.v1.InspectionService", "grpc.health.v1.Health",
                              "grpc.channelz.v1.Channelz", "grpc.reflection.v1alpha.ServerReflection"}) {
    EXPECT_THAT(*answer, HasSubstr(service));
  }
}

TEST_F(InspectionTest, ReflectionDescribesMessagesThatWeBuildOn) {
  for (const std::string symbol : {"syncbn.v1.WorkerFrame", "google.rpc.Status", "grpc.health.v1.HealthCheckRequest"}) {
    RawStream reflection(channel_, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo");
    // file_containing_symbol.
    ASSERT_TRUE(reflection.WriteBytes("\x22" + std::string(1, static_cast<char>(symbol.size())) + symbol));
    ASSERT_TRUE(reflection.WritesDone());
    const auto answer = reflection.ReadBytes();
    ASSERT_TRUE(answer.has_value());
    EXPECT_THAT(*answer, HasSubstr(symbol.substr(symbol.rfind('.') + 1)));
    EXPECT_THAT(*answer, ::testing::Not(HasSubstr("not found"))) << symbol;
  }
}

TEST_F(InspectionTest, ChannelzSeesTheServer) {
  RawStream servers(channel_, "/grpc.channelz.v1.Channelz/GetServers");
  ASSERT_TRUE(servers.WriteBytes(""));
  ASSERT_TRUE(servers.WritesDone());
  const auto answer = servers.ReadBytes();
  ASSERT_TRUE(answer.has_value());
  EXPECT_FALSE(answer->empty());
}

TEST_F(InspectionTest, ALongNameThatIsUnknownIsToldInPart) {
  const auto member = Join("g", 0, 1);
  const grpc::Status status = GetLayer(std::string(100'000, 'x'));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND) << status.error_message();
  EXPECT_EQ(InfoOf(status).reason(), "LAYER_UNKNOWN");
  EXPECT_THAT(status.error_message(), HasSubstr("has no layer \"xxx"));
}

}  // namespace
}  // namespace syncbn::testing
