// The cost of frames: it is known before a frame is parsed, merged or answered, and readers that read are waited
// for.

#include <algorithm>
#include <fstream>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "syncbn/v1/inspection.grpc.pb.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

using ::testing::HasSubstr;

constexpr uint32_t kWidest = 1 << 16;
constexpr size_t kMiB = size_t{1} << 20;

std::unique_ptr<MasterServer> StartServer() {
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  auto started = MasterServer::Start(std::move(options));
  EXPECT_TRUE(started.ok()) << started.status();
  return started.ok() ? *std::move(started) : nullptr;
}

void ExpectError(const grpc::Status& status, grpc::StatusCode code, const std::string& reason,
                 const std::string& message) {
  EXPECT_EQ(status.error_code(), code) << status.error_message();
  EXPECT_EQ(InfoOf(status).reason(), reason);
  EXPECT_THAT(status.error_message(), HasSubstr(message));
}

// A contribution of an empty batch to a forward round, that nothing is awaited of.
void AddEmpty(const std::string& layer, uint64_t sequence, v1::WorkerFrame* frame) {
  v1::Contribution* const contribution = frame->add_contributions();
  *contribution->mutable_key() = Key(layer, sequence, v1::PHASE_FORWARD);
  contribution->mutable_moments()->set_backward_role(v1::BACKWARD_ROLE_NONE);
}

std::string Repeated(const std::string& bytes, size_t times) {
  std::string all;
  all.reserve(bytes.size() * times);
  for (size_t i = 0; i < times; ++i) all += bytes;
  return all;
}

// AddressSanitizer keeps so much of what has been freed, to recognize later uses of it.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kKeptWhenFreed = 256 * kMiB;
#else
constexpr size_t kKeptWhenFreed = 0;
#endif

size_t ResidentBytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    size_t kilobytes = 0;
    if (word == "VmRSS:" && status >> kilobytes) return kilobytes << 10;
  }
  return 0;
}

v1::GroupSummary Summary(const MasterServer& server, const std::string& group) {
  const auto stub = v1::InspectionService::NewStub(Connect(server.target()));
  grpc::ClientContext context;
  v1::GetGroupRequest request;
  request.set_group(group);
  v1::GetGroupResponse response;
  const grpc::Status status = stub->GetGroup(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.summary();
}

// Members of the group that have a stream.
uint32_t Present(const MasterServer& server, const std::string& group) { return Summary(server, group).present(); }

// ---- Before it is parsed --------------------------------------------------------------------------------------------

TEST(FramePriceTest, AFirstFrameIsShort) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  ASSERT_TRUE(stream.WriteBytes(Repeated(std::string("\x12\x00", 2), 3 * kMiB)));
  ExpectError(stream.Finish(), grpc::StatusCode::RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED",
              "max_first_frame_bytes = 4194304");
}

struct Flood {
  const char* name;
  std::string bytes;  // Repeated up to some MiB.
  grpc::StatusCode code;
  const char* reason;
  const char* message;
};

class FloodTest : public ::testing::TestWithParam<Flood> {};

// From a member: a field for each two bytes.
TEST_P(FloodTest, IsRefusedByItsNumber) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 1);
  *join.add_layers() = BatchNormLayer("bn", 1);
  ASSERT_TRUE(stream.Write(join));
  ASSERT_TRUE(stream.Read().has_value());
  const size_t before = ResidentBytes();
  ASSERT_TRUE(stream.WriteBytes(Repeated(GetParam().bytes, 8 * kMiB / GetParam().bytes.size())));
  ExpectError(stream.Finish(), GetParam().code, GetParam().reason, GetParam().message);
  EXPECT_LT(ResidentBytes(), before + 64 * kMiB + kKeptWhenFreed) << "the frame here and there, and little more";
}

std::string Bytes(std::initializer_list<int> bytes) {
  std::string text;
  for (const int byte : bytes) text += static_cast<char>(byte);
  return text;
}

INSTANTIATE_TEST_SUITE_P(
    All, FloodTest,
    ::testing::Values(Flood{"Layers", Bytes({0x12, 0}), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME",
                            "kind 0"},
                      Flood{"GoodLayers", Bytes({0x12, 7, 0x0a, 1, 'x', 0x10, 1, 0x18, 1}),
                            grpc::StatusCode::RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED", "max_layers = 8192"},
                      Flood{"Contributions", Bytes({0x1a, 0}), grpc::StatusCode::RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED",
                            "max_rounds_in_frame = 65536"},
                      Flood{"BlockedOn", Bytes({0x22, 2, 0x18, 1}), grpc::StatusCode::RESOURCE_EXHAUSTED,
                            "LIMIT_EXCEEDED", "max_rounds_in_frame = 65536"},
                      Flood{"LeftRanks", Bytes({0x52, 1, 1}), grpc::StatusCode::RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED",
                            "max_workers = 4096"},
                      Flood{"UnknownNumbers", Bytes({0x78, 0}), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME",
                            "unknown fields"},
                      Flood{"UnknownBytes", Bytes({0x7a, 0}), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME",
                            "unknown fields"},
                      Flood{"Groups", Bytes({0x53, 0x54}), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME",
                            "not a syncbn.v1.WorkerFrame"}),
    [](const auto& info) { return info.param.name; });

// Within one contribution, to a group whose layers are wide enough for it.
TEST(FramePriceTest, FloodsWithinAContribution) {
  const auto server = StartServer();
  for (const std::string& inner : {Bytes({0x50, 0}), Bytes({0x0a, 0}), Bytes({0x12, 0}), Bytes({0x12, 2, 0x50, 0})}) {
    RawStream stream(Connect(server->target()));
    v1::WorkerFrame join = JoinFrame("g", 0, 1);
    *join.add_layers() = SumLayer("v", 1 << 20);
    ASSERT_TRUE(stream.Write(join));
    ASSERT_TRUE(stream.Read().has_value());
    const std::string flood = Repeated(inner, 8 * kMiB / inner.size());
    // contributions (3), of this length as a varint.
    std::string bytes = "\x1a";
    for (size_t length = flood.size(); length != 0; length >>= 7) {
      bytes += static_cast<char>((length & 0x7f) | (length >= 0x80 ? 0x80 : 0));
    }
    ASSERT_TRUE(stream.WriteBytes(bytes + flood));
    ExpectError(stream.Finish(), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME", "a part of the frame has more");
  }
}

TEST(FramePriceTest, AContributionIsAsLongAsTheGroupsLayersAllow) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 1);
  *join.add_layers() = SumLayer("v", 8);
  ASSERT_TRUE(stream.Write(join));
  ASSERT_TRUE(stream.Read().has_value());
  v1::WorkerFrame frame;
  *frame.add_contributions()->mutable_key() = Key("v", 0, v1::PHASE_SUM);
  for (int i = 0; i < 1 << 16; ++i) frame.mutable_contributions(0)->mutable_vector()->add_value(1.0);
  ASSERT_TRUE(stream.Write(frame));
  ExpectError(stream.Finish(), grpc::StatusCode::INVALID_ARGUMENT, "MALFORMED_FRAME", "longer than those");
}

TEST(FramePriceTest, HonestLargeFramesAreTaken) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 1);
  for (int i = 0; i < 8190; ++i) {
    std::string name = "backbone.stages." + std::to_string(i);
    name.resize(120, '.');
    *join.mutable_join()->add_layers() = BatchNormLayer(name, 64);
  }
  *join.mutable_join()->add_layers() = SumLayer("a", 1 << 20);
  *join.mutable_join()->add_layers() = SumLayer("b", 1 << 20);
  ASSERT_TRUE(stream.Write(join));
  ASSERT_TRUE(stream.Read()->has_joined());
  v1::WorkerFrame frame;
  for (const char* name : {"a", "b"}) {
    v1::Contribution* const contribution = frame.add_contributions();
    *contribution->mutable_key() = Key(name, 0, v1::PHASE_SUM);
    for (int i = 0; i < 1 << 20; ++i) contribution->mutable_vector()->add_value(0.5 * i);
  }
  ASSERT_GE(frame.ByteSizeLong(), 16 * kMiB);
  ASSERT_TRUE(stream.Write(frame));
  for (const char* name : {"a", "b"}) {
    const auto answer = stream.ReadResults();
    ASSERT_TRUE(answer.has_value());
    ASSERT_EQ(answer->results_size(), 1);
    EXPECT_EQ(answer->results(0).key().layer(), name);
    ASSERT_EQ(answer->results(0).vector().value_size(), 1 << 20);
    EXPECT_EQ(answer->results(0).vector().value(1'000'000), 500'000.0);
  }
}

// Contributions, layers and promises of one frame, in whatever order they lie, and in several encodings of parts of it.
TEST(FramePriceTest, PartsOfAFrameMayComeInAnyOrder) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  v1::WorkerFrame contribution, layers, rest;
  AddEmpty("bn", 0, &contribution);
  *layers.add_layers() = BatchNormLayer("bn", 3);
  rest = JoinFrame("g", 0, 1);
  AddEmpty("bn", 1, &rest);
  *rest.add_blocked_on() = Key("bn", 1, v1::PHASE_FORWARD);
  ASSERT_TRUE(stream.WriteBytes(contribution.SerializeAsString() + "\x50\x01" + layers.SerializeAsString() +
                                rest.SerializeAsString()));
  ASSERT_TRUE(stream.Read()->has_joined());
  const auto answer = stream.ReadResults();
  ASSERT_TRUE(answer.has_value());
  ASSERT_EQ(answer->results_size(), 2);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(answer->results(i).key().sequence(), static_cast<uint64_t>(i));
    EXPECT_EQ(answer->results(i).moments().mean_size(), 3);
  }
}

uint32_t RoundsInFlight(const MasterServer& server, const std::string& group) {
  return Summary(server, group).rounds_in_flight();
}

// Groups take turns, however many streams of one have frames of many slices: a layer of 65536 channels makes them
// short.
TEST(FramePriceTest, AGroupOfManyStreamsHoldsUpNoOther) {
  constexpr uint32_t kStreams = 24;
  constexpr uint32_t kRounds = 512;
  const auto server = StartServer();
  std::vector<std::unique_ptr<RawStream>> flood;
  const auto join = [&](const std::string& group, uint32_t rank, uint32_t world_size) {
    auto stream = std::make_unique<RawStream>(Connect(server->target()));
    v1::WorkerFrame frame = JoinFrame(group, rank, world_size);
    *frame.add_layers() = BatchNormLayer("wide", kWidest);
    *frame.add_layers() = BatchNormLayer("bn", 1);
    EXPECT_TRUE(stream->Write(frame) && stream->Read().has_value());
    return stream;
  };
  const auto honest = join("honest", 0, 1);
  for (uint32_t rank = 0; rank < kStreams; ++rank) flood.push_back(join("flood", rank, kStreams + 1));
  v1::WorkerFrame frame;
  for (uint32_t i = 0; i < 8192; ++i) AddEmpty("bn", i, &frame);  // All wait for the rank that never comes.
  const std::string bytes = frame.SerializeAsString();
  for (const auto& stream : flood) ASSERT_TRUE(stream->WriteBytes(bytes));
  v1::WorkerFrame honest_frame;
  for (uint32_t i = 0; i < kRounds; ++i) AddEmpty("bn", i, &honest_frame);
  const uint32_t before = RoundsInFlight(*server, "flood");
  ASSERT_TRUE(honest->Write(honest_frame));
  for (uint32_t ended = 0; ended < kRounds;) {
    const auto answer = honest->ReadResults();
    ASSERT_TRUE(answer.has_value());
    ended += answer->results_size();
  }
  // In the order in which the frames came, the flood would have come as far as the honest frame.
  EXPECT_LT(RoundsInFlight(*server, "flood") - before, kRounds / 2);
}

// ---- Before it is answered ------------------------------------------------------------------------------------------

v1::WorkerFrame ManyEmpty(int rounds) {
  v1::WorkerFrame frame;
  for (int i = 0; i < rounds; ++i) AddEmpty("wide", i, &frame);
  return frame;
}

// 14 KB that ask for 900 MiB.
TEST(AnswerPriceTest, WhoDoesNotReadTakesLittleAndStopsNobody) {
  const auto server = StartServer();
  RawStream honest(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("honest", 0, 1);
  *join.add_layers() = BatchNormLayer("bn", 8);
  ASSERT_TRUE(honest.Write(join));
  ASSERT_TRUE(honest.Read().has_value());
  RawStream greedy(Connect(server->target()));
  join = JoinFrame("greedy", 0, 1);
  *join.add_layers() = BatchNormLayer("wide", kWidest);
  ASSERT_TRUE(greedy.Write(join));
  ASSERT_TRUE(greedy.Read().has_value());
  const v1::WorkerFrame bomb = ManyEmpty(900);
  ASSERT_LT(bomb.ByteSizeLong(), 20'000u);
  const size_t before = ResidentBytes();
  ASSERT_TRUE(greedy.Write(bomb));
  size_t greatest = 0;
  // Until it is cut off, having read nothing.
  for (uint64_t sequence = 0; sequence == 0 || Present(*server, "greedy") != 0; ++sequence) {
    v1::WorkerFrame frame;
    AddEmpty("bn", sequence, &frame);
    ASSERT_TRUE(honest.Write(frame));
    ASSERT_TRUE(honest.ReadResults().has_value());
    greatest = std::max(greatest, ResidentBytes());
  }
  EXPECT_LT(greatest, before + 150 * kMiB + kKeptWhenFreed);
  EXPECT_FALSE(greedy.Finish().ok());
}

TEST(AnswerPriceTest, WhoReadsGetsItAll) {
  const auto server = StartServer();
  RawStream stream(Connect(server->target()));
  v1::WorkerFrame frame = JoinFrame("g", 0, 1);
  *frame.add_layers() = BatchNormLayer("wide", kWidest);
  frame.MergeFrom(ManyEmpty(100));
  ASSERT_TRUE(stream.Write(frame));
  for (int results = 0; results < 100;) {
    std::string bytes;
    const auto answer = stream.ReadResults(&bytes);
    ASSERT_TRUE(answer.has_value());
    EXPECT_LT(bytes.size(), 2 * kMiB + 4096) << "a frame of results is bounded";
    for (const v1::RoundResult& result : answer->results()) {
      EXPECT_EQ(result.key().sequence(), static_cast<uint64_t>(results++));
      EXPECT_EQ(result.moments().mean_size(), static_cast<int>(kWidest));
    }
  }
}

// 64 MiB of results for each member come due by one frame of one of them.
TEST(AnswerPriceTest, GoodReadersAreNotCutOffWhereManyRoundsEndAtOnce) {
  constexpr int kRounds = 96;
  const auto server = StartServer();
  RawStream first(Connect(server->target())), last(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 2);
  *join.add_layers() = BatchNormLayer("wide", kWidest);
  ASSERT_TRUE(first.Write(join));
  ASSERT_TRUE(first.Read().has_value());
  ASSERT_TRUE(first.Write(ManyEmpty(kRounds)));
  ASSERT_TRUE(last.Write(JoinFrame("g", 1, 2)));
  ASSERT_TRUE(last.Read().has_value());
  ASSERT_TRUE(last.Write(ManyEmpty(kRounds)));
  const auto read = [](RawStream* stream) {
    int results = 0;
    while (results < kRounds) {
      const auto answer = stream->ReadResults();
      if (!answer.has_value()) return results;
      results += answer->results_size();
    }
    return results;
  };
  int of_first = 0;
  std::thread thread([&] { of_first = read(&first); });
  EXPECT_EQ(read(&last), kRounds);
  thread.join();
  EXPECT_EQ(of_first, kRounds);
}

// The same, ended by a leave.
TEST(AnswerPriceTest, NorWhereALeaveEndsThem) {
  constexpr int kRounds = 96;
  const auto server = StartServer();
  RawStream stays(Connect(server->target())), leaves(Connect(server->target()));
  v1::WorkerFrame join = JoinFrame("g", 0, 2);
  *join.add_layers() = BatchNormLayer("wide", kWidest);
  ASSERT_TRUE(stays.Write(join));
  ASSERT_TRUE(stays.Read().has_value());
  ASSERT_TRUE(stays.Write(ManyEmpty(kRounds)));
  v1::WorkerFrame leave = JoinFrame("g", 1, 2);
  leave.mutable_leave();
  ASSERT_TRUE(leaves.Write(leave));
  for (int results = 0; results < kRounds;) {
    const auto answer = stays.ReadResults();
    ASSERT_TRUE(answer.has_value());
    for (const v1::RoundResult& result : answer->results()) {
      EXPECT_FALSE(result.has_error()) << result.error().message();
      ++results;
    }
  }
}

}  // namespace
}  // namespace syncbn::testing
