// Workers that look for their master, that are refused, and whose master lies.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "plumbing/log.h"
#include "tests/client/cc/dns_server.h"
#include "tests/client/cc/fake_master.h"
#include "tests/client/cc/worker_group.h"

namespace syncbn::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// The warnings since it was made.
class Warnings {
 public:
  Warnings() {
    SetLogSink([this](LogLevel level, absl::string_view line) {
      const absl::MutexLock lock(&mutex_);
      if (level >= LogLevel::kWarning) lines_.emplace_back(line);
    });
  }
  ~Warnings() { SetLogSink(nullptr); }

  std::vector<std::string> lines() {
    const absl::MutexLock lock(&mutex_);
    return lines_;
  }

 private:
  absl::Mutex mutex_;
  std::vector<std::string> lines_;
};

// An address where nothing listens: the port was given and is free again.
std::string DeadTarget() { return StartMaster()->target(); }

Worker::Options Patient(const std::string& target) {
  Worker::Options options = WorkerOptions(target, 0, 1);
  options.join_timeout = absl::Minutes(2);
  return options;
}

void ExpectSum(Worker& worker, double value) {
  const auto sum = Sum(worker, "v", {value});
  ASSERT_TRUE(sum.ok()) << sum.status();
  EXPECT_THAT(*sum, ElementsAre(value));
}

// ---- Targets

TEST(TargetTest, SeveralAreTriedInTurn) {
  const auto master = StartMaster();
  const auto worker = JoinOrDie(Patient(absl::StrCat(DeadTarget(), ", unix:/nowhere/syncbn,", master->target())));
  ASSERT_NE(worker, nullptr);
  ExpectSum(*worker, 1.0);
}

TEST(TargetTest, AMasterThatComesBackUnderAnotherTargetIsFound) {
  const std::string later = DeadTarget();
  auto master = StartMaster();
  const auto worker = JoinOrDie(Patient(absl::StrCat(master->target(), ",", later)));
  ASSERT_NE(worker, nullptr);
  ExpectSum(*worker, 1.0);
  master.reset();
  MasterServer::Options options;
  options.addresses = {later};
  auto moved = MasterServer::Start(std::move(options));
  ASSERT_TRUE(moved.ok()) << moved.status();
  ExpectSum(*worker, 2.0);
}

TEST(TargetTest, AFunctionIsAskedAtEachAttempt) {
  auto master = StartMaster();
  absl::Mutex mutex;
  std::string target = master->target();
  Worker::Options options = Patient("");
  std::atomic<int> asked{0};
  options.find_target = [&]() -> absl::StatusOr<std::string> {
    if (++asked == 1) return absl::UnavailableError("nobody knows yet");
    const absl::MutexLock lock(&mutex);
    return target;
  };
  const auto worker = JoinOrDie(std::move(options));
  ASSERT_NE(worker, nullptr);
  ExpectSum(*worker, 1.0);
  EXPECT_EQ(asked, 2);
  auto moved = StartMaster();
  {
    const absl::MutexLock lock(&mutex);
    target = moved->target();
  }
  master.reset();
  ExpectSum(*worker, 2.0);
  EXPECT_GE(asked, 3);
}

TEST(TargetTest, AFunctionThatFailsIsQuoted) {
  Worker::Options options = WorkerOptions("", 0, 1);
  options.join_timeout = absl::Milliseconds(50);
  options.find_target = [] { return absl::NotFoundError("no such service"); };
  const absl::Status status = Worker::Join(std::move(options)).status();
  EXPECT_EQ(DetailsOf(status).reason, "UNREACHABLE") << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("no such service"));
}

TEST(TargetTest, AFunctionThatKnowsNoTargetYetIsAskedAgain) {
  const auto master = StartMaster();
  Worker::Options options = WorkerOptions("", 0, 1);
  int asked = 0;
  options.find_target = [&]() -> std::string { return ++asked < 3 ? "" : master->target(); };
  const auto worker = JoinOrDie(std::move(options));
  ExpectSum(*worker, 1.0);
  EXPECT_EQ(asked, 3);

  options = WorkerOptions("", 0, 1);
  options.join_timeout = absl::Milliseconds(50);
  options.find_target = [] { return std::string(); };
  const absl::Status status = Worker::Join(std::move(options)).status();
  EXPECT_EQ(DetailsOf(status).reason, "UNREACHABLE") << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("a worker needs the target of its master"));
}

TEST(TargetTest, AListWithoutAMeaningIsRefused) {
  for (const char* const list : {"", " ", ",", "127.0.0.1:1,,127.0.0.1:2", "127.0.0.1:1,", "unix:", "unix-abstract:"}) {
    EXPECT_EQ(Worker::Join(WorkerOptions(list, 0, 1)).status().code(), absl::StatusCode::kInvalidArgument) << list;
  }
}

TEST(TargetTest, ANameIsLookedUpAtEachAttempt) {
  DnsServer dns;
  dns.Answer(2);
  MasterServer::Options options;
  options.addresses = {"127.0.0.2:0"};
  auto master = MasterServer::Start(options);
  ASSERT_TRUE(master.ok()) << master.status();
  const int port = (*master)->port();
  const auto worker = JoinOrDie(Patient(absl::StrCat("dns://127.0.0.1:", dns.port(), "/master.test:", port)));
  ASSERT_NE(worker, nullptr);
  ExpectSum(*worker, 1.0);
  master->reset();
  std::thread waiting([&] { ExpectSum(*worker, 2.0); });
  options.addresses = {absl::StrCat("127.0.0.3:", port)};
  const auto moved = MasterServer::Start(options);
  EXPECT_TRUE(moved.ok()) << moved.status();
  dns.Answer(3);
  waiting.join();
}

TEST(TargetTest, AProxyForTheWebIsNoneForAWorker) {
  const auto master = StartMaster();
  for (const char* const name : {"http_proxy", "https_proxy", "grpc_proxy"}) setenv(name, "http://127.0.0.1:1", 1);
  Worker::Options options = WorkerOptions(master->target(), 0, 1);
  const auto worker = JoinOrDie(std::move(options));
  for (const char* const name : {"http_proxy", "https_proxy", "grpc_proxy"}) unsetenv(name);
  ASSERT_NE(worker, nullptr);
  ExpectSum(*worker, 1.0);
}

// ---- Refusals

grpc::Status RankTaken() {
  return CallError(grpc::StatusCode::ALREADY_EXISTS, "rank 0 is held by \"trainer host=node7 pid=4711\"", "RANK_TAKEN",
                   "0");
}

TEST(RefusalTest, ARankThatIsTakenIsWaitedFor) {
  std::atomic<int> attempts{0};
  FakeMaster master([&](FakeStream* stream) {
    if (++attempts <= 3) return RankTaken();
    v1::WorkerFrame frame;
    if (Welcome(stream)) stream->Read(&frame);
    return grpc::Status::OK;
  });
  Warnings warnings;
  const auto worker = JoinOrDie(Patient(master.target()));
  EXPECT_NE(worker, nullptr);
  EXPECT_EQ(attempts, 4);
  EXPECT_THAT(warnings.lines(),
              ElementsAre(AllOf(HasSubstr("rank 0"), HasSubstr("host=node7 pid=4711"), HasSubstr("2m"))));
}

TEST(RefusalTest, ARankThatStaysTakenIsToldInTheEnd) {
  FakeMaster master([](FakeStream*) { return RankTaken(); });
  Warnings warnings;
  Worker::Options options = WorkerOptions(master.target(), 0, 1);
  options.join_timeout = absl::Seconds(2);
  const absl::Status status = Worker::Join(std::move(options)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  EXPECT_EQ(DetailsOf(status).reason, "RANK_TAKEN");
  EXPECT_THAT(DetailsOf(status).ranks, ElementsAre(0));
  EXPECT_THAT(std::string(status.message()), HasSubstr("pid=4711"));
  EXPECT_THAT(warnings.lines(), SizeIs(1));
}

TEST(RefusalTest, ARankIsTakenOverWhenItsHolderGoes) {
  const auto master = StartMaster();
  Worker::Options options = Patient(master->target());
  options.description = "trainer host=node7 pid=4711";
  auto holder = JoinOrDie(options);
  ASSERT_NE(holder, nullptr);
  absl::Notification warned;
  SetLogSink([&](LogLevel level, absl::string_view line) {
    if (level != LogLevel::kWarning || warned.HasBeenNotified()) return;
    // The master is in this process, and its own log comes here too.
    if (absl::StartsWith(line, "a round is late")) return;
    EXPECT_THAT(std::string(line), AllOf(HasSubstr("rank 0"), HasSubstr("host=node7 pid=4711")));
    warned.Notify();
  });
  std::thread successor([&] {
    const auto worker = JoinOrDie(Patient(master->target()));
    ASSERT_NE(worker, nullptr);
    ExpectSum(*worker, 3.0);
  });
  warned.WaitForNotification();
  ExpectSum(*holder, 1.0);  // Undisturbed.
  holder.reset();
  successor.join();
  SetLogSink(nullptr);
}

// The code of each status, as what stands between may give it, has no meaning of ours.
class StatusWithoutDetailsTest : public ::testing::TestWithParam<int> {};

TEST_P(StatusWithoutDetailsTest, AJoinedWorkerComesBack) {
  std::atomic<int> streams{0};
  FakeMaster master([&](FakeStream* stream) {
    const bool first = ++streams == 1;
    v1::WorkerFrame frame;
    if (!Welcome(stream) || !AwaitContribution(stream, &frame)) return grpc::Status::OK;
    if (first) return grpc::Status(static_cast<grpc::StatusCode>(GetParam()), "something between");
    v1::MasterFrame answer;
    *answer.add_results()->mutable_key() = frame.contributions(0).key();
    answer.mutable_results(0)->mutable_vector()->add_value(5.0);
    stream->Write(answer);
    stream->Read(&frame);
    return grpc::Status::OK;
  });
  const auto worker = JoinOrDie(Patient(master.target()));
  ASSERT_NE(worker, nullptr);
  const auto sum = Sum(*worker, "v", {1.0});
  ASSERT_TRUE(sum.ok()) << sum.status();
  EXPECT_THAT(*sum, ElementsAre(5.0));
  EXPECT_EQ(streams, 2);
}

INSTANTIATE_TEST_SUITE_P(Codes, StatusWithoutDetailsTest, ::testing::Range(0, 17));

TEST(RefusalTest, AServerThatIsNoMasterIsToldAtOnce) {
  FakeMaster master([](FakeStream*) { return grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "no such method"); });
  EXPECT_EQ(Worker::Join(Patient(master.target())).status().code(), absl::StatusCode::kUnimplemented);
}

// ---- What the master tells people

TEST(LateRoundTest, AWarningNamesTheLayerAndTheRanks) {
  FakeMaster master([](FakeStream* stream) {
    v1::WorkerFrame frame;
    if (!Welcome(stream) || !AwaitContribution(stream, &frame)) return grpc::Status::OK;
    v1::MasterFrame late;
    for (const char* const layer : {"stem.bn", "head.bn"}) {
      v1::LateRound* const round = late.add_late_rounds();
      round->mutable_key()->set_layer(layer);
      round->mutable_key()->set_sequence(7);
      round->mutable_age()->set_seconds(10);
      round->mutable_age()->set_nanos(1000);
      round->add_missing_ranks(1);
      round->add_missing_ranks(3);
      round->set_missing(5);
    }
    stream->Write(late);
    v1::MasterFrame answer;
    *answer.add_results()->mutable_key() = frame.contributions(0).key();
    answer.mutable_results(0)->mutable_vector()->add_value(5.0);
    stream->Write(answer);
    stream->Read(&frame);
    return grpc::Status::OK;
  });
  Warnings warnings;
  const auto worker = JoinOrDie(Patient(master.target()));
  const auto sum = Sum(*worker, "v", {1.0});
  ASSERT_TRUE(sum.ok()) << sum.status();
  EXPECT_THAT(
      warnings.lines(),
      ElementsAre("round 7 of layer \"stem.bn\" has waited 10s for ranks 1, 3 and 3 more; rounds that wait as well: 1; "
                  "it goes on until round_timeout (1m)"));
}

TEST(LateRoundTest, AMasterThatWaitsSaysForWhom) {
  MasterServer::Options options;
  options.addresses = {"127.0.0.1:0"};
  options.limits.late_round_after = absl::Milliseconds(10);
  const auto master = MasterServer::Start(std::move(options));
  ASSERT_TRUE(master.ok()) << master.status();
  const auto workers = JoinAll((*master)->target(), 3);
  absl::Notification warned;
  SetLogSink([&](LogLevel level, absl::string_view line) {
    if (level != LogLevel::kWarning || warned.HasBeenNotified()) return;
    // The master is in this process, and its own log comes here too.
    if (absl::StartsWith(line, "a round is late")) return;
    EXPECT_THAT(std::string(line), AllOf(HasSubstr("round 0 of layer \"v\""), HasSubstr("for ranks 1, 2;")));
    warned.Notify();
  });
  std::thread waiting([&] {
    const auto sum = Sum(*workers[0], "v", {1.0});
    ASSERT_TRUE(sum.ok()) << sum.status();  // It was a warning, and the round goes on.
    EXPECT_THAT(*sum, ElementsAre(7.0));
  });
  warned.WaitForNotification();
  std::thread other([&] { EXPECT_TRUE(Sum(*workers[1], "v", {2.0}).ok()); });
  EXPECT_TRUE(Sum(*workers[2], "v", {4.0}).ok());
  waiting.join();
  other.join();
  SetLogSink(nullptr);
}

// ---- Numbers and sizes

// Returns the outcome of a forward round of two channels that the master answers with these.
absl::StatusOr<RoundResult> Forward(NumericPolicy policy, int64_t count, double mean, double var) {
  FakeMaster master([&](FakeStream* stream) {
    v1::WorkerFrame frame;
    if (!Welcome(stream) || !AwaitContribution(stream, &frame)) return grpc::Status::OK;
    v1::MasterFrame answer;
    *answer.add_results()->mutable_key() = frame.contributions(0).key();
    v1::MergedMoments* const moments = answer.mutable_results(0)->mutable_moments();
    moments->set_count(count);
    for (const double value : {1.0, mean}) moments->add_mean(value);
    for (const double value : {1.0, var}) moments->add_var(value);
    stream->Write(answer);
    stream->Read(&frame);
    return grpc::Status::OK;
  });
  const auto worker = JoinOrDie(Patient(master.target()));
  LayerOptions layer = BatchNormOptions("bn", 2);
  layer.numeric_policy = policy;
  EXPECT_TRUE(worker->DeclareLayer(layer).ok());
  const std::vector<double> values = {1.0, 2.0};
  auto round = worker->StartForward("bn", 0, 3, values, values, BackwardRole::kNone);
  if (!round.ok()) return round.status();
  if (absl::Status status = round->Wait(); !status.ok()) return status;
  return round->result();
}

TEST(LyingMasterTest, StatisticsThatNoMergeGivesAreRefused) {
  const double nan = std::nan("");
  const double infinity = std::numeric_limits<double>::infinity();
  EXPECT_TRUE(Forward(NumericPolicy::kRefuse, 6, -2.0, 0.0).ok());
  EXPECT_TRUE(Forward(NumericPolicy::kPropagate, 6, nan, infinity).ok());
  struct Case {
    NumericPolicy policy;
    int64_t count;
    double mean, var;
    const char* text;
  };
  for (const Case& c :
       {Case{NumericPolicy::kRefuse, -1, 0, 1, "count of -1"}, Case{NumericPolicy::kPropagate, -1, 0, 1, "count of -1"},
        Case{NumericPolicy::kRefuse, 6, nan, 1, "mean of nan for channel 1"},
        Case{NumericPolicy::kRefuse, 6, -infinity, 1, "mean of -inf for channel 1"},
        Case{NumericPolicy::kRefuse, 6, 0, nan, "variance of nan for channel 1"},
        Case{NumericPolicy::kRefuse, 6, 0, infinity, "variance of inf for channel 1"},
        Case{NumericPolicy::kRefuse, 6, 0, -1e-300, "variance of -1e-300 for channel 1"},
        Case{NumericPolicy::kPropagate, 6, 0, -infinity, "variance of -inf for channel 1"}}) {
    const absl::Status status = Forward(c.policy, c.count, c.mean, c.var).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << c.text << ": " << status;
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(c.text), HasSubstr("\"bn\"")));
  }
}

// A field of a frame, of so many bytes, that this client does not know.
std::string UnknownField(size_t bytes) {
  std::string encoded = "\xc2\x3e";  // Field 1000, length-delimited.
  for (size_t rest = bytes; rest > 0; rest >>= 7) {
    encoded.push_back(static_cast<char>((rest & 0x7f) | (rest > 0x7f ? 0x80 : 0)));
  }
  return encoded + std::string(bytes, 'x');
}

absl::Status AfterAFrameOf(size_t bytes) {
  FakeMaster master([bytes](FakeStream* stream) {
    v1::WorkerFrame frame;
    if (!Welcome(stream) || !AwaitContribution(stream, &frame)) return grpc::Status::OK;
    v1::MasterFrame answer;
    EXPECT_TRUE(answer.ParseFromString(UnknownField(bytes)));
    *answer.add_results()->mutable_key() = frame.contributions(0).key();
    answer.mutable_results(0)->mutable_vector()->add_value(5.0);
    stream->Write(answer);
    stream->Read(&frame);
    return grpc::Status::OK;
  });
  const auto worker = JoinOrDie(Patient(master.target()));
  return Sum(*worker, "v", {1.0}).status();
}

TEST(LyingMasterTest, AFrameThatIsLongerThanWhatIsAwaitedEndsTheWorker) {
  EXPECT_TRUE(AfterAFrameOf(size_t{16} << 20).ok());
  const absl::Status longer = AfterAFrameOf(size_t{40} << 20);
  EXPECT_EQ(longer.code(), absl::StatusCode::kInternal) << longer;
  EXPECT_THAT(std::string(longer.message()), HasSubstr("at most"));
  EXPECT_EQ(AfterAFrameOf(size_t{130} << 20).code(), absl::StatusCode::kResourceExhausted);
}

TEST(LyingMasterTest, AnErrorThatSaysOkIsAnError) {
  FakeMaster master([](FakeStream* stream) {
    v1::WorkerFrame frame;
    if (!Welcome(stream) || !AwaitContribution(stream, &frame)) return grpc::Status::OK;
    google::rpc::Status details;
    details.set_message("no code");
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "larger than max", details.SerializeAsString());
  });
  const auto worker = JoinOrDie(Patient(master.target()));
  const absl::Status status = Sum(*worker, "v", {1.0}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("an error without a code"));
}

}  // namespace
}  // namespace syncbn::testing
