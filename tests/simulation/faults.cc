// Faults of a simulated world, and frames that no honest session sends.

#include <algorithm>
#include <limits>

#include "client/cc/errors.h"
#include "tests/simulation/world.h"

namespace syncbn::simulation {

// ---- Faults ---------------------------------------------------------------------------------------------------------

void World::Fault() {
  if (lives_.empty() || settings_.only_raises) return;
  const size_t index = random_.Below(lives_.size());
  Life& life = lives_[index];
  const uint64_t kind = random_.Below(14);
  if (settings_.only_deaths) {
    if (MayDie(index) && (!settings_.masters_die || random_.Chance(0.6))) return Crash(index);
    if (settings_.masters_die) RestartMaster();
    return;
  }
  if (kind == 0) {
    RestartMaster();
    return;
  }
  if (kind >= 12) return Intrude(index);
  if (!life.alive) return;
  if (kind <= 4) {
    if (life.stream != 0) Break(life.stream);
  } else if (kind <= 6) {
    Crash(index);
  } else if (kind == 7) {
    // A supervisor takes the process for dead and starts another, while it lives.
    const core::Rank rank = life.trainer.rank();
    ++spawning_[rank];
    Schedule(now_ + random_.Between(0, 10'000), Kind::kSpawn, rank);
  } else if (kind >= 10) {
    if (life.stream != 0) CutOneWay(life.stream);
  } else {
    Stall(life);
  }
}

bool World::MayDie(size_t index) const {
  const Life& victim = lives_[index];
  // A worker that has begun to leave does not come back.
  if (!settings_.workers_die || !victim.alive || victim.session->LeaveDue() != absl::InfiniteFuture()) return false;
  if (!settings_.masters_die) return true;
  // With a master, one worker at a time: all others have to be alive, and beyond the step in which the last one died.
  const core::Rank rank = victim.trainer.rank();
  uint64_t died_at = 0;
  for (const auto& [other, sequence] : died_at_) {
    if (other != rank) died_at = std::max(died_at, sequence + 1);
  }
  return std::all_of(spawning_.begin(), spawning_.end(), [](int spawns) { return spawns == 0; }) &&
         std::all_of(lives_.begin(), lives_.end(), [&](const Life& life) {
           const bool again = life.trainer.rank() == rank && last_died_ == rank;
           return !life.alive || again || life.trainer.sequence() >= died_at;
         });
}

void World::Crash(size_t index) {
  Life& life = lives_[index];
  last_died_ = life.trainer.rank();
  died_at_[life.trainer.rank()] = std::max(died_at_[life.trainer.rank()], life.trainer.sequence());
  Note("rank ", life.trainer.rank(), " crashes");
  life.alive = false;
  life.due = kNever;
  if (life.stream != 0) Break(life.stream, /*worker_knows=*/true);
  EnsureLife(life.trainer.rank());
}

void World::DieAsAsked(const Death& death) {
  // The newest life of a rank; none if it is dead, or has left.
  const auto find = [this](core::Rank rank) {
    return std::find_if(lives_.rbegin(), lives_.rend(),
                        [rank](const Life& life) { return life.alive && life.trainer.rank() == rank; });
  };
  bool happened = true;
  if (death.worker.has_value()) {
    const auto life = find(*death.worker);
    const size_t index = lives_.rend() - life - 1;
    happened = life != lives_.rend() && (!settings_.only_deaths || MayDie(index));
    if (happened) Crash(index);
  }
  if (death.stream.has_value()) {
    const auto life = find(*death.stream);
    happened = happened && life != lives_.rend() && life->stream != 0 && !StreamOf(life->stream).dead;
    if (happened) Break(life->stream);
  }
  if (happened && death.master) happened = settings_.masters_die && RestartMaster();
  report_.died = happened;
}

// The process stands still, and its clock does not.
void World::Stall(Life& life) {
  if (life.stalled_until == 0) life.stalled_since = now_;
  const Micros stall = random_.Chance(0.1) ? random_.Between(1'000'000, 6'000'000) : random_.Between(1'000, 400'000);
  // Later events must not overtake those that were put off until the end of an earlier stall.
  life.stalled_until = std::max(life.stalled_until, now_ + stall);
  if (life.due != kNever) life.due = std::max(life.due, life.stalled_until);
  Note("rank ", life.trainer.rank(), " stalls until ", life.stalled_until);
}

// One direction, or each, loses everything; both sides learn of it when a keepalive is not answered. What comes after
// something that was lost does not arrive either.
void World::CutOneWay(core::StreamId id) {
  Stream& stream = StreamOf(id);
  const bool to_worker = random_.Chance(0.7);
  const bool to_master = !to_worker || random_.Chance(0.2);
  stream.mute_to_worker = stream.mute_to_worker || to_worker;
  stream.mute_to_master = stream.mute_to_master || to_master;
  const Micros noticed = now_ + (random_.Chance(0.3) ? random_.Between(0, 50'000) : random_.Between(0, 8'000'000));
  Note("stream ", id, " is mute to the ", to_worker ? "worker" : "master", " until ", noticed);
  Item item{noticed, 0, Kind::kWorkerSeesClose, id, nullptr, nullptr, nullptr};
  item.why = std::make_shared<session::Break>(session::Break{absl::UnavailableError("no keepalive")});
  Push(std::move(item));
  Schedule(noticed, Kind::kMasterSeesClose, id);
}

// ---- Strangers ------------------------------------------------------------------------------------------------------

// Someone claims the seat of this life, and has another network.
void World::Intrude(size_t index) {
  // Without a group, or a run that it could belong to, the stranger's layers would be those that count.
  const bool group = std::any_of(lives_.begin(), lives_.end(), [this](const Life& life) {
    return life.alive && life.session->state() == CheckedSession::State::kJoined && life.stream != 0 &&
           StreamOf(life.stream).master == masters_;
  });
  const CheckedSession& claimed = *lives_[index].session;
  if (master_ == nullptr || !group || !settings_.complete_set || claimed.incarnation() == 0) return;
  auto frame = std::make_shared<Frame>();
  const core::Rank rank = lives_[index].trainer.rank();
  frame->join = MakeJoin(settings_, rank, claimed.incarnation(), claimed.run_id());
  frame->join->layers.push_back(testing::BatchNormLayer("z", 1));
  streams_.push_back(Stream());
  streams_.back().life = index;
  streams_.back().master = masters_;
  Note("stream ", streams_.size(), " claims rank ", rank, " with other layers");
  Send(streams_.size(), std::move(frame));
}

// Something that the stream's worker has sent before comes again on it, for no reason, perhaps with other numbers.
void World::Echo(core::StreamId id, double changed) {
  Stream& stream = StreamOf(id);
  const std::vector<Part>& sent = lives_[stream.life].sent;
  // A restarted master takes a contribution as word that its worker has no outcome of the round. No worker says so of a
  // round whose end it has yet to tell. Until it has told all, nothing comes again but what this stream has had.
  const bool has_all = masters_ == 1 || stream.caught_up;
  const size_t first = has_all ? 0 : stream.first_sent;
  if (sent.size() == first || stream.last_to_master == 0) return;  // Not even a join has been written to it.
  Part part = sent[first + random_.Below(sent.size() - first)];
  // Under another declaration it would be something else.
  const auto said = stream.said.find(part.key.layer);
  const bool declared =
      settings_.complete_set || (said != stream.said.end() && said->second == settings_.LayerOf(part.key).channels);
  if (!declared) return;
  // No worker sends again what it has said to have forgotten: the master would think that the worker still has it.
  const bool forgotten =
      std::any_of(stream.forgotten.begin(), stream.forgotten.end(), [&part](const core::RoundKey& key) {
        return key.layer == part.key.layer && key.phase == part.key.phase && part.key.sequence <= key.sequence;
      });
  if (forgotten) return;
  // A restarted master could take other numbers for the round's, before the right ones: that is more than a death.
  if (random_.Chance(has_all ? changed : 0.0)) {
    auto other = std::make_shared<testing::Numbers>(*part.numbers);
    if (other->first.empty()) return;
    other->first[0] = random_.Chance(0.2) ? std::numeric_limits<double>::quiet_NaN() : other->first[0] + 1.0;
    part.numbers = std::move(other);
    ++stream.changed_echoes[part.key];
  }
  auto frame = std::make_shared<Frame>();
  frame->parts.push_back(std::move(part));
  Send(id, std::move(frame));
}

session::ServerFrame World::WithoutEchoes(Stream& stream, const session::ServerFrame& frame) {
  session::ServerFrame filtered = frame;
  auto& outcomes = filtered.outcomes;
  const auto is_echo = [&stream](const session::Outcome& outcome) {
    const auto echo = stream.changed_echoes.find(outcome.key);
    if (echo == stream.changed_echoes.end() || echo->second == 0) return false;
    if (DetailsOf(outcome.status).reason != "PAYLOAD_CHANGED") return false;
    --echo->second;
    return true;
  };
  outcomes.erase(std::remove_if(outcomes.begin(), outcomes.end(), is_echo), outcomes.end());
  return filtered;
}

}  // namespace syncbn::simulation
