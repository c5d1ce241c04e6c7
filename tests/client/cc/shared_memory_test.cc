// Workers that share memory with their master: when they do, what goes through it, and how it ends.

#include <dirent.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "plumbing/doorbell.h"
#include "plumbing/shared_file.h"
#include "tests/client/cc/fake_master.h"
#include "tests/client/cc/worker_group.h"

namespace syncbn::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// Sets the variables by which a worker learns with whom it shares memory, and where.
class SharedMemoryTest : public ::testing::Test {
 protected:
  SharedMemoryTest() : directory_(MakeDirectory()) {
    setenv("SYNCBN_SHARED_MEMORY", "same-user", 1);
    setenv("SYNCBN_SHARED_MEMORY_DIR", directory_.c_str(), 1);
  }
  ~SharedMemoryTest() override {
    unsetenv("SYNCBN_SHARED_MEMORY");
    unsetenv("SYNCBN_SHARED_MEMORY_DIR");
    EXPECT_THAT(Files(), IsEmpty()) << "in " << directory_;
    rmdir(directory_.c_str());
  }

  static std::string MakeDirectory() {
    char pattern[] = "/tmp/syncbn-test-XXXXXX";  // The path of a unix socket has to be short.
    return mkdtemp(pattern);
  }

  std::unique_ptr<MasterServer> Start(int port = 0, MemorySharing sharing = MemorySharing::kSameUser) const {
    MasterServer::Options options;
    options.addresses = {absl::StrCat("127.0.0.1:", port)};
    options.shared_memory = sharing;
    options.shared_memory_dir = directory_;
    auto started = MasterServer::Start(std::move(options));
    EXPECT_TRUE(started.ok()) << started.status();
    return started.ok() ? *std::move(started) : nullptr;
  }

  std::vector<std::string> Files() const {
    std::vector<std::string> names;
    DIR* const entries = opendir(directory_.c_str());
    while (const dirent* const entry = readdir(entries)) {
      if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
    }
    closedir(entries);
    return names;
  }

  const std::string directory_;
};

// Begins a sum on each worker, and waits for each on a thread of its own.
void ExpectSums(const std::vector<std::unique_ptr<Worker>>& workers, size_t length, double expected) {
  OnEachRank(static_cast<uint32_t>(workers.size()), [&](uint32_t rank) {
    const auto sum = Sum(*workers[rank], "v", std::vector<double>(length, rank + 1.0));
    ASSERT_TRUE(sum.ok()) << sum.status();
    EXPECT_EQ(*sum, std::vector<double>(length, expected));
  });
}

TEST_F(SharedMemoryTest, RoundsGoThroughMemoryUnlessItIsSaidOtherwise) {
  unsetenv("SYNCBN_SHARED_MEMORY");
  const auto master = Start();
  const auto workers = JoinAll(master->target(), 3);
  for (const auto& worker : workers) EXPECT_TRUE(worker->shares_memory());
  for (int i = 0; i < 100; ++i) ExpectSums(workers, 10, 6.0);
  EXPECT_THAT(Files(), SizeIs(1)) << "the master's doorbell; segments have no names once they are shared";
}

TEST_F(SharedMemoryTest, AMasterThatIsShutDownLeavesNothingBehind) {
  const auto master = Start();
  const auto workers = JoinAll(master->target(), 2);
  ExpectSums(workers, 10, 3.0);
  EXPECT_THAT(Files(), SizeIs(1)) << "the master's doorbell";
  master->Shutdown(absl::Seconds(1));
  EXPECT_THAT(Files(), IsEmpty()) << "a process may end without destroying its master";
}

TEST_F(SharedMemoryTest, VectorsThatAreLongerThanTheSegmentGoPieceByPiece) {
  const auto master = Start();
  const auto workers = JoinAll(master->target(), 2);
  ExpectSums(workers, (size_t{3} << 20) + 5, 3.0);
}

TEST_F(SharedMemoryTest, ASocketsDirectoryServesIfNoneIsNamed) {
  unsetenv("SYNCBN_SHARED_MEMORY_DIR");
  MasterServer::Options options;
  const std::string target = absl::StrCat("unix:", directory_, "/socket");
  options.addresses = {target};
  auto master = MasterServer::Start(options);
  ASSERT_TRUE(master.ok()) << master.status();
  const auto workers = JoinAll(target, 2);
  EXPECT_TRUE(workers[0]->shares_memory());
  EXPECT_THAT(Files(), SizeIs(2)) << "the socket and the doorbell";
  ExpectSums(workers, 10, 3.0);
}

TEST_F(SharedMemoryTest, AWorkerThatSleepsForLongIsWoken) {
  const auto master = Start();
  const auto workers = JoinAll(master->target(), 2);
  for (int i = 0; i < 3; ++i) {
    std::thread other([&] {
      const auto sum = Sum(*workers[1], "v", {2.0});
      EXPECT_TRUE(sum.ok()) << sum.status();
    });
    // Nobody else contributes to this one: waits that have a length, and are too short to be a deadlock.
    auto alone = workers[0]->StartSum("nobody else's", static_cast<uint64_t>(i), {1.0});
    ASSERT_TRUE(alone.ok()) << alone.status();
    for (int wait = 0; wait < 10; ++wait) EXPECT_TRUE(IsPending(alone->Wait(absl::Milliseconds(10))));
    const auto sum = Sum(*workers[0], "v", {1.0});
    EXPECT_TRUE(sum.ok()) << sum.status();
    other.join();
  }
}

TEST_F(SharedMemoryTest, SeveralThreadsOfAWorkerTakeTurns) {
  const auto master = Start();
  const auto workers = JoinAll(master->target(), 2);
  OnEachRank(8, [&](uint32_t thread) {
    for (int i = 0; i < 50; ++i) {
      const auto sum = Sum(*workers[thread % 2], absl::StrCat("v", thread / 2), {1.0});
      ASSERT_TRUE(sum.ok()) << sum.status();
      EXPECT_THAT(*sum, ElementsAre(2.0));
    }
  });
}

// ---- When memory is not shared

void ExpectGrpc(const std::string& target) {
  const auto workers = JoinAll(target, 2);
  for (const auto& worker : workers) EXPECT_FALSE(worker->shares_memory());
  ExpectSums(workers, 10, 3.0);
}

TEST_F(SharedMemoryTest, AWorkerThatSharesNoneUsesGrpc) {
  setenv("SYNCBN_SHARED_MEMORY", "off", 1);
  ExpectGrpc(Start()->target());
}

TEST_F(SharedMemoryTest, AMasterThatSharesNoneUsesGrpc) { ExpectGrpc(Start(0, MemorySharing::kOff)->target()); }

TEST_F(SharedMemoryTest, ADirectoryThatTheMasterDoesNotSeeMeansGrpc) {
  const std::string other = MakeDirectory();
  setenv("SYNCBN_SHARED_MEMORY_DIR", other.c_str(), 1);
  ExpectGrpc(Start()->target());
  EXPECT_EQ(rmdir(other.c_str()), 0) << "something was left behind";
}

TEST_F(SharedMemoryTest, ADirectoryThatDoesNotExistMeansGrpc) {
  setenv("SYNCBN_SHARED_MEMORY_DIR", "/nowhere", 1);
  ExpectGrpc(Start()->target());
}

TEST_F(SharedMemoryTest, AnUnknownWordIsRefused) {
  setenv("SYNCBN_SHARED_MEMORY", "maybe", 1);
  const auto master = Start();
  const auto worker = Worker::Join(WorkerOptions(master->target(), 0, 1));
  EXPECT_EQ(worker.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(worker.status().message()), ::testing::HasSubstr("\"maybe\""));
}

// Answers the offer of the first stream as if it had taken the segment, of which it does not know; breaks the second
// stream off; and returns 7 as the sum of a third.
class MasterWithOtherMemory {
 public:
  explicit MasterWithOtherMemory(std::string directory) : directory_(std::move(directory)) {}

  const std::string& target() const { return master_.target(); }
  // Returns which streams had an offer.
  std::vector<bool> offers() const {
    absl::MutexLock lock(&mutex_);
    return offers_;
  }

 private:
  grpc::Status Run(grpc::ServerContext* context, FakeStream* stream) {
    const bool offered = context->client_metadata().count(kSharedMemoryHeader) != 0;
    size_t streams = 0;
    {
      absl::MutexLock lock(&mutex_);
      offers_.push_back(offered);
      streams = offers_.size();
    }
    const SharedName name = SharedName::Draw();
    const auto bell = SharedFile::Create(directory_, name, sizeof(Doorbell), MemorySharing::kSameUser);
    EXPECT_TRUE(bell.ok()) << bell.status();
    if (streams == 1) context->AddInitialMetadata(kSharedMemoryHeader, name.ToString());
    if (!Welcome(stream)) return grpc::Status::OK;
    if (streams == 2) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "broken off");
    v1::WorkerFrame frame;
    while (AwaitContribution(stream, &frame)) {
      v1::MasterFrame answer;
      *answer.add_results()->mutable_key() = frame.contributions(0).key();
      answer.mutable_results(0)->mutable_vector()->add_value(7.0);
      stream->Write(answer);
    }
    return grpc::Status::OK;
  }

  const std::string directory_;
  mutable absl::Mutex mutex_;
  std::vector<bool> offers_ ABSL_GUARDED_BY(mutex_);
  FakeMaster master_{[this](grpc::ServerContext* context, FakeStream* stream) { return Run(context, stream); }};
};

TEST_F(SharedMemoryTest, AMasterThatMapsOtherMemoryIsSpokenToByGrpc) {
  MasterWithOtherMemory master(directory_);
  const auto worker = JoinOrDie(WorkerOptions(master.target(), 0, 1));
  ASSERT_NE(worker, nullptr);
  EXPECT_FALSE(worker->shares_memory());
  const auto sum = Sum(*worker, "v", {1.0});
  ASSERT_TRUE(sum.ok()) << sum.status();
  EXPECT_THAT(*sum, ElementsAre(7.0));
  EXPECT_THAT(master.offers(), ElementsAre(true, false, true)) << "a later stream may be another master's";
}

// ---- Ends

TEST_F(SharedMemoryTest, ALeaveIsAcknowledged) {
  const auto master = Start();
  auto workers = JoinAll(master->target(), 2);
  ExpectSums(workers, 10, 3.0);
  EXPECT_TRUE(workers[0]->Leave("finished").ok());
  const auto sum = Sum(*workers[1], "v", {2.0});
  ASSERT_TRUE(sum.ok()) << sum.status();
  EXPECT_THAT(*sum, ElementsAre(2.0));
}

TEST_F(SharedMemoryTest, AWorkerThatClosesIsLostToTheOthers) {
  const auto master = Start();
  const auto workers = JoinAll(master->target(), 2);
  auto round = workers[0]->StartSum("v", 0, {1.0});
  ASSERT_TRUE(round.ok()) << round.status();
  ASSERT_TRUE(workers[0]->Flush().ok());
  workers[1]->Close();
  EXPECT_EQ(DetailsOf(round->Wait()).reason, "WORKER_LOST");
}

TEST_F(SharedMemoryTest, MemoryIsSharedWithTheNextMaster) {
  auto master = Start();
  const int port = master->port();
  const auto workers = JoinAll(master->target(), 2);
  ExpectSums(workers, 10, 3.0);
  master.reset();
  master = Start(port);
  ExpectSums(workers, 10, 3.0);
  for (const auto& worker : workers) EXPECT_TRUE(worker->shares_memory());
}

TEST_F(SharedMemoryTest, AWorkerThatIsKilledAtAnyMomentHarmsNobodyElse) {
  const auto master = Start();
  const auto seed = static_cast<unsigned>(::testing::UnitTest::GetInstance()->random_seed());
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::srand(seed);
  for (int i = 0; i < 10; ++i) {
    const std::string group = absl::StrCat("g", i);
    const std::string victim = absl::StrCat(master->target(), " ", group, " ", std::rand() % 3000);
    const pid_t child = fork();
    if (child == 0) {
      execl("/proc/self/exe", "victim", "--victim", victim.c_str(), nullptr);
      _exit(127);
    }
    int state = 0;
    ASSERT_EQ(waitpid(child, &state, 0), child);
    EXPECT_TRUE(WIFSIGNALED(state) && WTERMSIG(state) == SIGKILL) << state;
    Worker::Options options = WorkerOptions(master->target(), 0, 1);
    options.group = group;
    const auto worker = JoinOrDie(options);
    ASSERT_NE(worker, nullptr);
    EXPECT_TRUE(worker->shares_memory());
    EXPECT_TRUE(Sum(*worker, "after", {1.0}).ok());
  }
  // One that is killed before it has joined leaves its segment behind; the next master removes it after a while.
  for (const std::string& name : Files()) unlink(absl::StrCat(directory_, "/", name).c_str());
}

}  // namespace

// Sums alone in a group as fast as it can, until it kills itself after so many microseconds.
void RunVictim(const std::string& target, const std::string& group, int microseconds) {
  Worker::Options options = WorkerOptions(target, 0, 1);
  options.group = group;
  auto worker = Worker::Join(options);
  if (!worker.ok()) return;
  std::thread([microseconds] {
    usleep(static_cast<useconds_t>(microseconds));
    kill(getpid(), SIGKILL);
  }).detach();
  while (Sum(**worker, "v", std::vector<double>(5000, 1.0)).ok()) {
  }
}

}  // namespace syncbn::testing

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--victim") {
    const std::vector<std::string> words = absl::StrSplit(argv[2], ' ');
    syncbn::testing::RunVictim(words[0], words[1], std::stoi(words[2]));
    return 1;
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
