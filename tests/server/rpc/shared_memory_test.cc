// Workers of other make that share memory with the master, and break its rules.

#include <stdlib.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "plumbing/doorbell.h"
#include "plumbing/shared_file.h"
#include "plumbing/shared_ring.h"
#include "server/master_server.h"
#include "syncbn/v1/statistics.grpc.pb.h"
#include "tests/server/rpc/raw_stream.h"
#include "tests/testing/seed.h"

namespace syncbn::testing {
namespace {

using ::testing::HasSubstr;

// A worker that offers memory, alone in its group.
class Sharer {
 public:
  // Joins. `name`: of the segment that is offered, whether it exists or not.
  Sharer(const std::string& target, const std::string& group, const std::string& offer)
      : stub_(v1::StatisticsService::NewStub(Connect(target))) {
    context_.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    context_.AddMetadata(kSharedMemoryHeader, offer);
    stream_ = stub_->Synchronize(&context_);
    v1::WorkerFrame frame = JoinFrame(group, 0, 1);
    *frame.add_layers() = SumLayer("v", 2);
    EXPECT_TRUE(stream_->Write(frame));
    v1::MasterFrame joined;
    EXPECT_TRUE(stream_->Read(&joined));
    EXPECT_TRUE(joined.has_joined());
    const auto& headers = context_.GetServerInitialMetadata();
    const auto found = headers.find(kSharedMemoryHeader);
    if (found != headers.end()) answer_.assign(found->second.data(), found->second.size());
  }
  ~Sharer() {
    context_.TryCancel();
    if (!finished_) Finish();
  }

  // The master's answer to the offer; empty if there was none.
  const std::string& answer() const { return answer_; }
  grpc::Status Finish() {
    finished_ = true;
    v1::MasterFrame frame;
    while (stream_->Read(&frame)) {
    }
    return stream_->Finish();
  }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<v1::StatisticsService::Stub> stub_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerFrame, v1::MasterFrame>> stream_;
  std::string answer_;
  bool finished_ = false;
};

class SharedMemoryTest : public ::testing::Test {
 protected:
  SharedMemoryTest() {
    std::string pattern = absl::StrCat(::testing::TempDir(), "/memoryXXXXXX");
    directory_ = mkdtemp(pattern.data());
    MasterServer::Options options;
    options.addresses = {"127.0.0.1:0"};
    options.shared_memory_dir = directory_;
    auto started = MasterServer::Start(std::move(options));
    EXPECT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
  }
  ~SharedMemoryTest() override {
    server_.reset();
    EXPECT_EQ(rmdir(directory_.c_str()), 0) << "something was left behind";
  }

  std::string directory_;
  std::unique_ptr<MasterServer> server_;
};

// A segment, and a worker that has offered it.
struct Shared {
  Shared(const std::string& directory, const std::string& target, const std::string& group)
      : file(SharedFile::Create(directory, name, sizeof(SegmentLayout), MemorySharing::kSameUser).value()),
        layout(reinterpret_cast<SegmentLayout*>(file.data())),
        worker(target, group, name.ToString()),
        bell_file(SharedFile::Open(directory, SharedName::Parse(worker.answer()).value(), sizeof(Doorbell),
                                   MemorySharing::kSameUser)
                      .value()) {}

  Doorbell& bell() { return *reinterpret_cast<Doorbell*>(bell_file.data()); }
  // Sends bytes as a worker should.
  void Send(const std::string& frame) {
    EXPECT_EQ(writer.Send({frame}), RingProgress::kDone);
    bell().Ring();
  }
  // Waits for the next frame as a worker should.
  std::string Receive() {
    while (true) {
      const uint32_t seen = layout->worker_bell.rings();
      const RingProgress progress = reader.Receive();
      EXPECT_NE(progress, RingProgress::kBroken) << reader.fault();
      if (progress != RingProgress::kWaits) return reader.frame();
      layout->worker_bell.Sleep(seen, std::chrono::seconds(60));
    }
  }

  const SharedName name = SharedName::Draw();
  SharedFile file;
  SegmentLayout* const layout;
  Sharer worker;
  SharedFile bell_file;
  RingWriter writer{&layout->to_master, layout->bytes_to_master};
  RingReader reader{&layout->to_worker, layout->bytes_to_worker, size_t{1} << 24};
};

std::string SumFrame(uint64_t sequence) {
  v1::WorkerFrame frame;
  v1::Contribution* const contribution = frame.add_contributions();
  *contribution->mutable_key() = Key("v", sequence, v1::PHASE_SUM);
  for (const double value : {1.0, 2.0}) contribution->mutable_vector()->add_value(value);
  return frame.SerializeAsString();
}

// A round of a worker that keeps the rules.
void ExpectRound(Shared& shared, uint64_t sequence) {
  shared.Send(SumFrame(sequence));
  v1::MasterFrame frame;
  do {
    ASSERT_TRUE(frame.ParseFromString(shared.Receive()));
  } while (frame.results_size() == 0);
  EXPECT_EQ(frame.results(0).key().sequence(), sequence);
  EXPECT_THAT(frame.results(0).vector().value(), ::testing::ElementsAre(1.0, 2.0));
}

void ExpectMalformed(const grpc::Status& status, const std::string& text) {
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
  EXPECT_EQ(InfoOf(status).reason(), "MALFORMED_FRAME");
  EXPECT_THAT(status.error_message(), HasSubstr(text));
}

TEST_F(SharedMemoryTest, AWorkerThatKeepsTheRulesIsServed) {
  Shared shared(directory_, server_->target(), "g");
  EXPECT_EQ(shared.layout->taken, 1U);
  for (uint64_t sequence = 0; sequence < 10; ++sequence) ExpectRound(shared, sequence);
}

TEST_F(SharedMemoryTest, OffersThatCannotBeTakenAreNotAnswered) {
  for (const std::string& offer : {std::string("nonsense"), SharedName::Draw().ToString(),
                                   absl::StrCat("1 syncbn-../../../etc/passwd ", std::string(32, '0'))}) {
    EXPECT_EQ(Sharer(server_->target(), offer, offer).answer(), "") << offer;
  }
}

TEST_F(SharedMemoryTest, ACountOfWrittenBytesBeyondTheRingEndsTheStream) {
  Shared shared(directory_, server_->target(), "g");
  shared.layout->to_master.written = uint64_t{1} << 50;
  shared.bell().Ring();
  ExpectMalformed(shared.worker.Finish(), absl::StrCat(uint64_t{1} << 50));
}

TEST_F(SharedMemoryTest, ACountOfReadBytesBeyondTheWrittenEndsTheStream) {
  Shared shared(directory_, server_->target(), "g");
  shared.layout->to_worker.read = uint64_t{1} << 50;
  shared.Send(SumFrame(0));
  ExpectMalformed(shared.worker.Finish(), "count of read bytes");
}

TEST_F(SharedMemoryTest, AFrameBeyondTheLimitEndsTheStream) {
  Shared shared(directory_, server_->target(), "g");
  const uint32_t length = (uint32_t{64} << 20) + 1;
  std::memcpy(shared.layout->bytes_to_master, &length, sizeof(length));
  shared.layout->to_master.written = sizeof(length);
  shared.bell().Ring();
  ExpectMalformed(shared.worker.Finish(), absl::StrCat(length));
}

TEST_F(SharedMemoryTest, BytesThatAreNoFrameEndTheStream) {
  Shared shared(directory_, server_->target(), "g");
  shared.Send("\xff\xff\xff");
  ExpectMalformed(shared.worker.Finish(), "not a syncbn.v1.WorkerFrame");
}

TEST_F(SharedMemoryTest, ASegmentOfRandomBytesHarmsNobodyElse) {
  std::mt19937 random(Seed());
  Shared honest(directory_, server_->target(), "honest");
  for (uint64_t i = 0; i < 20; ++i) {
    Shared hostile(directory_, server_->target(), absl::StrCat("hostile", i));
    auto* const bytes = reinterpret_cast<unsigned char*>(hostile.layout);
    const size_t begin = random() % 600, end = begin + random() % (sizeof(SegmentLayout) - begin);
    for (size_t place = begin; place < end; ++place) bytes[place] = static_cast<unsigned char>(random());
    hostile.bell().Ring();
    ExpectRound(honest, i);
  }
}

}  // namespace
}  // namespace syncbn::testing
