// Rings, doorbells and shared files, with both ends in one process.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "plumbing/doorbell.h"
#include "plumbing/shared_file.h"
#include "plumbing/shared_ring.h"
#include "tests/testing/seed.h"

namespace syncbn {
namespace {

constexpr size_t kMostBytes = size_t{4} << 20;

// The words and bytes of one direction.
struct Ring {
  RingWords words = {};
  std::vector<char> bytes = std::vector<char>(kRingBytes);
  RingWriter writer{&words, bytes.data()};
  RingReader reader{&words, bytes.data(), kMostBytes};
};

std::string Pattern(size_t size, uint32_t seed) {
  std::minstd_rand random(seed);
  std::string text(size, '\0');
  for (char& c : text) c = static_cast<char>(random());
  return text;
}

RingProgress Send(Ring& ring, absl::string_view frame) { return ring.writer.Send({frame}); }

// ---- Rings

TEST(RingTest, FramesArriveInOrderAroundTheEnd) {
  Ring ring;
  for (uint32_t i = 0; i < 1000; ++i) {
    const std::string frame = Pattern(i * 7 % 3000, i);
    ASSERT_EQ(Send(ring, frame), RingProgress::kDone) << i;
    ASSERT_EQ(ring.reader.Receive(), RingProgress::kDone) << i;
    ASSERT_EQ(ring.reader.frame(), frame) << i;
  }
  EXPECT_EQ(ring.reader.Receive(), RingProgress::kWaits);
}

TEST(RingTest, PartsFormOneFrame) {
  Ring ring;
  ASSERT_EQ(ring.writer.Send({"one", "", "two"}), RingProgress::kDone);
  ASSERT_EQ(ring.writer.Send({}), RingProgress::kDone);
  ASSERT_EQ(ring.reader.Receive(), RingProgress::kDone);
  EXPECT_EQ(ring.reader.frame(), "onetwo");
  ASSERT_EQ(ring.reader.Receive(), RingProgress::kDone);
  EXPECT_EQ(ring.reader.frame(), "");
}

TEST(RingTest, TheBellRingsBeforeALongFrameIsWhole) {
  Ring ring;
  Doorbell bell = {};
  const std::string frame = Pattern(kRingBytes / 2, 1);
  ASSERT_EQ(ring.writer.Send({"short"}, &bell), RingProgress::kDone);
  EXPECT_EQ(bell.rings(), 0u) << "the caller rings for the end";
  ASSERT_EQ(ring.writer.Send({frame}, &bell), RingProgress::kDone);
  EXPECT_GE(bell.rings(), 2u);
  ASSERT_EQ(ring.reader.Receive(), RingProgress::kDone);
  ASSERT_EQ(ring.reader.Receive(), RingProgress::kDone);
  EXPECT_EQ(ring.reader.frame(), frame);
}

TEST(RingTest, AFrameThatIsLongerThanTheRingGoesPieceByPiece) {
  Ring ring;
  const std::string first = Pattern(kRingBytes, 1), second = Pattern(kRingBytes * 5 + 3, 2);
  RingProgress sent = ring.writer.Send({first, second});
  int waits = 0;
  while (sent == RingProgress::kWaits) {
    ++waits;
    EXPECT_FALSE(ring.writer.HasRoom());
    ASSERT_EQ(ring.reader.Receive(), RingProgress::kWaits);
    EXPECT_TRUE(ring.reader.WriterWaits());
    EXPECT_FALSE(ring.reader.WriterWaits()) << "a wait is told of once";
    sent = ring.writer.Send({first, second});
  }
  EXPECT_GE(waits, 6);
  ASSERT_EQ(sent, RingProgress::kDone);
  ASSERT_EQ(ring.reader.Receive(), RingProgress::kDone);
  EXPECT_EQ(ring.reader.frame(), first + second);
}

TEST(RingTest, AWriterIsRefusedACountBeyondItsOwn) {
  for (const uint64_t lie : {uint64_t{1} << 40, uint64_t{200}, ~uint64_t{0} - kRingBytes}) {
    Ring ring;
    ASSERT_EQ(Send(ring, "frame"), RingProgress::kDone);
    ring.words.read = lie;
    EXPECT_EQ(Send(ring, "another"), RingProgress::kBroken) << lie;
  }
}

TEST(RingTest, AReaderIsRefusedACountThatTheRingCannotHold) {
  Ring ring;
  ring.words.written = kRingBytes + 1;
  EXPECT_EQ(ring.reader.Receive(), RingProgress::kBroken);
  EXPECT_TRUE(absl::StrContains(ring.reader.fault(), absl::StrCat(kRingBytes + 1))) << ring.reader.fault();
  ring.words.written = 0;
  EXPECT_EQ(ring.reader.Receive(), RingProgress::kBroken) << "it stays broken";
}

TEST(RingTest, AFrameBeyondTheBoundIsRefusedByItsLength) {
  Ring ring;
  const uint32_t length = kMostBytes + 1;
  std::memcpy(ring.bytes.data(), &length, sizeof(length));
  ring.words.written = sizeof(length);
  EXPECT_EQ(ring.reader.Receive(), RingProgress::kBroken);
  EXPECT_TRUE(absl::StrContains(ring.reader.fault(), absl::StrCat(kMostBytes + 1))) << ring.reader.fault();
}

TEST(RingTest, WordsOfAnyValueAreSurvived) {
  std::mt19937_64 random(testing::Seed());
  for (int i = 0; i < 200; ++i) {
    Ring ring;
    for (char& c : ring.bytes) c = static_cast<char>(random());
    ring.words.written = random() >> (random() % 64);
    ring.words.read = random() >> (random() % 64);
    const RingProgress received = ring.reader.Receive();
    EXPECT_TRUE(received != RingProgress::kDone || ring.reader.frame().size() <= kRingBytes);
    Send(ring, "frame");
  }
}

// ---- Two threads, as two processes would

TEST(DoorbellTest, NoFrameIsLostBetweenThreadsThatSleep) {
  constexpr uint32_t kFrames = 5000;
  Ring ring;
  Doorbell to_reader = {}, to_writer = {};
  std::thread writer([&] {
    for (uint32_t i = 0; i < kFrames; ++i) {
      const std::string frame = Pattern(i % 97 == 0 ? kRingBytes + i : i % 300, i);
      while (true) {
        const uint32_t seen = to_writer.rings();
        const RingProgress progress = ring.writer.Send({frame});
        to_reader.Ring();
        if (progress == RingProgress::kDone) break;
        to_writer.Sleep(seen, std::chrono::minutes(5));
      }
    }
  });
  for (uint32_t i = 0; i < kFrames; ++i) {
    while (true) {
      const uint32_t seen = to_reader.rings();
      const RingProgress progress = ring.reader.Receive();
      if (ring.reader.WriterWaits()) to_writer.Ring();
      if (progress == RingProgress::kDone) break;
      to_reader.Sleep(seen, std::chrono::minutes(5));
    }
    ASSERT_EQ(ring.reader.frame(), Pattern(i % 97 == 0 ? kRingBytes + i : i % 300, i)) << i;
  }
  writer.join();
}

// A doorbell that forked children share, and a thread that sleeps on it, as often as somebody rings.
class SharedBell {
 public:
  SharedBell()
      : map_(mmap(nullptr, sizeof(Doorbell), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)),
        bell_(static_cast<Doorbell*>(map_)),
        sleeper_([this] { Run(); }) {}
  ~SharedBell() {
    ends_ = true;
    bell_->Ring();
    sleeper_.join();
    munmap(map_, sizeof(Doorbell));
  }

  Doorbell* bell() { return bell_; }
  // Returns once the thread sleeps. Then it has seen all rings.
  void AwaitSleep() const {
    while (!marked()) std::this_thread::yield();
  }
  // Returns whether whoever rings would find that the thread sleeps.
  bool marked() const { return reinterpret_cast<const std::atomic<uint32_t>*>(bell_)[1] % 2 != 0; }
  // Returns once the system says that the thread sleeps.
  void AwaitSystemsSleep() const {
    const std::string path = absl::StrCat("/proc/self/task/", thread_id_.load(), "/stat");
    for (char state = 'R'; state != 'S';) {
      std::string stat;
      std::getline(std::ifstream(path), stat);
      const size_t end_of_name = stat.rfind(") ");
      ASSERT_NE(end_of_name, std::string::npos) << stat;
      state = stat[end_of_name + 2];
    }
  }
  // Returns once the thread has seen all rings until now.
  void AwaitSight() const {
    const uint32_t rings = bell_->rings();
    while (seen_ != rings) std::this_thread::yield();
  }

 private:
  void Run() {
    thread_id_ = gettid();
    while (!ends_) {
      const uint32_t seen = bell_->rings();
      seen_ = seen;
      bell_->Sleep(seen, std::chrono::minutes(5));
    }
  }

  void* const map_;
  Doorbell* const bell_;
  std::atomic<bool> ends_{false};
  std::atomic<uint32_t> seen_{0};
  std::atomic<pid_t> thread_id_{0};
  std::thread sleeper_;
};

// Forks a child that rings once it has been told to go on. Returns nothing if children cannot be traced here.
std::optional<pid_t> ForkRinger(Doorbell* bell) {
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(1);
    raise(SIGSTOP);
    bell->Ring();
    _exit(0);
  }
  int state = 0;
  waitpid(child, &state, 0);
  return WIFSTOPPED(state) ? std::optional<pid_t>(child) : std::nullopt;
}

TEST(DoorbellTest, WhoeverStopsWhileRingingTakesNobodyElsesRingAway) {
  SharedBell shared;
  shared.bell()->Ring();  // What is linked lazily is not to be linked in the child.
  shared.AwaitSight();
  const std::optional<pid_t> child = ForkRinger(shared.bell());
  if (!child.has_value()) GTEST_SKIP() << "ptrace of a child is forbidden here, as in some containers";
  int state = 0;
  do {
    shared.AwaitSleep();
    shared.bell()->Ring();
    shared.AwaitSight();  // Would take minutes.
    shared.AwaitSleep();
    ASSERT_EQ(ptrace(PTRACE_SINGLESTEP, *child, nullptr, nullptr), 0);
    ASSERT_EQ(waitpid(*child, &state, 0), *child);
    ASSERT_FALSE(WIFSIGNALED(state)) << state;
  } while (!WIFEXITED(state));
}

// Another one rings between the two halves of a ring, and the thread sleeps again after each further step: it looks and
// finds nothing more.
TEST(DoorbellTest, WhoeverIsSlowToRingEndsNoLaterSleep) {
  SharedBell shared;
  shared.bell()->Ring();
  shared.AwaitSight();
  shared.AwaitSleep();
  const std::optional<pid_t> child = ForkRinger(shared.bell());
  if (!child.has_value()) GTEST_SKIP() << "ptrace of a child is forbidden here, as in some containers";
  const uint32_t before = shared.bell()->rings();
  int state = 0;
  bool rung = false;
  do {
    ASSERT_EQ(ptrace(PTRACE_SINGLESTEP, *child, nullptr, nullptr), 0);
    ASSERT_EQ(waitpid(*child, &state, 0), *child);
    ASSERT_FALSE(WIFSIGNALED(state)) << state;
    if (!rung && shared.bell()->rings() != before) {
      shared.bell()->Ring();
      shared.AwaitSight();
      rung = true;
    }
    ASSERT_NO_FATAL_FAILURE(shared.AwaitSystemsSleep());
    EXPECT_TRUE(shared.marked()) << "nobody who rings now wakes the thread";
  } while (!WIFEXITED(state) && !HasFailure());
  EXPECT_TRUE(rung);
  if (WIFEXITED(state)) return;
  kill(*child, SIGKILL);
  waitpid(*child, &state, 0);
}

// ---- Files

class SharedFileTest : public ::testing::Test {
 protected:
  SharedFileTest() {
    std::string pattern = absl::StrCat(::testing::TempDir(), "/sharedXXXXXX");
    directory_ = mkdtemp(pattern.data());
  }
  ~SharedFileTest() override { rmdir(directory_.c_str()); }

  std::string PathOf(const SharedName& name) const { return absl::StrCat(directory_, "/", name.file); }
  absl::StatusOr<SharedFile> Create(const SharedName& name) const {
    return SharedFile::Create(directory_, name, 1000, MemorySharing::kSameUser);
  }
  absl::StatusOr<SharedFile> Open(const SharedName& name, size_t bytes = 1000) const {
    return SharedFile::Open(directory_, name, bytes, MemorySharing::kSameUser);
  }

  std::string directory_;
};

TEST_F(SharedFileTest, TwoMappingsAreTheSameMemory) {
  const SharedName name = SharedName::Draw();
  auto made = Create(name);
  ASSERT_TRUE(made.ok()) << made.status();
  auto opened = Open(name);
  ASSERT_TRUE(opened.ok()) << opened.status();
  struct stat found = {};
  ASSERT_EQ(stat(PathOf(name).c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777, 0600U);
  made->Unlink();
  EXPECT_NE(access(PathOf(name).c_str(), F_OK), 0);
  std::strcpy(made->data(), "hello");
  EXPECT_STREQ(opened->data(), "hello");
}

TEST_F(SharedFileTest, NoNameIsLeftByAMakerThatEnds) {
  const SharedName name = SharedName::Draw();
  { ASSERT_TRUE(Create(name).ok()); }
  EXPECT_NE(access(PathOf(name).c_str(), F_OK), 0);
}

TEST_F(SharedFileTest, AnotherFileIsRefused) {
  const SharedName name = SharedName::Draw();
  EXPECT_FALSE(Open(name).ok()) << "there is none";
  auto made = Create(name);
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_TRUE(absl::StrContains(Open(name, 2000).status().message(), "2064")) << "another length";
  EXPECT_TRUE(absl::StrContains(Open({name.file, SharedName::Draw().key}).status().message(), "another file"));
  EXPECT_FALSE(Create(name).ok()) << "the name is taken";
  const SharedName link = SharedName::Draw(), pipe = SharedName::Draw();
  ASSERT_EQ(symlink(PathOf(name).c_str(), PathOf(link).c_str()), 0);
  EXPECT_FALSE(Open({link.file, name.key}).ok()) << "a link";
  ASSERT_EQ(mkfifo(PathOf(pipe).c_str(), 0600), 0);
  EXPECT_TRUE(absl::StrContains(Open(pipe).status().message(), "no file"));
  unlink(PathOf(link).c_str());
  unlink(PathOf(pipe).c_str());
}

TEST_F(SharedFileTest, AnotherUsersFileIsRefusedUnlessAllowed) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can be two users";
  const SharedName name = SharedName::Draw();
  auto made = Create(name);
  ASSERT_TRUE(made.ok()) << made.status();
  if (chown(PathOf(name).c_str(), 12345, 12345) != 0) GTEST_SKIP() << "may not give a file to another user";
  EXPECT_TRUE(absl::StrContains(Open(name).status().message(), "user 12345"));
  EXPECT_TRUE(SharedFile::Open(directory_, name, 1000, MemorySharing::kAnyUser).ok());
}

TEST_F(SharedFileTest, OnlyAbandonedFilesAreRemoved) {
  const SharedName used = SharedName::Draw(), young = SharedName::Draw(), old = SharedName::Draw();
  auto made = Create(used);
  ASSERT_TRUE(made.ok()) << made.status();
  for (const SharedName& name : {young, old}) std::ofstream(PathOf(name)) << "left behind";
  const std::string other = absl::StrCat(directory_, "/syncbn-is-not-all-of-the-name");
  std::ofstream(other) << "somebody else's";
  const timespec long_ago[2] = {{1000000000, 0}, {1000000000, 0}};
  for (const std::string& path : {PathOf(used), PathOf(old), other}) {
    ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), long_ago, 0), 0) << path;
  }
  SharedFile::RemoveAbandoned(directory_);
  EXPECT_EQ(access(PathOf(used).c_str(), F_OK), 0);
  EXPECT_EQ(access(PathOf(young).c_str(), F_OK), 0);
  EXPECT_NE(access(PathOf(old).c_str(), F_OK), 0);
  EXPECT_EQ(access(other.c_str(), F_OK), 0);
  unlink(PathOf(young).c_str());
  unlink(other.c_str());
}

TEST_F(SharedFileTest, AForkedChildDoesNotHaveTheMapping) {
  const SharedName name = SharedName::Draw();
  auto made = Create(name);
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_DEATH(made->data()[0] = 1, "");
}

TEST(SharedNameTest, ItsTextIsReadAgainAndNoOther) {
  const SharedName name = SharedName::Draw();
  const auto read = SharedName::Parse(name.ToString());
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->file, name.file);
  EXPECT_EQ(read->key, name.key);
  const std::string key(32, 'a');
  for (const std::string& text :
       {std::string(), std::string("1"), absl::StrCat("2 ", name.file, " ", key),
        absl::StrCat("1 ../", name.file, " ", key), absl::StrCat("1 syncbn-../../", std::string(26, 'a'), " ", key),
        absl::StrCat("1 ", name.file, " ", key, "a"), absl::StrCat("1 ", name.file, " ", std::string(32, 'G')),
        absl::StrCat(name.ToString(), " more")}) {
    EXPECT_FALSE(SharedName::Parse(text).has_value()) << text;
  }
}

TEST(MemorySharingTest, TheFlagsWordsAreRead) {
  EXPECT_EQ(ParseMemorySharing("off"), MemorySharing::kOff);
  EXPECT_EQ(ParseMemorySharing("0"), MemorySharing::kOff);
  EXPECT_EQ(ParseMemorySharing("same-user"), MemorySharing::kSameUser);
  EXPECT_EQ(ParseMemorySharing("1"), MemorySharing::kSameUser);
  EXPECT_EQ(ParseMemorySharing("any-user"), MemorySharing::kAnyUser);
  EXPECT_EQ(ParseMemorySharing("yes"), std::nullopt);
}

TEST(MemorySharingTest, SegmentsLieBesideTheSocketOrWhereItIsSaid) {
  using Directories = std::vector<std::string>;
  EXPECT_EQ(SharedMemoryDirectories("/mnt/shared", {"/run/a.sock"}), Directories({"/mnt/shared"}));
  EXPECT_EQ(SharedMemoryDirectories("", {"/run/a.sock", "b.sock"}), Directories({"/run", ".", "/dev/shm"}));
  EXPECT_EQ(SharedMemoryDirectories("", {}), Directories({"/dev/shm"}));
}

TEST(MemorySharingTest, AVariableThatIsEmptySaysNothing) {
  unsetenv("SYNCBN_SHARED_MEMORY");
  EXPECT_EQ(SharedMemoryOptions::FromEnvironment(MemorySharing::kAnyUser)->sharing, MemorySharing::kAnyUser);
  setenv("SYNCBN_SHARED_MEMORY", "", 1);
  EXPECT_EQ(SharedMemoryOptions::FromEnvironment(MemorySharing::kSameUser)->sharing, MemorySharing::kSameUser);
  setenv("SYNCBN_SHARED_MEMORY", "off", 1);
  EXPECT_EQ(SharedMemoryOptions::FromEnvironment(MemorySharing::kSameUser)->sharing, MemorySharing::kOff);
  unsetenv("SYNCBN_SHARED_MEMORY");
}

}  // namespace
}  // namespace syncbn
