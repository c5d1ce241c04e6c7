// The lines of a master's log about its groups.

#include <unistd.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "tests/server/rpc/log_collector.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

class EventLogTest : public ::testing::Test {
 protected:
  void Start(core::Limits limits = core::Limits(), const std::string& address = "127.0.0.1:0") {
    MasterServer::Options options;
    options.addresses = {address};
    options.limits = limits;
    auto server = MasterServer::Start(std::move(options));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  std::unique_ptr<RawStream> Join(uint32_t rank, uint32_t world_size) {
    auto stream = std::make_unique<RawStream>(Connect(server_->target()));
    v1::WorkerFrame frame = JoinFrame("g", rank, world_size);
    *frame.add_layers() = SumLayer("loss", 1);
    EXPECT_TRUE(stream->Write(frame));
    EXPECT_TRUE(stream->Read().has_value());
    return stream;
  }

  static v1::WorkerFrame Sum(uint64_t sequence, int elements) {
    v1::WorkerFrame frame;
    *frame.add_contributions()->mutable_key() = Key("loss", sequence, v1::PHASE_SUM);
    for (int i = 0; i < elements; ++i) frame.mutable_contributions(0)->mutable_vector()->add_value(1.0);
    return frame;
  }

  LogCollector log_;
  std::unique_ptr<MasterServer> server_;
};

TEST_F(EventLogTest, ALateRoundNamesWhomItWaitsFor) {
  core::Limits limits;
  limits.late_round_after = absl::Milliseconds(20);
  Start(limits);
  const auto first = Join(0, 3), second = Join(1, 3), third = Join(2, 3);
  ASSERT_TRUE(first->Write(Sum(7, 1)));
  EXPECT_TRUE(log_.Sees("layer \"loss\", sum 7 has waited for"));
  EXPECT_TRUE(log_.Sees("for ranks 1, 2"));
}

TEST_F(EventLogTest, AWorkerOnAUnixSocketIsSaidToBeThere) {
  Start(core::Limits(), absl::StrCat("unix-abstract:syncbn-event-log-", getpid()));
  const auto worker = Join(0, 1);
  EXPECT_TRUE(log_.Sees("has joined from a unix socket")) << log_.Text();
}

TEST_F(EventLogTest, RoundsThatFailAreToldAtABoundedRate) {
  Start();
  const auto first = Join(0, 2);
  auto second = Join(1, 2);
  for (uint64_t sequence = 0; sequence < 50; ++sequence) ASSERT_TRUE(first->Write(Sum(sequence, 1)));
  second.reset();  // Its rounds fail, all of them.
  for (int failed = 0; failed < 50;) {
    const auto frame = first->ReadResults();
    ASSERT_TRUE(frame.has_value());
    failed += frame->results_size();
  }
  EXPECT_TRUE(log_.Sees("a round failed: job ")) << log_.Text();
  for (const char* text : {"group \"g\"", "layer \"loss\", sum ", ": WORKER_LOST: "}) {
    EXPECT_GT(log_.Count(text), 0u) << text << log_.Text();
  }
  EXPECT_LE(log_.Count("a round failed"), 7u);
}

TEST_F(EventLogTest, ABadFrameIsToldInOneLine) {
  Start();
  RawStream stream(Connect(server_->target()));
  ASSERT_TRUE(stream.WriteBytes("\xff\xff\xff"));
  EXPECT_FALSE(stream.Finish().ok());
  EXPECT_TRUE(log_.Sees("closed a worker's stream from 127.0.0.1:")) << log_.Text();
  EXPECT_GT(log_.Count(": MALFORMED_FRAME"), 0u) << log_.Text();
}

}  // namespace
}  // namespace syncbn::testing
