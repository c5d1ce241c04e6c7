// The workers of a simulated world: each a training program and the driver of its session.

#include <algorithm>
#include <variant>

#include "absl/strings/str_join.h"
#include "client/cc/errors.h"
#include "tests/simulation/world.h"

namespace syncbn::simulation {

using core::Rank;
using State = CheckedSession::State;

// ---- Processes ------------------------------------------------------------------------------------------------------

void World::Spawn(Rank rank) {
  uint64_t reached = 0;  // By any life, plus one.
  const Life* predecessor = nullptr;
  for (const Life& life : lives_) {
    reached = std::max(reached, life.trainer.sequence() + 1);
    if (life.trainer.rank() == rank) predecessor = &life;
  }
  uint64_t first = 0;
  if (predecessor != nullptr) {
    ++report_.worker_restarts;
    // From where all have been, as from a checkpoint that is up to date; or, carelessly, from where it was.
    first = random_.Chance(0.7) ? reached : predecessor->trainer.sequence();
  }
  if (predecessor != nullptr && settings_.workers_die) {
    // From its own checkpoint, of this step or one before it. If the master may have died too, it has to be the one
    // before: others may be one step behind, and wait for what this worker's predecessor has taken along.
    const uint64_t back = settings_.masters_die ? 1 : random_.Below(2);
    const uint64_t reached_alone = predecessor->trainer.sequence();
    first = std::max(predecessor->first, reached_alone - std::min(reached_alone, back));
    ++report_.tally.succeeded;
  }
  Note("rank ", rank, " starts at sequence ", first);
  Life life(Trainer(rank, first, &settings_, &habits_, random_.Next()));
  life.first = first;
  life.session = std::make_unique<CheckedSession>(settings_, rank, first, Now(), bugs_.session, &report_.tally);
  lives_.push_back(std::move(life));
  Drive(lives_.size() - 1);
}

void World::EnsureLife(Rank rank) {
  if (spawning_[rank] != 0) return;
  for (const Life& life : lives_) {
    if (life.trainer.rank() == rank && (life.alive || life.left)) return;
  }
  ++spawning_[rank];
  Schedule(now_ + random_.Between(500, 30'000), Kind::kSpawn, rank);
}

bool World::Attend(size_t index, const Item* item) {
  Life& life = lives_[index];
  if (!life.alive) return false;
  if (now_ < life.stalled_until) {
    if (item != nullptr) PutOff(*item, life.stalled_until);
    return false;
  }
  if (life.stalled_until != 0) {
    const absl::Duration stall = absl::Microseconds(now_ - life.stalled_since);
    life.stalled_until = 0;
    life.session->OnAttended(Now() - stall, Now());
  }
  return true;
}

// ---- Driving the session --------------------------------------------------------------------------------------------

void World::Drive(size_t index) {
  ServeTimers(index);
  Life& life = lives_[index];
  const CheckedSession& session = *life.session;
  const absl::Time next = std::min(session.NextTimer(), session.LeaveDue());
  life.due = life.alive ? std::max(ToMicros(next), life.stalled_until) : kNever;
}

void World::ServeTimers(size_t index) {
  CheckedSession& session = *lives_[index].session;
  // A target that fails may be followed by the next at once.
  for (size_t turn = 0; turn == 0 || (lives_[index].alive && session.NextTimer() <= Now()); ++turn) {
    Apply(index, session.OnTime(Now()));
    if (lives_[index].alive) Apply(index, session.Send(Now()));
    if (report_.violation.has_value()) return;
    if (turn > settings_.targets.size()) NoteViolation("session: a timer is due that was served just now");
  }
  // A leave waits for its acknowledgement not for long, and only while there is a master or one may come back.
  const bool left = session.LeaveDue() != absl::InfiniteFuture();
  const bool hopes = session.state() == State::kJoined || session.may_come_back();
  const bool waits = hopes && Now() < session.LeaveDue();
  if (lives_[index].alive && left && !waits) Apply(index, session.FinishLeave(Now()));
}

void World::Act(size_t index) {
  const Item again{0, 0, Kind::kAct, index, nullptr, nullptr, nullptr};
  if (!Attend(index, &again)) return;
  Life& life = lives_[index];
  if (life.session->run_id() == 0) return;
  if (const auto wait = life.trainer.Act(*life.session, Now())) {
    Schedule(now_ + absl::ToInt64Microseconds(*wait), Kind::kAct, index);
  }
  Drive(index);
}

void World::OnStreamUp(const Item& item) {
  const size_t index = StreamOf(item.id).life;
  if (StreamOf(item.id).dead || !Attend(index, &item) || lives_[index].stream != item.id) return;
  Apply(index, lives_[index].session->OnStreamUp(Now()));
  Drive(index);
}

void World::OnWritten(const Item& item) {
  const size_t index = StreamOf(item.id).life;
  if (!Attend(index, &item) || lives_[index].stream != item.id) return;
  lives_[index].session->OnWritten();
  Drive(index);
}

void World::ToWorker(const Item& item) {
  Stream& stream = StreamOf(item.id);
  const size_t index = stream.life;
  if (stream.mute_to_worker || !Attend(index, &item)) return;
  Life& life = lives_[index];
  const bool stale = stream.dead || life.stream != item.id;
  if (stream.changed_echoes.empty()) {
    Apply(index, life.session->OnFrame(*item.to_worker, stale, Now()));
  } else {
    Apply(index, life.session->OnFrame(WithoutEchoes(stream, *item.to_worker), stale, Now()));
  }
  if (lives_[index].alive) Drive(index);
}

void World::WorkerSeesClose(const Item& item) {
  Stream& stream = StreamOf(item.id);
  const size_t index = stream.life;
  if (!Attend(index, &item) || lives_[index].stream != item.id) return;
  lives_[index].stream = 0;
  stream.dead = true;
  Apply(index, lives_[index].session->OnStreamBroken(*item.why, Now()));
  if (lives_[index].alive) Drive(index);
}

// ---- Applying effects -----------------------------------------------------------------------------------------------

void World::Apply(size_t index, const session::Effects& effects) {
  for (const session::Effect& effect : effects) {
    std::visit([&](const auto& kind) { Apply(index, kind); }, effect);
  }
  NoteViolation(lives_[index].session->violation());
}

void World::Apply(size_t index, const session::FindMaster&) {
  absl::StatusOr<std::string> targets = absl::StrJoin(settings_.targets, ",");
  if (now_ < kFaultsEnd && !settings_.only_raises && random_.Chance(0.02))
    targets = absl::NotFoundError("nobody knows where the master is");
  Apply(index, lives_[index].session->OnMasterFound(targets, Now()));
}

void World::Apply(size_t index, const session::Connect& connect) {
  const bool up = connect.target == kMaster && master_ != nullptr;
  streams_.push_back(Stream());
  streams_.back().life = index;
  streams_.back().master = up ? masters_ : 0;
  streams_.back().first_sent = lives_[index].sent.size();
  const core::StreamId id = lives_[index].stream = streams_.size();
  const bool may_fail = now_ < kFaultsEnd && !settings_.only_deaths && !settings_.only_raises;
  const bool lost = may_fail && random_.Chance(0.02);
  if (up && !lost) return Schedule(now_ + Delay(), Kind::kStreamUp, id);
  streams_.back().dead = true;
  using Cause = session::Break::Cause;
  const auto why = std::make_shared<session::Break>(
      session::Break{absl::UnavailableError(lost ? "no answer" : "refused"), Cause::kClosedByPeer});
  const Micros delay = lost ? absl::ToInt64Microseconds(connect.timeout) : Delay();
  Push({now_ + delay, 0, Kind::kWorkerSeesClose, id, nullptr, nullptr, why});
}

void World::Apply(size_t index, const session::Write& write) {
  Life& life = lives_[index];
  const FramePtr frame = FromSession(write.frame, settings_, life.trainer.rank());
  const core::StreamId id = life.stream;
  if (id == 0) return;  // The session's checks have said so.
  Send(id, frame);
  life.sent.insert(life.sent.end(), frame->parts.begin(), frame->parts.end());
  if (!frame->join.has_value() && !frame->leave && random_.Chance(echoes_)) Echo(id, changed_echoes_);
  Schedule(now_ + (random_.Chance(0.1) ? random_.Between(50, 3'000) : random_.Between(1, 30)), Kind::kWritten, id);
}

void World::Apply(size_t index, const session::CloseStream&) {
  Life& life = lives_[index];
  if (life.stream == 0) return;
  Break(life.stream, /*worker_knows=*/true);
  life.stream = 0;
}

void World::Apply(size_t index, const session::Complete& complete) {
  if (log_ != Log::kNone) {
    Note("rank ", lives_[index].trainer.rank(), ": ", Name(complete.contribution->key()),
         " ends: ", complete.status.message());
  }
  // A worker that leaves has not waited for what it is still told: the second case that remains in PROTOCOL.md,
  // section 6.
  if (lives_[index].session->LeaveDue() == absl::InfiniteFuture()) CheckOutcome(complete);
  if (lives_[index].trainer.OnOutcome(complete)) lives_[index].session->ResumeAfter(complete.status);
  Schedule(now_ + random_.Between(10, 300), Kind::kAct, index);
}

// Every worker gets the same outcome of a round, whatever becomes of masters.
void World::CheckOutcome(const session::Complete& complete) {
  const RoundKey& key = complete.contribution->key();
  if (!complete.status.ok()) {
    // Some contribute to backward rounds that they have announced to take no part in.
    if (settings_.only_deaths && DetailsOf(complete.status).reason != "NOT_A_CONTRIBUTOR") {
      NoteViolation(absl::StrCat(Name(key), " fails, though there were only deaths: ", complete.status.message()));
    }
    return;
  }
  // Those who restart may use sequences again, and a group that proceeds does so without those that are cut off.
  const bool one = settings_.only_deaths ||
                   (report_.worker_restarts == 0 && settings_.config.missing_policy != core::MissingPolicy::kProceed);
  if (!one) return;
  const auto [first, news] = outcomes_.emplace(key, complete.result);
  if (!news && !SameResult(first->second, complete.result)) NoteViolation(absl::StrCat(Name(key), " has two outcomes"));
}

void World::Apply(size_t index, const session::JoinedGroup&) {
  Schedule(now_ + random_.Between(10, 300), Kind::kAct, index);
}

void World::Apply(size_t index, const session::Notice& notice) {
  Note("rank ", lives_[index].trainer.rank(), " notes: ", notice.text);
}

void World::Apply(size_t index, const session::Ended& ended) {
  Life& life = lives_[index];
  const Rank rank = life.trainer.rank();
  Note("rank ", rank, " ends: ", ended.why.message());
  life.alive = false;
  life.due = kNever;
  life.left = DetailsOf(ended.why).reason == "LEFT";
  if (settings_.only_deaths && !life.left) {
    NoteViolation(absl::StrCat("rank ", rank, " ends, though there were only deaths: ", ended.why.message()));
  }
  if (settings_.only_raises && (!life.left || life.trainer.failed_last())) {
    NoteViolation(absl::StrCat("rank ", rank, " has not come to agree with the others"));
  }
  report_.tally.raised += life.trainer.raised();
  EnsureLife(rank);
}

}  // namespace syncbn::simulation
