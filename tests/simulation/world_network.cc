// The master of a simulated world, and the streams that lead to it.

#include <algorithm>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cc/errors.h"
#include "tests/simulation/world.h"

namespace syncbn::simulation {

using core::StreamId;

namespace {

std::string WithoutRanks(const std::vector<core::Rank>& left) {
  return left.empty() ? "" : absl::StrCat(" without ", absl::StrJoin(left, ","));
}

std::string Describe(const core::Membership& membership) {
  return absl::StrCat(" membership ", membership.version, WithoutRanks(membership.left_ranks));
}

}  // namespace

// ---- The master -----------------------------------------------------------------------------------------------------

void World::StartMaster() {
  ++masters_;
  master_ = std::make_unique<Mutant>(bugs_.master, masters_);
  model_ = std::make_unique<Model>(settings_, &incarnations_, &report_.tally);
}

bool World::RestartMaster() {
  if (master_ == nullptr) return false;
  if (settings_.workers_die && IsMissed()) return false;
  ++report_.master_restarts;
  model_->CheckStatistics(master_->coordinator());
  const bool orderly = settings_.only_deaths ? shutdowns_.Chance(0.5) && !SomeoneIsAboutToLeave() : random_.Chance(0.5);
  Note(orderly ? "the master shuts down" : "the master crashes");
  if (orderly) {
    model_->BeforeShutdown();
    Feed(master_->On(core::Shutdown(), Now()));
  }
  NoteViolation(model_->violation());
  master_.reset();
  for (StreamId id = 1; id <= streams_.size(); ++id) {
    if (StreamOf(id).master == masters_ && !StreamOf(id).dead) Break(id);
  }
  Schedule(now_ + random_.Between(1'000, 30'000), Kind::kMasterUp, 0);
  return true;
}

bool World::SomeoneIsAboutToLeave() const {
  return std::any_of(lives_.begin(), lives_.end(), [](const Life& life) {
    return life.alive && life.session->LeaveDue() == absl::InfiniteFuture() && life.trainer.finished();
  });
}

bool World::IsMissed() const {
  for (const Life& gone : lives_) {
    if (gone.session->LeaveDue() != absl::InfiniteFuture()) return true;
    if (!gone.left && (gone.stream == 0 || !streams_[gone.stream - 1].left)) continue;
    const core::Rank rank = gone.trainer.rank();
    const auto knows = [&](const ContributionRef& awaited) {
      const auto told = outcomes_.find(awaited->key());
      return told != outcomes_.end() &&
             !std::count(told->second.missing_ranks.begin(), told->second.missing_ranks.end(), rank);
    };
    for (const Life& life : lives_) {
      const auto& waiting = life.trainer.waiting();
      if (!life.alive || &life == &gone || life.session->run_id() == 0) continue;
      if (!life.session->KnowsLeft(rank) || std::any_of(waiting.begin(), waiting.end(), knows)) return true;
    }
  }
  return false;
}

void World::ToMaster(const Item& item) {
  const Stream& stream = StreamOf(item.id);
  if (master_ == nullptr || stream.master != masters_ || stream.gone || stream.drops || stream.mute_to_master) return;
  if (now_ < stream.late_until) return PutOff(item, stream.late_until);
  if (log_ != Log::kNone) LogFrame(item);
  model_->BeforeFrame(item.id, *item.to_master, Now());
  Feed(master_->OnFrame(item.id, *item.to_master, Now()));
}

void World::MasterSeesClose(StreamId id) {
  Stream& stream = StreamOf(id);
  if (stream.gone || stream.master != masters_ || master_ == nullptr) return;
  stream.gone = true;
  Note("the master sees stream ", id, " close");
  model_->BeforeClose(id, Now());
  Feed(master_->OnClosed(id, Now()));
}

void World::Feed(const core::Effects& effects) {
  master_->coordinator().CheckInvariants();
  model_->After(effects, master_->coordinator(), Now());
  for (const core::Effect& effect : effects) {
    if (log_ != Log::kNone) LogEffect(effect);
    Item item;
    if (const auto* close = std::get_if<core::CloseStream>(&effect)) {
      item.kind = Kind::kWorkerSeesClose;
      StreamOf(close->stream).left = !close->error.has_value();
      item.why = std::make_shared<session::Break>(
          session::Break{close->error.has_value() ? ToStatus(*close->error, "") : absl::OkStatus()});
      Deliver(close->stream, std::move(item));
      continue;
    }
    item.kind = Kind::kToWorker;
    item.to_worker = ToSession(effect);
    if (item.to_worker == nullptr) continue;
    for (const StreamId stream : ReceiversOf(effect)) Deliver(stream, item);
  }
}

// ---- The streams ----------------------------------------------------------------------------------------------------

void World::Deliver(StreamId id, Item item) {
  Stream& stream = StreamOf(id);
  if (stream.dead || stream.mute_to_worker) return;
  stream.last_to_worker = std::max(stream.last_to_worker, now_ + Delay());
  item.at = stream.last_to_worker;
  item.id = id;
  Push(std::move(item));
}

void World::Send(StreamId id, FramePtr frame) {
  Stream& stream = StreamOf(id);
  for (const core::LayerSpec& spec : frame->layers) stream.said[spec.name] = spec.channels;
  stream.caught_up = stream.caught_up || frame->caught_up;
  stream.forgotten.insert(stream.forgotten.end(), frame->forgotten.begin(), frame->forgotten.end());
  stream.last_to_master = std::max(stream.last_to_master, now_ + Delay());
  Push({stream.last_to_master, 0, Kind::kToMaster, id, std::move(frame), nullptr, nullptr});
}

void World::Break(StreamId id, bool worker_knows) {
  Stream& stream = StreamOf(id);
  if (stream.dead) return;
  ++report_.broken_streams;
  Note("stream ", id, " breaks");
  stream.dead = true;
  stream.drops = random_.Chance(0.5);
  const bool late = random_.Chance(0.5);
  if (late) stream.late_until = now_ + random_.Between(0, 50'000);
  if (late && random_.Chance(0.3)) Echo(id, settings_.only_deaths ? 0.0 : 0.5);
  const Micros seen = late ? stream.late_until + random_.Between(0, 30'000) : now_ + Delay();
  Schedule(seen, Kind::kMasterSeesClose, id);
  if (worker_knows) return;
  const auto why =
      std::make_shared<session::Break>(session::Break{absl::UnavailableError("broken"), session::Break::Cause::kOther});
  Push({now_ + Delay(), 0, Kind::kWorkerSeesClose, id, nullptr, nullptr, why});
}

// ---- The log --------------------------------------------------------------------------------------------------------

void World::LogFrame(const Item& item) {
  const Frame& frame = *item.to_master;
  std::string text =
      absl::StrCat("stream ", item.id, " (rank ", lives_[StreamOf(item.id).life].trainer.rank(), ") says");
  if (frame.join.has_value()) {
    absl::StrAppend(&text, " join as ", frame.join->incarnation, WithoutRanks(frame.join->left_ranks));
  }
  for (const core::LayerSpec& spec : frame.layers) absl::StrAppend(&text, " ", spec.name, ":", spec.channels);
  for (const Part& part : frame.parts) {
    absl::StrAppend(&text, part.report != nullptr ? " knows " : " ", Name(part.key));
    if (!part.numbers->first.empty()) absl::StrAppend(&text, " (", part.numbers->first[0], ")");
  }
  if (frame.caught_up) absl::StrAppend(&text, " caught up");
  for (const RoundKey& key : frame.forgotten) absl::StrAppend(&text, " forgot ", Name(key));
  if (!frame.blocked_on.empty()) absl::StrAppend(&text, " blocked on ", Name(frame.blocked_on[0]));
  if (frame.leave) absl::StrAppend(&text, " leave");
  absl::StrAppend(&text, WithoutRanks(frame.left_ranks));
  if (frame.membership_read != 0) absl::StrAppend(&text, " has read ", frame.membership_read);
  Note(text);
}

void World::LogEffect(const core::Effect& effect) {
  if (const auto* joined = std::get_if<core::SendJoined>(&effect)) {
    Note("-> stream ", joined->stream, ": joined as ", joined->incarnation, ", run ", joined->run_id,
         Describe(joined->membership));
  } else if (const auto* news = std::get_if<core::SendMembership>(&effect)) {
    for (const StreamId stream : news->streams) Note("-> stream ", stream, ":", Describe(news->membership));
  } else if (const auto* results = std::get_if<core::SendResults>(&effect)) {
    for (const StreamId stream : results->streams) {
      for (const auto& outcome : results->outcomes) {
        Note("-> stream ", stream, ": ", Name(outcome->key), " ",
             outcome->error.has_value() ? outcome->error->message : "done");
      }
    }
  } else if (const auto* close = std::get_if<core::CloseStream>(&effect)) {
    Note("-> stream ", close->stream, ": closed ", close->error.has_value() ? close->error->message : "");
  }
}

}  // namespace syncbn::simulation
