// A master, its workers and the network between them, on a virtual clock; everything follows from one seed.

#ifndef SYNCBN_TESTS_SIMULATION_WORLD_H_
#define SYNCBN_TESTS_SIMULATION_WORLD_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/cc/session/session.h"
#include "tests/simulation/checked_session.h"
#include "tests/simulation/frame.h"
#include "tests/simulation/model.h"
#include "tests/simulation/mutant.h"
#include "tests/simulation/random.h"
#include "tests/simulation/settings.h"
#include "tests/simulation/simulation.h"
#include "tests/simulation/trainer.h"

namespace syncbn::simulation {

// Microseconds since the schedule began.
using Micros = int64_t;
inline constexpr Micros kNever = INT64_MAX;
inline constexpr Micros kFaultsEnd = 100'000;
inline constexpr absl::Time kEpoch = absl::FromUnixSeconds(1'700'000'000);

class World {
 public:
  World(uint64_t seed, Bugs bugs, Log log);

  // Adds a crash to those that the seed decides.
  void AskForDeath(const Death& death) { death_ = death; }
  Report Run();

 private:
  enum class Kind {
    kToMaster,
    kToWorker,
    kStreamUp,
    kWritten,
    kMasterSeesClose,
    kWorkerSeesClose,
    kAct,
    kSpawn,
    kFault,
    kMasterUp
  };

  // Something that happens later.
  struct Item {
    Micros at = 0;
    uint64_t order = 0;
    Kind kind = Kind::kAct;
    uint64_t id = 0;  // A stream, a life or a rank.
    FramePtr to_master;
    ServerFramePtr to_worker;
    std::shared_ptr<const session::Break> why;
  };

  // The turn of an item, which itself does not move while its turn changes places in the heap.
  struct Turn {
    Micros at = 0;
    uint64_t order = 0;
    size_t item = 0;  // Its place in items_.

    friend bool operator<(const Turn& a, const Turn& b) {  // The greatest comes first.
      return std::tie(b.at, b.order) < std::tie(a.at, a.order);
    }
  };

  struct Stream {
    size_t life = 0;
    uint64_t master = 0;          // The number of the master that it leads to; 0 if it leads to none.
    bool dead = false;            // Nothing reaches the worker any more,
    bool drops = false;           // nor the master.
    bool mute_to_master = false;  // Nothing reaches the master, and nobody notices yet;
    bool mute_to_worker = false;  // the same in the other direction.
    bool gone = false;            // The master has seen it close.
    bool left = false;            // The master has acknowledged a leave on it.
    Micros late_until = 0;        // Frames that were under way when it broke reach the master then.
    Micros last_to_master = 0;
    Micros last_to_worker = 0;
    size_t first_sent = 0;                         // The place in Life::sent of the first part that it has had.
    bool caught_up = false;                        // Its worker has given this master all that it keeps.
    std::map<core::RoundKey, int> changed_echoes;  // Echoes with other numbers that wait for their refusal.
    std::map<std::string, uint32_t> said;          // Channels of the layers, as they were declared last.
    std::vector<core::RoundKey> forgotten;         // As its worker has said: these, and those before.
  };

  // One process of a worker.
  struct Life {
    explicit Life(Trainer program) : trainer(std::move(program)) {}

    Trainer trainer;
    std::unique_ptr<CheckedSession> session;
    bool alive = true;
    bool left = false;
    uint64_t first = 0;         // The sequence that it began with.
    core::StreamId stream = 0;  // The newest; 0 if it has none.
    Micros stalled_since = 0;
    Micros stalled_until = 0;
    Micros due = kNever;     // When its session or its program has something to do; kNever if nothing waits for time.
    std::vector<Part> sent;  // For echoes.
  };

  // ---- The schedule
  void Draw();
  void DrawLayers();
  void DrawHabits();
  void DrawOnlyDeaths();
  void DrawRaises(Random random);
  core::GroupConfig DrawConfig();
  template <typename... Args>
  void Note(const Args&... args) {
    if (log_ == Log::kNone) return;
    std::string line = absl::StrCat(now_, " us: ", args...);
    if (log_ == Log::kPrint) std::fprintf(stderr, "%s\n", line.c_str());
    if (log_ == Log::kKeep) report_.log.push_back(std::move(line));
  }
  absl::Time Now() const { return time_; }
  void SetNow(Micros now) {
    if (now == now_) return;
    now_ = now;
    time_ = kEpoch + absl::Microseconds(now);
  }
  // The first microsecond at or after `time`.
  Micros ToMicros(absl::Time time) const;
  Micros Delay() {
    const bool slow = now_ < kFaultsEnd && random_.Chance(slow_);
    return slow ? random_.Between(2'000, 120'000) : random_.Between(50, 1'500);
  }
  void Push(Item&& item);
  // Moves an item to a later time. It stays before what was pushed after it, as in a stream.
  void PutOff(Item item, Micros at);
  void Queue(Item&& item);
  Item Pop();
  void Schedule(Micros at, Kind kind, uint64_t id) { Push({at, 0, kind, id, nullptr, nullptr, nullptr}); }
  bool Settled() const;
  bool Step();
  void Handle(const Item& item);
  void PassTime();
  void End();
  void NoteViolation(const std::optional<std::string>& violation) {
    if (!report_.violation.has_value()) report_.violation = violation;
  }

  // ---- The master, and the network
  Stream& StreamOf(core::StreamId id) { return streams_[id - 1]; }
  void Feed(const core::Effects& effects);
  void ToMaster(const Item& item);
  void MasterSeesClose(core::StreamId id);
  void Deliver(core::StreamId id, Item item);
  void Send(core::StreamId id, FramePtr frame);
  // Loses what is on its way to the worker, and loses or delays what is on its way to the master. Each side learns of
  // it in its own time; the worker not at all if it has closed the stream itself (`worker_knows`).
  void Break(core::StreamId id, bool worker_knows = false);
  void StartMaster();
  // Returns false if it does not happen: no master is up, or more than a death would come of it.
  bool RestartMaster();
  // Returns whether a master that dies now is missed where workers die, too: a successor cannot ask one that leaves or
  // has left.
  bool IsMissed() const;
  // Returns whether a worker has all outcomes, and has not begun to leave. Told that the master goes away, it would not
  // wait for another to leave there: a case that remains in PROTOCOL.md, section 6.
  bool SomeoneIsAboutToLeave() const;
  void LogFrame(const Item& item);
  void LogEffect(const core::Effect& effect);

  // ---- The workers
  void Spawn(core::Rank rank);
  // Sees to it that some life of the rank goes on, or has come to its end.
  void EnsureLife(core::Rank rank);
  // Returns false while the process stands still, or is dead; `item` comes again when it goes on.
  bool Attend(size_t index, const Item* item);
  // Does what a waiting thread does: it serves the timers, and sends what there is to send.
  void Drive(size_t index);
  void ServeTimers(size_t index);
  void Act(size_t index);
  void OnStreamUp(const Item& item);
  void OnWritten(const Item& item);
  void ToWorker(const Item& item);
  void WorkerSeesClose(const Item& item);
  void Apply(size_t index, const session::Effects& effects);
  void Apply(size_t index, const session::FindMaster& find);
  void Apply(size_t index, const session::Connect& connect);
  void Apply(size_t index, const session::Write& write);
  void Apply(size_t index, const session::CloseStream& close);
  void Apply(size_t index, const session::Complete& complete);
  void Apply(size_t index, const session::JoinedGroup& joined);
  void Apply(size_t index, const session::Notice& notice);
  void Apply(size_t index, const session::Ended& ended);
  void CheckOutcome(const session::Complete& complete);

  // ---- Faults, and what no honest session does
  void Fault();
  void Crash(size_t index);
  void DieAsAsked(const Death& death);
  // Returns whether the worker may die in a schedule of deaths alone, and everybody can still go on.
  bool MayDie(size_t index) const;
  void Stall(Life& life);
  void CutOneWay(core::StreamId id);
  void Intrude(size_t index);
  void Echo(core::StreamId id, double changed);
  // Takes the answers to echoes with other numbers out of a frame, which are not the worker's.
  session::ServerFrame WithoutEchoes(Stream& stream, const session::ServerFrame& frame);

  Random random_;
  Random shutdowns_;  // Decides which deaths of masters are orderly where only deaths happen.
  const Bugs bugs_;
  const Log log_;
  Report report_;
  Settings settings_;
  Habits habits_;
  double slow_ = 0.0;
  double echoes_ = 0.0;          // A frame is followed by something that was sent before,
  double changed_echoes_ = 0.0;  // and that has other numbers.

  Micros now_ = 0;
  absl::Time time_ = kEpoch;  // The same.
  uint64_t pushed_ = 0;
  std::vector<Turn> queue_;  // A heap; the turn that is next is its front.
  std::vector<Item> items_;
  std::vector<size_t> free_items_;  // Places in items_ of no turn.
  Incarnations incarnations_;
  std::unique_ptr<Mutant> master_;  // Null while it is down.
  std::unique_ptr<Model> model_;
  uint64_t masters_ = 0;
  std::vector<Stream> streams_;
  std::vector<Life> lives_;
  std::vector<int> spawning_;  // By rank: spawns that are under way.
  std::optional<Death> death_;
  std::optional<core::Rank> last_died_;
  std::map<core::Rank, uint64_t> died_at_;          // The sequence that the rank's newest life to die had reached.
  std::map<core::RoundKey, RoundResult> outcomes_;  // As the first worker was told.
};

}  // namespace syncbn::simulation

#endif  // SYNCBN_TESTS_SIMULATION_WORLD_H_
