// A master and workers as processes that share memory, stopped and killed at random moments.
//
// SYNCBN_STRESS_ROUNDS says how many rounds are run in place of 400.

#include <fcntl.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/client/cc/worker_group.h"
#include "tests/testing/seed.h"
#include "tests/testing/temporary_directory.h"

namespace syncbn::testing {
namespace {

constexpr uint32_t kWorldSize = 3;
// Rank 2 takes part in every round, and speaks gRPC.
constexpr uint32_t kWithoutMemory = 2;

uint64_t Rounds() {
  const char* const text = getenv("SYNCBN_STRESS_ROUNDS");
  return text == nullptr ? 400 : std::stoull(text);
}

// The part of a round that all ranks know: the length of its vector. Most are short, some fill the ring several times
// over, and a few are of 8 MiB and more.
size_t LengthOf(uint64_t seed, uint64_t round) {
  std::seed_seq sequence{seed, round};
  std::mt19937 random(sequence);
  switch (random() % 40) {
    case 0:
      return (size_t{1} << 20) + random() % 1000;
    case 1:
    case 2:
    case 3:
      return random() % 100000 + 1;
    default:
      return random() % 600 + 1;
  }
}

// ---- The processes

int RunMaster(const std::string& directory) {
  MasterServer::Options options;
  options.addresses = {absl::StrCat("unix:", directory, "/socket")};
  const auto master = MasterServer::Start(std::move(options));
  if (!master.ok()) std::fprintf(stderr, "master: %s\n", master.status().ToString().c_str());
  if (!master.ok()) return 1;
  while (true) pause();
}

// Waits for the round: at once, or a while at a time, as one who has something else to do.
absl::Status WaitSomehow(Round& round, uint32_t kind) {
  if (kind % 3 != 0) return round.Wait();
  absl::Status status;
  do {
    status = round.Wait(absl::Milliseconds(kind % 7));
  } while (IsPending(status));
  return status;
}

// Runs rounds of a group, with up to four under way at a time, checks every number, and writes a byte to the standard
// output after each.
absl::Status RunRounds(Worker& worker, uint64_t seed, uint64_t rounds) {
  std::mt19937 own(static_cast<unsigned>(seed * kWorldSize + worker.rank()));
  const double ranks = worker.world_size();
  for (uint64_t next = 0; next < rounds;) {
    std::vector<std::pair<size_t, Round>> under_way;
    for (size_t count = own() % 4 + 1; count > 0 && next < rounds; --count, ++next) {
      const size_t length = LengthOf(seed, next);
      auto round = worker.StartSum(absl::StrCat("v", length), Worker::kNextSequence,
                                   std::vector<double>(length, static_cast<double>(next + worker.rank())));
      if (!round.ok()) return round.status();
      under_way.emplace_back(length, *std::move(round));
    }
    for (size_t i = 0; i < under_way.size(); ++i) {
      auto& [length, round] = under_way[i];
      if (absl::Status status = WaitSomehow(round, own()); !status.ok()) return status;
      const double expected = ranks * static_cast<double>(next - under_way.size() + i) + ranks * (ranks - 1) / 2;
      if (round.result().vector() != std::vector<double>(length, expected)) {
        return absl::DataLossError(absl::StrCat("a wrong sum of ", length, " elements"));
      }
      if (write(STDOUT_FILENO, "", 1) != 1) return absl::InternalError("nobody takes note of the progress");
    }
  }
  return absl::OkStatus();
}

// Joins and runs rounds. Returns 0 if all of them have the right sums.
int RunWorker(const std::string& directory, const std::string& group, uint32_t rank, uint32_t world_size, uint64_t seed,
              uint64_t rounds) {
  setenv("SYNCBN_SHARED_MEMORY", rank == kWithoutMemory ? "off" : "same-user", 1);
  Worker::Options options = WorkerOptions(absl::StrCat("unix:", directory, "/socket"), rank, world_size);
  options.group = group;
  options.join_timeout = absl::Minutes(4);
  options.round_timeout = absl::Minutes(4);
  auto worker = Worker::Join(std::move(options));
  absl::Status status = worker.status();
  if (status.ok()) status = RunRounds(**worker, seed, rounds);
  if (status.ok() && (*worker)->shares_memory() != (rank != kWithoutMemory)) {
    status = absl::InternalError("the worker shares memory, or does not, against its setting");
  }
  if (status.ok()) status = (*worker)->Leave("finished");
  if (!status.ok()) std::fprintf(stderr, "rank %u of %s: %s\n", rank, group.c_str(), status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

// Starts a process that ends with this one, and writes to `output`.
pid_t Start(const std::vector<std::string>& words, int output) {
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child != 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent || dup2(output, STDOUT_FILENO) < 0) _exit(1);
  std::vector<char*> arguments;
  for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  execv("/proc/self/exe", arguments.data());
  _exit(127);
}

int End(pid_t process) {
  int state = 0;
  EXPECT_EQ(waitpid(process, &state, 0), process);
  return state;
}

void Kill(pid_t process) {
  kill(process, SIGKILL);
  const int state = End(process);
  EXPECT_TRUE(WIFSIGNALED(state) && WTERMSIG(state) == SIGKILL) << "it has ended by itself, with state " << state;
}

// ---- The test

class SharedMemoryStressTest : public ::testing::Test {
 protected:
  ~SharedMemoryStressTest() override { close(nowhere_); }

  pid_t StartMaster() const { return Start({"master", directory_.path()}, nowhere_); }
  pid_t StartWorker(const std::string& group, uint32_t rank, uint32_t world_size, uint64_t rounds, int output) const {
    return Start({"worker", directory_.path(), group, absl::StrCat(rank), absl::StrCat(world_size), absl::StrCat(seed_),
                  absl::StrCat(rounds)},
                 output);
  }
  // A worker alone in a group of its own, which runs rounds until it is killed.
  pid_t StartVictim() {
    constexpr uint64_t kForEver = uint64_t{1} << 60;
    return StartWorker(absl::StrCat("victims", victims_++), 0, 1, kForEver, nowhere_);
  }
  // Lets a time pass in which the processes do something or other.
  void PassTime(unsigned most_microseconds) { usleep(static_cast<useconds_t>(random_() % most_microseconds)); }
  void StopForAWhile(pid_t process) {
    kill(process, SIGSTOP);
    PassTime(20000);
    kill(process, SIGCONT);
  }

  const uint64_t seed_ = Seed();
  const int nowhere_ = open("/dev/null", O_WRONLY | O_CLOEXEC);
  std::mt19937_64 random_{seed_};
  const TemporaryDirectory directory_{"/tmp"};
  uint64_t victims_ = 0;
};

TEST_F(SharedMemoryStressTest, NoRoundHangsOrIsWrongWhateverIsStoppedOrKilled) {
  std::fflush(stdout);  // Of what the seed is, should the test hang.
  int progress[2];
  ASSERT_EQ(pipe2(progress, O_CLOEXEC), 0);
  pid_t master = StartMaster();
  std::vector<pid_t> steady;
  for (uint32_t rank = 0; rank < kWorldSize; ++rank) {
    steady.push_back(StartWorker("steady", rank, kWorldSize, Rounds(), progress[1]));
  }
  close(progress[1]);
  pid_t victim = StartVictim();
  // One byte for each rank and round, until all workers have ended.
  std::vector<char> bytes(10 * kWorldSize);
  while (read(progress[0], bytes.data(), random_() % bytes.size() + 1) > 0) {
    PassTime(2000);
    switch (random_() % 12) {
      case 0:  // The workers repeat to the next master what the one before knew.
        Kill(master);
        master = StartMaster();
        break;
      case 1:
      case 2:
        Kill(victim);
        victim = StartVictim();
        break;
      case 3:
      case 4:
        StopForAWhile(master);
        break;
      default:
        StopForAWhile(steady[random_() % steady.size()]);
    }
  }
  close(progress[0]);
  for (const pid_t process : steady) EXPECT_EQ(End(process), 0);
  Kill(victim);
  Kill(master);
}

}  // namespace
}  // namespace syncbn::testing

int main(int argc, char** argv) {
  using syncbn::testing::RunMaster;
  using syncbn::testing::RunWorker;
  const std::string role = argv[0];
  if (role == "master") return RunMaster(argv[1]);
  if (role == "worker") {
    return RunWorker(argv[1], argv[2], static_cast<uint32_t>(std::stoul(argv[3])),
                     static_cast<uint32_t>(std::stoul(argv[4])), std::stoull(argv[5]), std::stoull(argv[6]));
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
