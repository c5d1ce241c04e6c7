// The file that keeps a master's state: what comes back from it, and what is refused.

#include "server/state/sqlite_store.h"

#include <signal.h>
#include <sqlite3.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/core/state.h"
#include "tests/server/state/fault_vfs.h"
#include "tests/testing/temporary_directory.h"

namespace syncbn::state {
namespace {

using core::GroupId;
using core::GroupState;
using core::LayerState;
using core::StateChanges;
using ::testing::AnyOf;
using testing::Fault;
using testing::FaultCalls;
using testing::FaultVfs;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::SetFault;
using testing::TemporaryDirectory;

LayerState MakeLayer(const std::string& name, uint32_t channels, uint32_t seed) {
  std::mt19937_64 random(seed);
  LayerState layer;
  layer.spec.name = name;
  layer.spec.channels = channels;
  layer.spec.eps = 1e-5;
  if (seed % 2 == 0) layer.spec.momentum = 0.1;
  layer.updates = random();
  for (uint32_t c = 0; c < channels; ++c) {
    layer.mean.push_back(static_cast<double>(random()) * 1e-12);
    layer.var.push_back(c == 0 ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(random()));
  }
  layer.newest_sequence = random();
  for (size_t i = 0; i < 1 + seed % core::kRecentRounds; ++i) layer.recent.push_back(random() >> (seed % 64));
  if (seed % 3 == 0) layer.missing = core::MissingRounds{random(), random()};
  if (seed % 6 == 0) layer.missing->after.reset();
  return layer;
}

GroupState MakeGroup(const std::string& name, std::vector<LayerState> layers) {
  GroupState group;
  group.id = {"job", name};
  group.generation = 3;
  group.run_id = std::numeric_limits<uint64_t>::max() - 7;
  group.world_size = 4;
  group.config.round_timeout = absl::Minutes(10);
  group.config.rejoin_grace = absl::Milliseconds(50);
  group.config.missing_policy = MissingPolicy::kProceed;
  group.config.min_workers = 2;
  group.layers = std::move(layers);
  return group;
}

// Every bit of what is stored, as a text.
std::string Dump(const LayerState& layer) {
  std::string text = absl::StrCat(layer.spec.name, " ", layer.spec.channels, " ", layer.spec.eps, " ",
                                  layer.spec.momentum.value_or(-1.0), " ", layer.updates, " ", layer.newest_sequence);
  for (const uint64_t sequence : layer.recent) absl::StrAppend(&text, " ", sequence);
  if (layer.missing.has_value())
    absl::StrAppend(&text, " ", layer.missing->after.value_or(-1), "-", layer.missing->before);
  for (const auto* vector : {&layer.mean, &layer.var}) {
    text.append(reinterpret_cast<const char*>(vector->data()), vector->size() * sizeof(double));
  }
  return text;
}

std::string Dump(const std::vector<GroupState>& groups) {
  std::string text;
  for (const GroupState& group : groups) {
    absl::StrAppend(&text, group.id.job, "/", group.id.group, " ", group.generation, " ", group.run_id, " ",
                    group.world_size, " ", absl::FormatDuration(*group.config.round_timeout), " ",
                    absl::FormatDuration(*group.config.rejoin_grace), " ",
                    static_cast<int>(group.config.missing_policy), " ", group.config.min_workers, "\n");
    for (const LayerState& layer : group.layers) absl::StrAppend(&text, Dump(layer), "\n");
  }
  return text;
}

// Opens the store and loads it. A text of the error, if there is one, or what is stored.
struct Opened {
  std::unique_ptr<Store> store;
  absl::Status status;
  std::string dump;
};

Opened Open(const std::string& directory, const std::string& vfs = "") {
  auto store = OpenSqliteStore(directory, vfs);
  if (!store.ok()) return {nullptr, store.status(), ""};
  const auto loaded = (*store)->Load();
  if (!loaded.ok()) return {nullptr, loaded.status(), ""};
  return {*std::move(store), absl::OkStatus(), Dump(*loaded)};
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

// ---- What comes back ------------------------------------------------------------------------------------------------

TEST(SqliteStoreTest, ANewStoreIsEmptyAndItsDirectoryIsMade) {
  const TemporaryDirectory directory;
  const std::string inner = directory.path() + "/inner";
  Opened opened = Open(inner);
  ASSERT_TRUE(opened.status.ok()) << opened.status;
  EXPECT_EQ(opened.dump, "");
  struct stat found = {};
  ASSERT_EQ(stat(inner.c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777, 0700u);
}

TEST(SqliteStoreTest, EveryBitComesBack) {
  const TemporaryDirectory directory;
  std::vector<LayerState> layers;
  for (uint32_t seed = 0; seed < 70; ++seed)
    layers.push_back(MakeLayer(absl::StrCat("layer ", 100 + seed), 1 + seed, seed));
  std::vector<GroupState> groups = {MakeGroup(std::string("a\0b", 3), layers),
                                    MakeGroup("z", {MakeLayer("\xe2\x82\xac'\"", 1000, 1)})};
  groups[1].config.missing_policy = MissingPolicy::kFail;
  groups[1].config.min_workers = 0;
  const StateChanges changes{{}, groups};
  ASSERT_TRUE(Open(directory.path()).store->Save(changes).ok());
  EXPECT_EQ(Open(directory.path()).dump, Dump(groups));
}

TEST(SqliteStoreTest, LayersAreReplacedAndOthersStay) {
  const TemporaryDirectory directory;
  Opened opened = Open(directory.path());
  ASSERT_TRUE(opened.store->Save({{}, {MakeGroup("g", {MakeLayer("a", 3, 1), MakeLayer("b", 3, 2)})}}).ok());
  ASSERT_TRUE(opened.store->Save({{}, {MakeGroup("g", {MakeLayer("a", 5, 3)})}}).ok());
  opened.store.reset();
  EXPECT_EQ(Open(directory.path()).dump, Dump({MakeGroup("g", {MakeLayer("a", 5, 3), MakeLayer("b", 3, 2)})}));
}

TEST(SqliteStoreTest, AGroupThatEndedIsGoneAndMayBeginAgainInTheSameChanges) {
  const TemporaryDirectory directory;
  Opened opened = Open(directory.path());
  const GroupState other = MakeGroup("other", {MakeLayer("a", 1, 5)});
  ASSERT_TRUE(opened.store->Save({{}, {MakeGroup("g", {MakeLayer("a", 3, 1), MakeLayer("b", 3, 2)}), other}}).ok());
  const GroupState again = MakeGroup("g", {MakeLayer("b", 4, 9)});
  ASSERT_TRUE(opened.store->Save({{again.id}, {again}}).ok());
  opened.store.reset();
  opened = Open(directory.path());
  EXPECT_EQ(opened.dump, Dump({again, other}));
  ASSERT_TRUE(opened.store->Save({{again.id, other.id, GroupId{"job", "never there"}}, {}}).ok());
  opened.store.reset();
  EXPECT_EQ(Open(directory.path()).dump, "");
}

// ---- What is refused ------------------------------------------------------------------------------------------------

TEST(SqliteStoreTest, DirectoriesThatCannotBeUsed) {
  const TemporaryDirectory directory;
  WriteFile(directory.path() + "/file", "text");
  for (const std::string& path : {directory.path() + "/file", directory.path() + "/no/such", std::string("/proc/x")}) {
    const absl::Status status = Open(path).status;
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr(absl::StrCat("the state directory \"", path, "\" cannot be used: ")));
  }
}

TEST(SqliteStoreTest, ADirectoryThatIsReadOnlyIsToldAsSuch) {
  const std::string directory = "/usr";  // In a sandbox it is read-only; elsewhere it is another user's.
  if (access(directory.c_str(), W_OK) == 0) GTEST_SKIP() << "this user may write everywhere";
  const absl::Status refused = Open(directory).status;
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), AnyOf(HasSubstr("Permission denied"), HasSubstr("Read-only")));
}

TEST(SqliteStoreTest, OneMasterAtATime) {
  const TemporaryDirectory directory;
  Opened first = Open(directory.path());
  const absl::Status status = Open(directory.path()).status;
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("another master uses the state file"));
  ASSERT_TRUE(first.store->Save({{}, {MakeGroup("g", {MakeLayer("a", 3, 1)})}}).ok());
  first.store.reset();
  EXPECT_TRUE(Open(directory.path()).status.ok());
}

TEST(SqliteStoreTest, AnotherProcessIsKeptOutUntilThisOneHasEnded) {
  const TemporaryDirectory directory;
  int ready[2], end[2];
  ASSERT_EQ(pipe(ready), 0);
  ASSERT_EQ(pipe(end), 0);
  const pid_t child = fork();
  if (child == 0) {
    Opened opened = Open(directory.path());
    char byte = opened.status.ok() ? 'y' : 'n';
    (void)!write(ready[1], &byte, 1);
    close(end[1]);
    (void)!read(end[0], &byte, 1);
    raise(SIGKILL);
  }
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  EXPECT_EQ(byte, 'y');
  EXPECT_EQ(Open(directory.path()).status.code(), absl::StatusCode::kUnavailable);
  for (const int descriptor : {ready[0], ready[1], end[0], end[1]}) close(descriptor);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_TRUE(Open(directory.path()).status.ok());
}

// Opens the file with SQLite itself and runs statements.
void Tamper(const std::string& directory, const std::string& sql) {
  sqlite3* database = nullptr;
  ASSERT_EQ(sqlite3_open((directory + "/state.db").c_str(), &database), SQLITE_OK);
  char* error = nullptr;
  EXPECT_EQ(sqlite3_exec(database, sql.c_str(), nullptr, nullptr, &error), SQLITE_OK) << error;
  sqlite3_close(database);
}

// The file system keeps a file that is open, wherever it is gone, and SQLite goes on writing to it.
TEST(SqliteStoreTest, AFileThatIsGoneIsTold) {
  const StateChanges changes{{}, {MakeGroup("g", {MakeLayer("a", 4, 1)})}};
  for (const char* gone : {"", "/state.db", "/state.db-wal"}) {
    const TemporaryDirectory parent;
    const std::string directory = parent.path() + "/state", elsewhere = parent.path() + "/elsewhere";
    const Opened opened = Open(directory);
    ASSERT_TRUE(opened.store->Save(changes).ok());
    std::filesystem::rename(directory + gone, elsewhere);
    EXPECT_THAT(std::string(opened.store->Save(changes).message()), HasSubstr("was moved or removed")) << gone;
    std::filesystem::rename(elsewhere, directory + gone);
    EXPECT_TRUE(opened.store->Save(changes).ok()) << gone;
    std::filesystem::remove_all(directory + gone);
    EXPECT_FALSE(opened.store->Save(changes).ok()) << gone;
  }
}

TEST(SqliteStoreTest, ANewerVersionIsRefusedAndKept) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(Open(directory.path()).store->Save({{}, {MakeGroup("g", {MakeLayer("a", 3, 1)})}}).ok());
  Tamper(directory.path(), "PRAGMA user_version = 2");
  const std::string before = ReadFile(directory.path() + "/state.db");
  const absl::Status status = Open(directory.path()).status;
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("tables of version 2; this one reads 1"));
  EXPECT_EQ(ReadFile(directory.path() + "/state.db"), before);
}

TEST(SqliteStoreTest, FilesOfOthersAreRefusedAndKept) {
  for (const char* sql : {"CREATE TABLE t (x)", "PRAGMA application_id = 7", "PRAGMA user_version = 1"}) {
    const TemporaryDirectory directory;
    Tamper(directory.path(), sql);
    const std::string before = ReadFile(directory.path() + "/state.db");
    const absl::Status status = Open(directory.path()).status;
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << sql << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("belongs to another program"));
    EXPECT_EQ(ReadFile(directory.path() + "/state.db"), before);
  }
}

TEST(SqliteStoreTest, TextIsNoStateFile) {
  const TemporaryDirectory directory;
  const std::string text(5000, 'x');
  WriteFile(directory.path() + "/state.db", text);
  const absl::Status status = Open(directory.path()).status;
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("is damaged and stays as it is; move it away"));
  EXPECT_EQ(ReadFile(directory.path() + "/state.db"), text);
}

TEST(SqliteStoreTest, RowsThatCannotHaveBeenStored) {
  for (const char* sql :
       {"UPDATE layers SET updates = updates + 1", "UPDATE layers SET mean = zeroblob(24)",
        "UPDATE layers SET missing_after = 1", "UPDATE layers SET checksum = 0", "UPDATE groups SET run_id = 1",
        "UPDATE groups SET world_size = 5", "UPDATE groups SET name = 'h'", "DELETE FROM groups", "DROP TABLE groups",
        "DROP TABLE layers", "ALTER TABLE layers RENAME COLUMN var TO variance"}) {
    const TemporaryDirectory directory;
    ASSERT_TRUE(Open(directory.path()).store->Save({{}, {MakeGroup("g", {MakeLayer("a", 3, 1)})}}).ok());
    Tamper(directory.path(), sql);
    EXPECT_EQ(Open(directory.path()).status.code(), absl::StatusCode::kDataLoss) << sql;
  }
}

TEST(SqliteStoreTest, ByteByByteADamagedFileIsRefusedOrReadRight) {
  const TemporaryDirectory directory;
  const std::vector<GroupState> groups = {MakeGroup("g", {MakeLayer("a", 40, 1), MakeLayer("b", 3, 2)}),
                                          MakeGroup("h", {MakeLayer("a", 1, 3)})};
  ASSERT_TRUE(Open(directory.path()).store->Save({{}, groups}).ok());
  const std::string file = directory.path() + "/state.db";
  const std::string bytes = ReadFile(file);
  const std::string expected = Dump(groups);
  std::mt19937 random(20261126);
  size_t refused = 0, read = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    // Most of the file is unused: zeros among zeros are tried now and then.
    const bool unused = bytes.substr(i < 16 ? 0 : i - 16, 33).find_first_not_of('\0') == std::string::npos;
    if (unused && i % 64 != 0) continue;
    std::string damaged = bytes;
    damaged[i] = static_cast<char>(damaged[i] ^ (1 + random() % 255));
    WriteFile(file, damaged);
    std::filesystem::remove(file + "-wal");
    const Opened opened = Open(directory.path());
    if (opened.status.ok()) {
      ++read;
      ASSERT_EQ(opened.dump, expected) << "byte " << i;
    } else {
      ++refused;
      EXPECT_THAT(opened.status.code(), AnyOf(absl::StatusCode::kDataLoss, absl::StatusCode::kInvalidArgument,
                                              absl::StatusCode::kFailedPrecondition))
          << "byte " << i << ": " << opened.status;
      ASSERT_EQ(ReadFile(file), damaged) << "byte " << i << " was refused, and the file has changed";
    }
  }
  EXPECT_GT(refused, 1000u);
  EXPECT_GT(read, 10u);
}

TEST(SqliteStoreTest, AFileThatWasCutShortIsRefused) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(Open(directory.path()).store->Save({{}, {MakeGroup("g", {MakeLayer("a", 2000, 1)})}}).ok());
  const std::string file = directory.path() + "/state.db";
  const std::string bytes = ReadFile(file);
  for (size_t size = 1; size < bytes.size(); size += 1021) {
    WriteFile(file, bytes.substr(0, size));
    EXPECT_EQ(Open(directory.path()).status.code(), absl::StatusCode::kDataLoss) << size;
  }
}

// ---- A disk that fails ----------------------------------------------------------------------------------------------

// Changes in the manner of a training: a few layers at a time, a group that ends now and then. Returns what is stored
// after each of them.
class History {
 public:
  explicit History(uint32_t seed) : random_(seed) {}

  StateChanges Next() {
    StateChanges changes;
    const std::string name = random_() % 4 == 0 ? "g" : "h";
    if (random_() % 8 == 0) {
      changes.ended.push_back({"job", name});
      groups_.erase(name);
    }
    GroupState group = MakeGroup(name, {});
    for (const char* layer : {"a", "b", "c"}) {
      if (random_() % 2 == 0) group.layers.push_back(MakeLayer(layer, 1 + random_() % 700, random_()));
    }
    for (const LayerState& layer : group.layers) groups_[name][layer.spec.name] = layer;
    groups_[name];
    changes.groups.push_back(std::move(group));
    return changes;
  }
  std::string Expected() const {
    std::vector<GroupState> stored;
    for (const auto& [name, layers] : groups_) {
      stored.push_back(MakeGroup(name, {}));
      for (const auto& [layer, state] : layers) stored.back().layers.push_back(state);
    }
    return Dump(stored);
  }

 private:
  std::mt19937 random_;
  std::map<std::string, std::map<std::string, LayerState>> groups_;
};

class DiskTest : public ::testing::TestWithParam<Fault> {
 protected:
  void TearDown() override { SetFault(Fault::kNone); }
};

TEST_P(DiskTest, AtAnyWriteAllOrNothingIsStoredAndItMayBeTriedAgain) {
  // A disk that is full, or broken, for a while: the same store goes on afterwards.
  for (int64_t good = 0; good < 60; ++good) {
    const TemporaryDirectory directory;
    History history(static_cast<uint32_t>(good));
    Opened opened = Open(directory.path(), FaultVfs());
    ASSERT_TRUE(opened.status.ok()) << opened.status;
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(opened.store->Save(history.Next()).ok());
    SetFault(GetParam(), good);
    for (int i = 0; i < 4; ++i) {
      const StateChanges changes = history.Next();
      while (!opened.store->Save(changes).ok()) SetFault(Fault::kNone);
    }
    opened.store.reset();
    SetFault(Fault::kNone);
    EXPECT_EQ(Open(directory.path()).dump, history.Expected()) << "after " << good << " good writes";
  }
}

INSTANTIATE_TEST_SUITE_P(Faults, DiskTest, ::testing::Values(Fault::kFull, Fault::kBroken));

TEST_F(DiskTest, KilledAtAnyWriteTheStoreHasWhatWasStoredBefore) {
  // From the write at which it is killed on, nothing reaches the file: what comes back is the state after one of the
  // saves, and not before the last one that was done.
  int64_t writes = 1;
  for (int64_t good = 0; good < writes; ++good) {
    const TemporaryDirectory directory;
    History history(7);
    std::vector<std::string> after = {""};
    Opened opened = Open(directory.path(), FaultVfs());
    ASSERT_TRUE(opened.status.ok()) << opened.status;
    SetFault(Fault::kDead, good);
    size_t done = 0;
    for (int i = 0; i < 6; ++i) {
      const bool saved = opened.store->Save(history.Next()).ok();
      after.push_back(history.Expected());
      if (saved && FaultCalls() <= good) done = after.size() - 1;
    }
    writes = std::max(writes, FaultCalls());
    opened.store.reset();  // Its own writes do nothing either.
    SetFault(Fault::kNone);
    opened = Open(directory.path());
    ASSERT_TRUE(opened.status.ok()) << "killed after " << good << " writes: " << opened.status;
    const std::vector<std::string> possible(after.begin() + done, after.end());
    EXPECT_THAT(possible, ::testing::Contains(opened.dump)) << "killed after " << good << " writes";
  }
  EXPECT_GT(writes, 20);
}

// Returns what is stored of groups and layers, each by itself.
std::set<std::string> Pieces(const std::string& dump) { return absl::StrSplit(dump, '\n'); }

// SQLite moves the log to the file when the store is closed. Somebody who removes the log of a master that was killed
// meanwhile leaves a part of that.
TEST_F(DiskTest, KilledAtAnyWriteAndItsLogLostTheStoreIsRefusedOrOfWholeLayers) {
  int64_t writes = 1;
  int refused = 0;
  for (int64_t good = 0; good < writes; ++good) {
    const TemporaryDirectory directory;
    History history(7);
    Opened opened = Open(directory.path(), FaultVfs());
    ASSERT_TRUE(opened.status.ok()) << opened.status;
    SetFault(Fault::kDead, good);
    std::set<std::string> stored = {""};
    for (int i = 0; i < 6; ++i) {
      (void)opened.store->Save(history.Next());
      stored.merge(Pieces(history.Expected()));
    }
    opened.store.reset();
    writes = std::max(writes, FaultCalls());
    SetFault(Fault::kNone);
    std::filesystem::remove(directory.path() + "/state.db-wal");
    opened = Open(directory.path());
    if (!opened.status.ok()) {
      ++refused;
      EXPECT_EQ(opened.status.code(), absl::StatusCode::kDataLoss) << opened.status;
      continue;
    }
    for (const std::string& piece : Pieces(opened.dump)) {
      EXPECT_EQ(stored.count(piece), 1u) << "killed after " << good << " writes: " << piece;
    }
  }
  std::printf("%d of %d are refused\n", refused, static_cast<int>(writes));
  EXPECT_GT(refused, 0);
  EXPECT_LT(refused, writes);
}

}  // namespace
}  // namespace syncbn::state
