#include "tests/simulation/simulation.h"

#include <algorithm>
#include <memory>
#include <queue>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "tests/simulation/worker.h"

namespace syncbn::simulation {
namespace {

using core::Rank;
using core::StreamId;

// Microseconds since the schedule began.
using Micros = int64_t;
constexpr Micros kFaultsEnd = 100'000;
constexpr Micros kEverythingEnds = kFaultsEnd + 60'000'000;
constexpr uint64_t kMostEvents = 50'000;

enum class Kind { kToMaster, kToWorker, kMasterSeesClose, kWorkerSeesClose, kConnect, kAct, kSpawn, kFault, kMasterUp };

using Outcomes = std::vector<std::shared_ptr<const core::RoundOutcome>>;

struct Item {
  Micros at = 0;
  uint64_t order = 0;
  Kind kind = Kind::kAct;
  uint64_t id = 0;  // A stream, a life or a rank.
  FramePtr frame;
  std::shared_ptr<const core::SendJoined> joined;
  std::shared_ptr<const Outcomes> outcomes;
  std::string reason;

  friend bool operator<(const Item& a, const Item& b) {  // The greatest comes first.
    return std::tie(b.at, b.order) < std::tie(a.at, a.order);
  }
};

struct Stream {
  size_t life = 0;
  uint64_t master = 0;    // Which life of the master it leads to.
  bool dead = false;      // Nothing reaches the worker any more,
  bool drops = false;     // nor the master.
  bool gone = false;      // The master has seen it close.
  Micros late_until = 0;  // What was on its way when it broke reaches the master then.
  Micros last_to_master = 0;
  Micros last_to_worker = 0;
};

struct Life {
  Worker worker;
  bool alive = true;
  bool joined = false;
  StreamId stream = 0;
  Micros stalled_until = 0;
};

class World {
 public:
  World(uint64_t seed, Bug bug, bool keep_log) : random_(seed), bug_(bug), keep_log_(keep_log) { Draw(); }

  Report Run();

 private:
  void Draw();
  core::GroupConfig DrawConfig();
  template <typename... Args>
  void Log(const Args&... args) {
    if (keep_log_) report_.log.push_back(absl::StrCat(now_, " us: ", args...));
  }
  absl::Time Now() const { return absl::FromUnixSeconds(1'700'000'000) + absl::Microseconds(now_); }
  Micros Delay() {
    const bool slow = now_ < kFaultsEnd && random_.Chance(slow_);
    return slow ? random_.Between(2'000, 120'000) : random_.Between(50, 1'500);
  }
  Item& Push(Micros at, Kind kind, uint64_t id);
  void Flush() {
    queue_.push(std::move(staged_));
    staged_ = Item();
  }
  void Schedule(Micros at, Kind kind, uint64_t id) {
    Push(at, kind, id);
    Flush();
  }
  bool Settled() const;
  bool Step();
  void Handle(const Item& item);
  void PassTime();
  void End();

  // ---- The master
  void Feed(const core::Effects& effects);
  void ToMaster(const Item& item);
  void RestartMaster();
  void Deliver(StreamId stream, Kind kind, const std::shared_ptr<const core::SendJoined>& joined,
               const std::shared_ptr<const Outcomes>& outcomes, const std::string& reason);

  // ---- The network
  Stream& StreamOf(StreamId id) { return streams_[id - 1]; }
  void Send(Life& life, FramePtr frame);
  void Break(StreamId id);

  // ---- The workers
  void Spawn(Rank rank);
  void EnsureLife(Rank rank);
  void Connect(size_t life);
  void Act(size_t life);
  void ToWorker(const Item& item);
  void WorkerSeesClose(const Item& item);
  void Fault();
  void Intrude(size_t life);

  Random random_;
  const Bug bug_;
  const bool keep_log_;
  Report report_;
  Settings settings_;
  Habits habits_;
  double slow_ = 0.0;

  Micros now_ = 0;
  uint64_t pushed_ = 0;
  Item staged_;
  std::priority_queue<Item> queue_;
  Incarnations incarnations_;
  std::unique_ptr<Mutant> master_;  // Null while it is down.
  std::unique_ptr<Model> model_;
  uint64_t masters_ = 0;
  std::vector<Stream> streams_;
  std::vector<Life> lives_;
  std::vector<int> spawning_;  // By rank: spawns that are under way.
};

// ---- The schedule ---------------------------------------------------------------------------------------------------

core::GroupConfig World::DrawConfig() {
  core::GroupConfig config;
  config.round_timeout = absl::Milliseconds(random_.Between(30, 300));
  config.rejoin_grace = absl::Milliseconds(random_.Chance(0.3) ? 0 : random_.Between(1, 60));
  if (random_.Chance(0.4)) {
    config.missing_policy = core::MissingPolicy::kProceed;
    config.min_workers = static_cast<uint32_t>(random_.Between(1, settings_.world_size));
  }
  return config;
}

void World::Draw() {
  settings_.world_size = static_cast<uint32_t>(random_.Between(2, 6));
  settings_.config = DrawConfig();
  const int64_t layers = random_.Between(1, 3);
  for (int64_t i = 0; i < layers; ++i) {
    core::LayerSpec spec = testing::BatchNormLayer(std::string(1, static_cast<char>('a' + i)),
                                                   static_cast<uint32_t>(random_.Between(1, 3)));
    if (random_.Chance(0.5)) spec.momentum = 0.1;
    spec.biased_running_variance = random_.Chance(0.3);
    settings_.layers.push_back(std::move(spec));
  }
  if (random_.Chance(0.5)) settings_.layers.push_back(testing::SumLayer("s", 2));
  habits_.sequences = random_.Between(1, 3);
  habits_.one_by_one = random_.Chance(0.2);
  habits_.says_blocked = random_.Chance(0.6);
  habits_.bad_numbers = random_.Chance(0.2) ? 0.03 : 0.0;
  habits_.repeats = random_.Chance(0.5) ? 0.2 : 0.0;
  habits_.changed_repeats = random_.Chance(0.3) ? 0.3 : 0.0;
  habits_.odd_roles = random_.Chance(0.3) ? 0.3 : 0.0;
  habits_.offset = random_.Chance(0.5) ? 1e4 : 0.0;
  slow_ = random_.Chance(0.3) ? 0.05 : 0.0;
  if (habits_.sequences > 1 && random_.Chance(0.4)) {
    settings_.redeclared_at = random_.Between(1, habits_.sequences - 1);
    settings_.later = settings_.layers;
    for (core::LayerSpec& spec : settings_.later) spec.channels += random_.Between(1, 2);
  }

  masters_ = 1;
  master_ = std::make_unique<Mutant>(bug_);
  model_ = std::make_unique<Model>(settings_, &incarnations_, &report_.tally);
  spawning_.assign(settings_.world_size, 0);
  for (Rank rank = 0; rank < settings_.world_size; ++rank) {
    ++spawning_[rank];
    Schedule(random_.Between(0, 3'000), Kind::kSpawn, rank);
  }
  const int64_t faults = random_.Between(0, 6);
  for (int64_t i = 0; i < faults; ++i) Schedule(random_.Between(500, 40'000), Kind::kFault, 0);
  Log(settings_.world_size, " workers, ", settings_.layers.size(), " layers, ", habits_.sequences,
      " sequences, timeout ", absl::FormatDuration(*settings_.config.round_timeout), ", grace ",
      absl::FormatDuration(*settings_.config.rejoin_grace), ", min_workers ", settings_.config.min_workers);
}

Item& World::Push(Micros at, Kind kind, uint64_t id) {
  staged_.at = at;
  staged_.order = ++pushed_;
  staged_.kind = kind;
  staged_.id = id;
  return staged_;
}

Report World::Run() {
  while (!report_.violation.has_value() && Step()) {
  }
  if (!report_.violation.has_value()) End();
  return std::move(report_);
}

bool World::Settled() const {
  for (const Life& life : lives_) {
    if (life.alive && !life.worker.leaving()) return false;
  }
  return queue_.empty();
}

// Handles what comes next; false once everything has ended.
bool World::Step() {
  if (Settled()) return false;
  if (++report_.events > kMostEvents || now_ > kEverythingEnds) {
    report_.violation = "workers still wait, long after the faults have ended";
    return false;
  }
  const absl::Time deadline = master_ == nullptr ? absl::InfiniteFuture() : master_->NextDeadline();
  const Micros alarm =
      deadline == absl::InfiniteFuture() ? INT64_MAX : absl::ToInt64Microseconds(deadline - Now()) + now_;
  if (queue_.empty() && alarm == INT64_MAX) {
    report_.violation = "workers wait, and nothing is due";
    return false;
  }
  if (queue_.empty() || alarm <= queue_.top().at) {
    now_ = std::max(now_, alarm);
    PassTime();
  } else {
    const Item item = queue_.top();
    queue_.pop();
    now_ = std::max(now_, item.at);
    Handle(item);
  }
  if (model_->violation().has_value()) report_.violation = model_->violation();
  return true;
}

void World::PassTime() {
  model_->BeforeTime();
  Feed(master_->On(core::TimePassed(), Now()));
}

// Nobody is left; the master forgets everything in time.
void World::End() {
  bool checked = false;
  while (master_->NextDeadline() != absl::InfiniteFuture()) {
    if (model_->pending() == 0 && !checked) {
      model_->CheckStatistics(master_->coordinator());
      checked = true;
    }
    now_ += std::max<Micros>(0, absl::ToInt64Microseconds(master_->NextDeadline() - Now()));
    PassTime();
  }
  model_->CheckEmpty(master_->coordinator());
  report_.violation = model_->violation();
}

void World::Handle(const Item& item) {
  switch (item.kind) {
    case Kind::kToMaster:
      return ToMaster(item);
    case Kind::kToWorker:
      return ToWorker(item);
    case Kind::kMasterSeesClose: {
      Stream& stream = StreamOf(item.id);
      if (stream.gone || stream.master != masters_ || master_ == nullptr) return;
      stream.gone = true;
      Log("the master sees stream ", item.id, " close");
      model_->BeforeClose(item.id, Now());
      return Feed(master_->OnClosed(item.id, Now()));
    }
    case Kind::kWorkerSeesClose:
      return WorkerSeesClose(item);
    case Kind::kConnect:
      return Connect(item.id);
    case Kind::kAct:
      return Act(item.id);
    case Kind::kSpawn:
      --spawning_[item.id];
      return Spawn(static_cast<Rank>(item.id));
    case Kind::kFault:
      return Fault();
    case Kind::kMasterUp:
      Log("a master starts");
      ++masters_;
      master_ = std::make_unique<Mutant>(bug_);
      model_ = std::make_unique<Model>(settings_, &incarnations_, &report_.tally);
  }
}

// ---- The master -----------------------------------------------------------------------------------------------------

void World::ToMaster(const Item& item) {
  const Stream& stream = StreamOf(item.id);
  if (master_ == nullptr || stream.master != masters_ || stream.gone || stream.drops) return;
  if (now_ < stream.late_until) {
    Item later = item;
    later.at = stream.late_until;
    later.order = ++pushed_;
    queue_.push(std::move(later));
    return;
  }
  if (keep_log_) {
    std::string text = absl::StrCat("stream ", item.id, " (rank ", lives_[stream.life].worker.rank(), ") says");
    if (item.frame->join.has_value()) absl::StrAppend(&text, " join as ", item.frame->join->incarnation);
    for (const Part& part : item.frame->parts) {
      absl::StrAppend(&text, " ", part.key.layer, "/", part.key.sequence, "/", static_cast<int>(part.key.phase));
    }
    if (!item.frame->blocked_on.empty()) absl::StrAppend(&text, " blocked on ", item.frame->blocked_on.size());
    if (!item.frame->layers.empty()) absl::StrAppend(&text, " declares ", item.frame->layers.front().channels);
    if (item.frame->leave) absl::StrAppend(&text, " leave");
    Log(text);
  }
  model_->BeforeFrame(item.id, *item.frame, Now());
  Feed(master_->OnFrame(item.id, *item.frame, Now()));
}

void World::Feed(const core::Effects& effects) {
  master_->coordinator().CheckInvariants();
  model_->After(effects, master_->coordinator(), Now());
  for (const core::Effect& effect : effects) {
    if (const auto* joined = std::get_if<core::SendJoined>(&effect)) {
      Log("-> stream ", joined->stream, ": joined as ", joined->incarnation, ", run ", joined->run_id);
      Deliver(joined->stream, Kind::kToWorker, std::make_shared<core::SendJoined>(*joined), nullptr, "");
    } else if (const auto* results = std::get_if<core::SendResults>(&effect)) {
      const auto outcomes = std::make_shared<Outcomes>(results->outcomes);
      for (const StreamId stream : results->streams) {
        for (const auto& outcome : *outcomes) {
          Log("-> stream ", stream, ": ", outcome->key.layer, "/", outcome->key.sequence, "/",
              static_cast<int>(outcome->key.phase), " ", outcome->error.has_value() ? outcome->error->message : "done");
        }
        Deliver(stream, Kind::kToWorker, nullptr, outcomes, "");
      }
    } else if (const auto* close = std::get_if<core::CloseStream>(&effect)) {
      const std::string reason = close->error.has_value() ? close->error->reason : "";
      Log("-> stream ", close->stream, ": closed ", close->error.has_value() ? close->error->message : "");
      Deliver(close->stream, Kind::kWorkerSeesClose, nullptr, nullptr, reason);
    }
  }
}

void World::Deliver(StreamId id, Kind kind, const std::shared_ptr<const core::SendJoined>& joined,
                    const std::shared_ptr<const Outcomes>& outcomes, const std::string& reason) {
  Stream& stream = StreamOf(id);
  if (stream.dead) return;
  stream.last_to_worker = std::max(stream.last_to_worker, now_ + Delay());
  Item& item = Push(stream.last_to_worker, kind, id);
  item.joined = joined;
  item.outcomes = outcomes;
  item.reason = reason;
  Flush();
}

void World::RestartMaster() {
  if (master_ == nullptr) return;
  ++report_.master_restarts;
  model_->CheckStatistics(master_->coordinator());
  const bool orderly = random_.Chance(0.5);
  Log(orderly ? "the master shuts down" : "the master crashes");
  if (orderly) {
    model_->BeforeShutdown();
    Feed(master_->On(core::Shutdown(), Now()));
  }
  if (model_->violation().has_value()) report_.violation = model_->violation();
  master_.reset();
  for (StreamId id = 1; id <= streams_.size(); ++id) {
    if (StreamOf(id).master == masters_ && !StreamOf(id).dead) Break(id);
  }
  Schedule(now_ + random_.Between(1'000, 30'000), Kind::kMasterUp, 0);
}

// ---- The network ----------------------------------------------------------------------------------------------------

void World::Send(Life& life, FramePtr frame) {
  Stream& stream = StreamOf(life.stream);
  stream.last_to_master = std::max(stream.last_to_master, now_ + Delay());
  Push(stream.last_to_master, Kind::kToMaster, life.stream).frame = std::move(frame);
  Flush();
}

// What is on its way to the worker is lost; what is on its way to the master may be late instead. Each side learns of
// it in its own time.
void World::Break(StreamId id) {
  Stream& stream = StreamOf(id);
  if (stream.dead) return;
  ++report_.broken_streams;
  Log("stream ", id, " breaks");
  stream.dead = true;
  stream.drops = random_.Chance(0.5);
  if (random_.Chance(0.5)) stream.late_until = now_ + random_.Between(0, 20'000);
  Schedule(now_ + (random_.Chance(0.3) ? random_.Between(0, 80'000) : Delay()), Kind::kMasterSeesClose, id);
  Push(now_ + Delay(), Kind::kWorkerSeesClose, id).reason = "BROKEN";
  Flush();
}

// ---- The workers ----------------------------------------------------------------------------------------------------

void World::Spawn(Rank rank) {
  uint64_t reached = 0;  // By any life, plus one.
  const Life* predecessor = nullptr;
  for (const Life& life : lives_) {
    reached = std::max(reached, life.worker.sequence() + 1);
    if (life.worker.rank() == rank) predecessor = &life;
  }
  uint64_t first = 0;
  if (predecessor != nullptr) {
    ++report_.worker_restarts;
    // From where all have been, as from a checkpoint that is up to date; or, carelessly, from where it was.
    first = random_.Chance(0.7) ? reached : predecessor->worker.sequence();
  }
  Log("rank ", rank, " starts at sequence ", first);
  lives_.push_back(Life{Worker(rank, first, &settings_, &habits_, random_.Next())});
  Connect(lives_.size() - 1);
}

// Some life of the rank goes on, or has come to its end.
void World::EnsureLife(Rank rank) {
  if (spawning_[rank] != 0) return;
  for (const Life& life : lives_) {
    if (life.worker.rank() == rank && (life.alive || life.worker.leaving())) return;
  }
  ++spawning_[rank];
  Schedule(now_ + random_.Between(500, 30'000), Kind::kSpawn, rank);
}

void World::Connect(size_t index) {
  Life& life = lives_[index];
  if (!life.alive || life.stream != 0) return;
  if (master_ == nullptr || now_ < life.stalled_until) {
    return Schedule(std::max(life.stalled_until, now_ + random_.Between(1'000, 10'000)), Kind::kConnect, index);
  }
  streams_.push_back(Stream{index, masters_});
  life.stream = streams_.size();
  life.joined = false;
  Send(life, life.worker.JoinFrame());
}

void World::Act(size_t index) {
  Life& life = lives_[index];
  if (!life.alive || !life.joined || StreamOf(life.stream).dead) return;
  if (now_ < life.stalled_until) return Schedule(life.stalled_until, Kind::kAct, index);
  const FramePtr frame = life.worker.Next();
  if (frame == nullptr) return;
  Send(life, frame);
  if (random_.Chance(habits_.repeats)) {
    if (FramePtr repeat = life.worker.Repeat()) Send(life, std::move(repeat));
  }
  Schedule(now_ + random_.Between(10, 500), Kind::kAct, index);
}

void World::ToWorker(const Item& item) {
  const Stream& stream = StreamOf(item.id);
  Life& life = lives_[stream.life];
  if (stream.dead || !life.alive || life.stream != item.id) return;
  if (now_ < life.stalled_until) {
    Item later = item;
    later.at = life.stalled_until;
    later.order = ++pushed_;
    queue_.push(std::move(later));
    return;
  }
  if (item.joined != nullptr) {
    life.joined = true;
    life.worker.OnJoined(*item.joined);
    if (FramePtr frame = life.worker.Resend()) Send(life, std::move(frame));
  }
  if (item.outcomes != nullptr) {
    for (const auto& outcome : *item.outcomes) life.worker.OnOutcome(*outcome);
  }
  Schedule(now_ + random_.Between(10, 300), Kind::kAct, stream.life);
}

void World::WorkerSeesClose(const Item& item) {
  const Stream& stream = StreamOf(item.id);
  Life& life = lives_[stream.life];
  if (!life.alive || life.stream != item.id) return;
  life.stream = 0;
  life.joined = false;
  if (life.worker.leaving()) {
    life.alive = false;
  } else if (item.reason == "BROKEN" || item.reason == "SHUTTING_DOWN" || item.reason == "RANK_TAKEN") {
    Schedule(now_ + random_.Between(100, 10'000), Kind::kConnect, stream.life);
  } else {
    Log("rank ", life.worker.rank(), " ends with ", item.reason);
    life.alive = false;
    EnsureLife(life.worker.rank());
  }
}

void World::Fault() {
  if (lives_.empty()) return;
  const size_t index = random_.Below(lives_.size());
  Life& life = lives_[index];
  const uint64_t kind = random_.Below(11);
  if (kind == 0) return RestartMaster();
  if (kind == 10) return Intrude(index);
  if (!life.alive) return;
  const Rank rank = life.worker.rank();
  if (kind <= 4) {
    if (life.stream != 0) Break(life.stream);
  } else if (kind <= 6) {
    Log("rank ", rank, " crashes");
    life.alive = false;
    if (life.stream != 0) Break(life.stream);
    EnsureLife(rank);
  } else if (kind == 7) {
    // Whoever watches over it takes it for dead, and it is not.
    ++spawning_[rank];
    Schedule(now_ + random_.Between(0, 10'000), Kind::kSpawn, rank);
  } else {
    life.stalled_until = now_ + random_.Between(1'000, 400'000);
    Log("rank ", rank, " stalls until ", life.stalled_until);
  }
}

// Someone claims the seat of this life, and has another network.
void World::Intrude(size_t index) {
  // Where there is no group, or no run that it could belong to, its layers would be those that count.
  const bool group = std::any_of(lives_.begin(), lives_.end(), [this](const Life& life) {
    return life.joined && life.stream != 0 && StreamOf(life.stream).master == masters_;
  });
  const bool sets = !settings_.redeclared_at.has_value();
  if (master_ == nullptr || !group || !sets) return;
  auto frame = std::make_shared<Frame>(*lives_[index].worker.JoinFrame());
  if (frame->join->incarnation == 0) return;
  frame->join->layers.push_back(testing::BatchNormLayer("z", 1));
  streams_.push_back(Stream{index, masters_});
  Log("stream ", streams_.size(), " claims rank ", lives_[index].worker.rank(), " with other layers");
  Push(now_ + Delay(), Kind::kToMaster, streams_.size()).frame = std::move(frame);
  Flush();
}

}  // namespace

Report RunSchedule(uint64_t seed, Bug bug, bool keep_log) { return World(seed, bug, keep_log).Run(); }

}  // namespace syncbn::simulation
