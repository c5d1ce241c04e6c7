// The answer does not depend on who comes first: not one bit of it.

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/master_server.h"
#include "syncbn/v1/inspection.grpc.pb.h"
#include "tests/server/rpc/raw_stream.h"

namespace syncbn::testing {
namespace {

constexpr uint32_t kWorkers = 4;
constexpr uint32_t kChannels = 5;
constexpr unsigned kSeed = 20240711;

struct Part {
  int64_t count = 0;
  std::vector<double> mean, m2, sum_dy, sum_dy_xmu, vector;
};

// Magnitudes that differ by a lot, so that any other order of additions would show.
std::vector<Part> MakeParts() {
  std::mt19937_64 random(kSeed);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> exponent(-12, 12);
  const auto draw = [&] { return normal(random) * std::pow(10.0, exponent(random)); };
  std::vector<Part> parts(kWorkers);
  for (uint32_t rank = 0; rank < kWorkers; ++rank) {
    parts[rank].count = 1 + 7 * rank;
    for (uint32_t c = 0; c < kChannels; ++c) {
      parts[rank].mean.push_back(draw());
      parts[rank].m2.push_back(std::abs(draw()));
      parts[rank].sum_dy.push_back(draw());
      parts[rank].sum_dy_xmu.push_back(draw());
      parts[rank].vector.push_back(draw());
    }
  }
  return parts;
}

void Assign(const std::vector<double>& values, google::protobuf::RepeatedField<double>* field) {
  field->Add(values.begin(), values.end());
}

// A forward round and a sum in one frame.
v1::WorkerFrame FirstFrame(const Part& part) {
  v1::WorkerFrame frame;
  v1::Contribution* const forward = frame.add_contributions();
  *forward->mutable_key() = Key("bn", 0, v1::PHASE_FORWARD);
  forward->mutable_moments()->set_count(part.count);
  Assign(part.mean, forward->mutable_moments()->mutable_mean());
  Assign(part.m2, forward->mutable_moments()->mutable_m2());
  v1::Contribution* const sum = frame.add_contributions();
  *sum->mutable_key() = Key("loss", 0, v1::PHASE_SUM);
  Assign(part.vector, sum->mutable_vector()->mutable_value());
  return frame;
}

v1::WorkerFrame SecondFrame(const Part& part) {
  v1::WorkerFrame frame;
  v1::Contribution* const backward = frame.add_contributions();
  *backward->mutable_key() = Key("bn", 0, v1::PHASE_BACKWARD);
  Assign(part.sum_dy, backward->mutable_gradient_sums()->mutable_sum_dy());
  Assign(part.sum_dy_xmu, backward->mutable_gradient_sums()->mutable_sum_dy_xmu());
  return frame;
}

// The merged moments over all parts, in long double and from the definition of a variance over groups.
void ExpectMerged(const std::vector<Part>& parts, const v1::MergedMoments& merged) {
  int64_t count = 0;
  for (const Part& part : parts) count += part.count;
  ASSERT_EQ(merged.count(), count);
  ASSERT_EQ(merged.mean_size(), static_cast<int>(kChannels));
  for (uint32_t c = 0; c < kChannels; ++c) {
    long double mean = 0, magnitude = 0, m2 = 0;
    for (const Part& part : parts) {
      mean += static_cast<long double>(part.count) * part.mean[c] / count;
      magnitude += std::abs(static_cast<long double>(part.count) * part.mean[c] / count);
    }
    for (const Part& part : parts) {
      const long double distance = part.mean[c] - mean;
      m2 += part.m2[c] + part.count * distance * distance;
    }
    EXPECT_NEAR(merged.mean(c), static_cast<double>(mean), static_cast<double>(magnitude) * 1e-14);
    EXPECT_NEAR(merged.var(c), static_cast<double>(m2 / count), static_cast<double>(m2 / count) * 1e-13);
  }
}

class ArrivalOrderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    RecordProperty("seed", kSeed);
    MasterServer::Options options;
    options.addresses = {"127.0.0.1:0"};
    auto started = MasterServer::Start(options);
    ASSERT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
    inspection_ = v1::InspectionService::NewStub(Connect(server_->target()));
  }

  // Until the master has taken the contributions of this many ranks to every round in flight.
  void AwaitArrived(const std::string& group, int arrived) {
    while (true) {
      grpc::ClientContext context;
      v1::GetGroupRequest request;
      request.set_group(group);
      v1::GetGroupResponse response;
      const grpc::Status status = inspection_->GetGroup(&context, request, &response);
      ASSERT_TRUE(status.ok() || status.error_code() == grpc::StatusCode::NOT_FOUND) << status.error_message();
      if (response.pending_size() == 0) continue;
      const auto complete = [arrived](const auto& round) { return round.arrived_ranks_size() == arrived; };
      if (std::all_of(response.pending().begin(), response.pending().end(), complete)) return;
    }
  }

  // Everything that each rank received as results, as it came.
  std::array<std::string, kWorkers> Play(const std::string& group, const std::vector<uint32_t>& order,
                                         const std::vector<Part>& parts) {
    std::vector<std::unique_ptr<RawStream>> streams;
    for (uint32_t rank = 0; rank < kWorkers; ++rank) {
      streams.push_back(std::make_unique<RawStream>(Connect(server_->target())));
      v1::WorkerFrame join = JoinFrame(group, rank, kWorkers);
      *join.add_layers() = BatchNormLayer("bn", kChannels);
      *join.add_layers() = SumLayer("loss", kChannels);
      EXPECT_TRUE(streams.back()->Write(join));
    }
    std::array<std::string, kWorkers> received;
    for (const auto& frame_of : {FirstFrame, SecondFrame}) {
      for (uint32_t i = 0; i < kWorkers; ++i) {
        EXPECT_TRUE(streams[order[i]]->Write(frame_of(parts[order[i]])));
        if (i + 1 < kWorkers) AwaitArrived(group, static_cast<int>(i) + 1);
      }
      for (uint32_t rank = 0; rank < kWorkers; ++rank) {
        std::string bytes;
        const auto frame = streams[rank]->ReadResults(&bytes);
        EXPECT_TRUE(frame.has_value());
        if (frame->results(0).has_moments()) ExpectMerged(parts, frame->results(0).moments());
        received[rank] += bytes;
      }
    }
    return received;
  }

  std::unique_ptr<MasterServer> server_;
  std::unique_ptr<v1::InspectionService::Stub> inspection_;
};

TEST_F(ArrivalOrderTest, All24OrdersGiveByteIdenticalFrames) {
  const std::vector<Part> parts = MakeParts();
  std::vector<uint32_t> order(kWorkers);
  std::iota(order.begin(), order.end(), 0);
  std::string reference;
  int orders = 0;
  do {
    const std::string group = ::testing::PrintToString(order);
    for (const std::string& received : Play(group, order, parts)) {
      if (reference.empty()) reference = received;
      ASSERT_FALSE(received.empty());
      EXPECT_EQ(received, reference) << "arrival order " << group;
    }
    ++orders;
  } while (std::next_permutation(order.begin(), order.end()));
  EXPECT_EQ(orders, 24);
}

TEST_F(ArrivalOrderTest, AReplayIsByteIdenticalToo) {
  const std::vector<Part> parts = MakeParts();
  RawStream stream(Connect(server_->target()));
  v1::WorkerFrame frame = FirstFrame(parts[0]);
  *frame.mutable_join() = JoinFrame("alone", 0, 1).join();
  *frame.add_layers() = BatchNormLayer("bn", kChannels);
  *frame.add_layers() = SumLayer("loss", kChannels);
  ASSERT_TRUE(stream.Write(frame));
  std::string first, second;
  ASSERT_TRUE(stream.ReadResults(&first).has_value());
  frame.clear_join();
  ASSERT_TRUE(stream.Write(frame));
  ASSERT_TRUE(stream.ReadResults(&second).has_value());
  EXPECT_EQ(first, second);
}

}  // namespace
}  // namespace syncbn::testing
