#include "tests/simulation/world.h"

#include <algorithm>

namespace syncbn::simulation {
namespace {

constexpr Micros kEverythingEnds = kFaultsEnd + 120'000'000;
constexpr uint64_t kMostEvents = 50'000;

}  // namespace

World::World(uint64_t seed, Bugs bugs, Log log) : random_(seed), shutdowns_(seed ^ 0x5d0b), bugs_(bugs), log_(log) {
  Draw();
  DrawRaises(Random(~seed));
}

// ---- What is drawn --------------------------------------------------------------------------------------------------

core::GroupConfig World::DrawConfig() {
  core::GroupConfig config;
  config.round_timeout = absl::Milliseconds(random_.Between(30, 300));
  config.rejoin_grace = absl::Milliseconds(random_.Chance(0.3) ? 0 : random_.Between(1, 60));
  if (random_.Chance(0.4)) {
    config.missing_policy = core::MissingPolicy::kProceed;
    config.min_workers = static_cast<uint32_t>(random_.Between(1, settings_.world_size));
  } else if (random_.Chance(0.3)) {
    config.missing_policy = core::MissingPolicy::kWait;
  }
  return config;
}

void World::DrawLayers() {
  const int64_t layers = random_.Between(1, 3);
  for (int64_t i = 0; i < layers; ++i) {
    core::LayerSpec spec = testing::BatchNormLayer(std::string(1, static_cast<char>('a' + i)),
                                                   static_cast<uint32_t>(random_.Between(1, 3)));
    if (random_.Chance(0.5)) spec.momentum = 0.1;
    spec.biased_running_variance = random_.Chance(0.3);
    settings_.layers.push_back(std::move(spec));
  }
  if (random_.Chance(0.5)) settings_.layers.push_back(testing::SumLayer("s", 2));
  if (habits_.sequences > 1 && random_.Chance(0.4)) {
    settings_.complete_set = false;
    settings_.redeclared_at = random_.Between(1, habits_.sequences - 1);
    settings_.later = settings_.layers;
    for (core::LayerSpec& spec : settings_.later) spec.channels += random_.Between(1, 2);
  } else if (random_.Chance(0.25)) {
    settings_.complete_set = false;
    settings_.long_vector = random_.Between(11, 40);
    for (size_t i = 0; i * kChunkElements < settings_.long_vector; ++i) {
      const size_t elements = std::min(kChunkElements, settings_.long_vector - i * kChunkElements);
      settings_.layers.push_back(testing::SumLayer(absl::StrCat("v#", i), static_cast<uint32_t>(elements)));
    }
  }
}

void World::DrawHabits() {
  habits_.sequences = random_.Between(1, 3);
  habits_.one_by_one = random_.Chance(0.3);
  habits_.says_blocked = random_.Chance(0.6);
  habits_.second_thread = random_.Chance(0.2);
  habits_.sums_overlap = random_.Chance(0.3);
  habits_.early_leave = random_.Chance(0.2) ? 0.5 : 0.0;
  habits_.bad_numbers = random_.Chance(0.2) ? 0.03 : 0.0;
  habits_.odd_roles = random_.Chance(0.3) ? 0.3 : 0.0;
  habits_.offset = random_.Chance(0.5) ? 1e4 : 0.0;
  echoes_ = random_.Chance(0.5) ? 0.2 : 0.0;
  changed_echoes_ = random_.Chance(0.3) ? 0.3 : 0.0;
  slow_ = random_.Chance(0.3) ? 0.05 : 0.0;
  if (habits_.sequences == 1 || random_.Chance(0.7)) return;
  habits_.leaver = static_cast<core::Rank>(random_.Below(settings_.world_size));
  habits_.leaver_sequences = random_.Between(1, habits_.sequences - 1);
}

void World::DrawOnlyDeaths() {
  settings_.only_deaths = true;
  settings_.config.round_timeout = absl::Seconds(10);
  settings_.join_timeout = absl::Seconds(10);
  settings_.config.min_workers = std::min(settings_.config.min_workers, settings_.world_size - 1);
  settings_.contribution_bytes = 100;
  habits_.one_by_one = false;  // In orders of their own they wait for each other.
  habits_.early_leave = habits_.bad_numbers = 0.0;
  echoes_ = changed_echoes_ = 0.0;
  report_.deaths = Deaths::kMasters;
  if (random_.Chance(0.4)) return;
  settings_.workers_die = true;
  settings_.config.missing_policy = core::MissingPolicy::kWait;
  settings_.config.min_workers = 0;
  settings_.config.rejoin_grace = absl::Seconds(5);
  settings_.masters_die = random_.Chance(0.5);
  report_.deaths = settings_.masters_die ? Deaths::kBoth : Deaths::kWorkers;
  if (settings_.masters_die) habits_.leaver.reset();  // Its part of a step that a successor repeats may be lost.
  habits_.sequences = random_.Between(2, 5);
  if (habits_.leaver.has_value()) habits_.leaver_sequences = random_.Between(1, habits_.sequences - 1);
  habits_.sums_overlap = false;  // A step ends before the next begins, or there would be no checkpoint between them.
  habits_.numbers_seed = random_.Next();
}

void World::Draw() {
  settings_.world_size = static_cast<uint32_t>(random_.Between(2, 6));
  settings_.config = DrawConfig();
  settings_.join_timeout = absl::Milliseconds(random_.Chance(0.3) ? random_.Between(20, 200) : 3'000);
  settings_.targets = {kMaster};
  if (random_.Chance(0.3)) settings_.targets.insert(settings_.targets.begin() + random_.Below(2), "nobody:1");
  // Two to a frame, or all.
  if (random_.Chance(0.2)) settings_.contribution_bytes = size_t{9} << 20;
  DrawHabits();
  DrawLayers();
  if (random_.Chance(0.3)) DrawOnlyDeaths();
  report_.world_size = settings_.world_size;
  StartMaster();
  spawning_.assign(settings_.world_size, 0);
  for (core::Rank rank = 0; rank < settings_.world_size; ++rank) {
    ++spawning_[rank];
    Schedule(random_.Between(0, 3'000), Kind::kSpawn, rank);
  }
  const int64_t faults = random_.Between(0, 6);
  for (int64_t i = 0; i < faults; ++i) Schedule(random_.Between(500, 50'000), Kind::kFault, 0);
  Note(settings_.world_size, " workers, ", settings_.layers.size(), " layers, ", habits_.sequences,
       " sequences, timeout ", absl::FormatDuration(*settings_.config.round_timeout), ", grace ",
       absl::FormatDuration(*settings_.config.rejoin_grace), ", min_workers ", settings_.config.min_workers,
       ", join_timeout ", absl::FormatDuration(settings_.join_timeout));
}

// Draws from numbers of its own, so that the rest of a schedule, and schedules without raises, stay as they are.
void World::DrawRaises(Random random) {
  if (random.Chance(0.2)) settings_.old_rank = static_cast<core::Rank>(random.Below(settings_.world_size));
  // The number of a round tells how its layer is declared, where that changes.
  if (settings_.only_deaths || settings_.redeclared_at.has_value() || random.Chance(0.7)) return;
  habits_.raises = random.Chance(0.5) ? 0.02 : 0.2;
  habits_.gives_up = random.Chance(0.7);
  if (!habits_.gives_up || random.Chance(0.3)) return;
  settings_.only_raises = true;
  report_.deaths = Deaths::kNobody;
  settings_.old_rank.reset();
  settings_.config.missing_policy = random.Chance(0.5) ? core::MissingPolicy::kFail : core::MissingPolicy::kWait;
  settings_.config.min_workers = 0;
  settings_.config.round_timeout = absl::Milliseconds(random.Between(100, 300));
  settings_.join_timeout = absl::Seconds(10);
  habits_.sequences = 12;
  habits_.one_by_one = false;  // In orders of their own they wait for each other.
  habits_.sums_overlap = false;
  habits_.leaver.reset();
  habits_.early_leave = habits_.bad_numbers = habits_.odd_roles = 0.0;
  slow_ = echoes_ = changed_echoes_ = 0.0;
}

// ---- The course of events -------------------------------------------------------------------------------------------

Report World::Run() {
  while (!report_.violation.has_value() && Step()) {
  }
  if (!report_.violation.has_value()) End();
  return std::move(report_);
}

Micros World::ToMicros(absl::Time time) const {
  if (time == absl::InfiniteFuture()) return kNever;
  if (time <= Now()) return now_;
  return absl::ToInt64Microseconds(time - kEpoch + absl::Nanoseconds(999));
}

void World::Push(Item&& item) {
  item.order = ++pushed_;
  Queue(std::move(item));
}

void World::PutOff(Item item, Micros at) {
  item.at = at;
  Queue(std::move(item));
}

void World::Queue(Item&& item) {
  if (free_items_.empty()) {
    free_items_.push_back(items_.size());
    items_.emplace_back();
  }
  const size_t place = free_items_.back();
  free_items_.pop_back();
  queue_.push_back({item.at, item.order, place});
  items_[place] = std::move(item);
  std::push_heap(queue_.begin(), queue_.end());
}

World::Item World::Pop() {
  std::pop_heap(queue_.begin(), queue_.end());
  const size_t place = queue_.back().item;
  queue_.pop_back();
  free_items_.push_back(place);
  return std::move(items_[place]);
}

bool World::Settled() const {
  return queue_.empty() && std::none_of(lives_.begin(), lives_.end(), [](const Life& life) { return life.alive; });
}

// Handles what comes next; false once everything has ended.
bool World::Step() {
  if (death_.has_value() && death_->after_event == report_.events) DieAsAsked(*death_);
  if (Settled()) return false;
  if (++report_.events > kMostEvents || now_ > kEverythingEnds) {
    report_.violation = "workers still wait, long after the faults have ended";
    return false;
  }
  const Micros alarm = master_ == nullptr ? kNever : ToMicros(master_->NextDeadline());
  Micros due = kNever;
  size_t due_life = 0;
  for (size_t i = 0; i < lives_.size(); ++i) {
    if (lives_[i].due < due) std::tie(due, due_life) = std::make_pair(lives_[i].due, i);
  }
  const Micros next = queue_.empty() ? kNever : queue_.front().at;
  if (std::min({alarm, due, next}) == kNever) {
    report_.violation = "workers wait, and nothing is due";
    return false;
  }
  SetNow(std::max(now_, std::min({alarm, due, next})));
  if (alarm <= std::min(due, next)) {
    PassTime();
  } else if (next <= due) {
    Handle(Pop());
  } else if (Attend(due_life, nullptr)) {
    Drive(due_life);
  }
  NoteViolation(model_->violation());
  return true;
}

void World::PassTime() {
  model_->BeforeTime(Now());
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
    SetNow(ToMicros(master_->NextDeadline()));
    PassTime();
  }
  model_->CheckEmpty(master_->coordinator());
  NoteViolation(model_->violation());
}

void World::Handle(const Item& item) {
  switch (item.kind) {
    case Kind::kToMaster:
      return ToMaster(item);
    case Kind::kToWorker:
      return ToWorker(item);
    case Kind::kStreamUp:
      return OnStreamUp(item);
    case Kind::kWritten:
      return OnWritten(item);
    case Kind::kMasterSeesClose:
      return MasterSeesClose(item.id);
    case Kind::kWorkerSeesClose:
      return WorkerSeesClose(item);
    case Kind::kAct:
      return Act(item.id);
    case Kind::kSpawn:
      --spawning_[item.id];
      return Spawn(static_cast<core::Rank>(item.id));
    case Kind::kFault:
      return Fault();
    case Kind::kMasterUp:
      Note("a master starts");
      return StartMaster();
  }
}

Report RunSchedule(uint64_t seed, Bugs bugs, Log log) { return World(seed, bugs, log).Run(); }

Report RunScheduleWithDeath(uint64_t seed, const Death& death, Bugs bugs, Log log) {
  World world(seed, bugs, log);
  world.AskForDeath(death);
  return world.Run();
}

}  // namespace syncbn::simulation
