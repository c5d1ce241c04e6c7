#include "client/cc/worker_impl.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "client/cc/clock.h"
#include "client/cc/errors.h"
#include "client/cc/worker_internal.h"
#include "plumbing/check.h"
#include "plumbing/log.h"
#include "plumbing/secret.h"

namespace syncbn {
namespace {

// A wait of this length or more means that the thread does nothing else until the round has ended.
constexpr absl::Duration kLongWait = absl::Milliseconds(20);
// Upper bound on waiting for the previous write in Flush, should the master not read.
constexpr absl::Duration kFlushTimeout = absl::Milliseconds(100);
constexpr size_t kLifeKeyBytes = 16;
// The longest time that a leave may take to be acknowledged.
constexpr absl::Duration kLeaveTimeout = absl::Seconds(2);
constexpr absl::Duration kCancellationCheck = absl::Milliseconds(100);

session::Options OptionsOf(const Worker::Options& options) {
  session::Options session;
  session.rank = options.rank;
  session.join_timeout = options.join_timeout;
  session.layers = options.layers;
  session.tls = options.tls.enabled();
  // A sum that lacks a rank's vector lacks all of it, as far as one round can hold it.
  if (options.missing_policy == MissingPolicy::kProceed) session.chunks.least = session.chunks.most;
  return session;
}

}  // namespace

WorkerImpl::WorkerImpl(Worker::Options options, std::unique_ptr<Transport> transport)
    : options_(std::move(options)),
      life_key_(RandomBytes(kLifeKeyBytes)),
      session_(OptionsOf(options_), Now()),
      transport_(std::move(transport)) {}

void WorkerImpl::Abandon(WorkerImpl* impl) {
  if (!impl->forked()) delete impl;
}

// ---- Effects --------------------------------------------------------------------------------------------------------

void WorkerImpl::Apply(session::Effects&& effects) {
  for (session::Effect& effect : effects) {
    std::visit([this](auto& kind) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { Apply(kind); }, effect);
  }
}

void WorkerImpl::Apply(session::FindMaster&) {
  absl::StatusOr<std::string> targets = options_.target;
  if (options_.find_target != nullptr) {
    driving_ = true;  // Nobody else has anything to drive.
    mutex_.Unlock();
    targets = options_.find_target();
    mutex_.Lock();
    driving_ = false;
  }
  Apply(session_.OnMasterFound(targets, Now()));
}

void WorkerImpl::Apply(session::Connect& connect) { transport_->Open(connect.target, connect.timeout); }

void WorkerImpl::Apply(session::Write& write) {
  EncodeFrame(write.frame, options_, life_key_, &outgoing_);
  const bool written = transport_->Write(outgoing_);
  outgoing_.clear();
  if (written) session_.OnWritten();
}

void WorkerImpl::Apply(session::CloseStream&) { transport_->Close(); }

void WorkerImpl::Apply(session::Complete& complete) {
  auto& round = static_cast<PendingRound&>(*complete.contribution);
  SYNCBN_CHECK(!round.done, "a round ends for the second time");
  round.status = std::move(complete.status);
  round.result = std::move(complete.result);
  if (round.dropped) KeepMemory(&round.result);
  round.done = true;
}

void WorkerImpl::Apply(session::JoinedGroup& joined) {
  incarnation_ = joined.incarnation;
  run_id_ = joined.run_id;
}

void WorkerImpl::Apply(session::Notice& notice) { notices_.push_back(std::move(notice.text)); }

void WorkerImpl::Apply(session::Ended&) { changed_.SignalAll(); }

void WorkerImpl::LogNotices() {
  if (notices_.empty()) return;
  const std::vector<std::string> notices = std::exchange(notices_, {});
  mutex_.Unlock();
  for (const std::string& notice : notices) Log(LogLevel::kWarning, notice);
  mutex_.Lock();
}

// ---- Waiting --------------------------------------------------------------------------------------------------------

absl::Status WorkerImpl::Await(absl::FunctionRef<bool()> done, absl::Time deadline) {
  const uint64_t interrupts = interrupts_;
  for (bool looked = false;; looked = true) {
    if (done()) return absl::OkStatus();
    if (interrupts_ != interrupts) return InterruptedError();
    if (looked && Now() >= deadline) return PendingStatus();
    if (driving_) {
      SleepOnce(deadline);
    } else {
      DriveOnce(deadline);
    }
  }
}

void WorkerImpl::SleepOnce(absl::Time deadline) {
  Pump();  // The thread that drives may wait for long, and for something else.
  const absl::Time until = std::min(deadline, session_.NextCheck());
  changed_.WaitFor(&mutex_, until - Now());
  const absl::Time now = Now();
  session_.OnAttended(until, now);
  Apply(session_.CheckMaster(now));
}

void WorkerImpl::DriveOnce(absl::Time deadline) {
  const bool had_ended = session_.state() == State::kEnded;
  const absl::Time now = Now();
  session_.OnAttended(last_look_, now);
  Apply(session_.OnTime(now));
  // It has ended perhaps without a stream, and then no event would tell the caller, who looks again now.
  if (session_.state() == State::kEnded && !had_ended) return;
  Pump();
  const absl::Time until = std::min(deadline, session_.NextTimer());
  driving_ = true;
  mutex_.Unlock();
  transport_->Wait(until);
  mutex_.Lock();
  driving_ = false;
  last_look_ = Now();
  session_.OnAttended(until, last_look_);
  transport_->Take([this](const Transport::Event& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { OnEvent(event); });
  changed_.SignalAll();
  LogNotices();
}

void WorkerImpl::OnEvent(const Transport::Event& event) {
  using Kind = Transport::Event::Kind;
  switch (event.kind) {
    case Kind::kUp:
      return Apply(session_.OnStreamUp());
    case Kind::kFrame:
      return OnFrame(event.frame);
    case Kind::kWritten:
      return session_.OnWritten();
    case Kind::kBroken:
      return Apply(session_.OnStreamBroken(event.why, last_look_));
  }
}

void WorkerImpl::OnFrame(absl::Span<const absl::string_view> bytes) {
  if (session_.state() == State::kEnded) return;
  size_t size = 0;
  for (const absl::string_view part : bytes) size += part.size();
  if (absl::Status status = session_.CheckFrameLength(size); !status.ok()) {
    return Apply(session_.OnBadFrame(std::move(status)));
  }
  absl::StatusOr<session::ServerFrame> frame = DecodeFrame(bytes, &spare_);
  if (!frame.ok()) return Apply(session_.OnBadFrame(frame.status()));
  Apply(session_.OnFrame(*std::move(frame), last_look_));
}

void WorkerImpl::Pump() {
  // In this order: a read that waits already would make the transport send a packet for it.
  while (transport_->IsUp()) {
    session::Effects effects = session_.Send(Now());
    if (effects.empty()) break;
    Apply(std::move(effects));
  }
  transport_->Read();
}

void WorkerImpl::SendReady() {
  const auto idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !session_.writing(); };
  Await(idle, Now() + kFlushTimeout).IgnoreError();
  Pump();
}

void WorkerImpl::WakeAll() {
  changed_.SignalAll();
  if (driving_) transport_->Wake();
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

absl::Status WorkerImpl::CheckProcess() const { return forked() ? ForkedError() : absl::OkStatus(); }

absl::Status WorkerImpl::Enter() {
  if (session_.state() == State::kEnded) return session_.end();
  const std::thread::id self = std::this_thread::get_id();
  if (!user_.has_value()) user_ = self;
  if (*user_ != self && !std::exchange(several_users_, true)) session_.Unblocked(/*retract=*/true);
  return absl::OkStatus();
}

absl::Status WorkerImpl::Join() {
  absl::MutexLock lock(&mutex_);
  const auto settled = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return session_.state() == State::kJoined || session_.state() == State::kEnded;
  };
  const auto cancelled = [this] { return options_.join_is_cancelled != nullptr && options_.join_is_cancelled(); };
  absl::Status status = PendingStatus();
  while (IsPending(status)) {
    if (cancelled()) return InterruptedError();
    status =
        Await(settled, options_.join_is_cancelled == nullptr ? absl::InfiniteFuture() : Now() + kCancellationCheck);
  }
  return status.ok() ? session_.end() : status;
}

void WorkerImpl::Close() {
  absl::MutexLock lock(&mutex_);
  Apply(session_.Close());
}

absl::Status WorkerImpl::Leave(absl::string_view reason) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (session_.state() == State::kEnded) {
    return DetailsOf(session_.end()).reason == "LEFT" ? absl::OkStatus() : session_.end();
  }
  session_.Leave(reason);
  const auto ended = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    // A master that starts anew may need what this worker holds.
    return session_.state() != State::kJoined && !session_.may_come_back();
  };
  Await(ended, Now() + kLeaveTimeout).IgnoreError();
  Apply(session_.FinishLeave());
  return absl::OkStatus();
}

absl::Status WorkerImpl::WaitForMembers(absl::Duration timeout) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  const auto complete = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return session_.state() == State::kEnded ||
           (session_.state() == State::kJoined && session_.present_ranks() >= options_.world_size);
  };
  if (absl::Status status = Await(complete, Now() + timeout); !status.ok()) return status;
  return session_.end();
}

absl::Status WorkerImpl::ResumeAt(uint64_t sequence) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  return session_.ResumeAt(sequence);
}

absl::Status WorkerImpl::ResumeLayerAt(const RoundKey& key) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  return session_.ResumeLayerAt(key);
}

absl::StatusOr<std::vector<RoundKey>> WorkerImpl::NextRounds() const {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  return session_.NextRounds();
}

absl::StatusOr<std::vector<RoundKey>> WorkerImpl::NewestRounds() const {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  return session_.newest_rounds();
}

void WorkerImpl::Interrupt() {
  if (forked()) return;
  absl::MutexLock lock(&mutex_);
  ++interrupts_;
  WakeAll();
}

void WorkerImpl::Wake() {
  if (forked()) return;
  absl::MutexLock lock(&mutex_);
  WakeAll();
}

absl::Status WorkerImpl::DeclareLayer(const LayerOptions& layer) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  return session_.Declare(layer);
}

std::shared_ptr<const LayerOptions> WorkerImpl::FindLayer(absl::string_view name) const {
  if (forked()) return nullptr;
  absl::MutexLock lock(&mutex_);
  return session_.FindLayer(name);
}

bool WorkerImpl::shares_memory() const {
  if (forked()) return false;
  absl::MutexLock lock(&mutex_);
  return transport_->shares_memory();
}

absl::StatusOr<PendingRounds> WorkerImpl::Begin(RoundKey key, const Payload& payload) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  PendingRounds rounds;
  const auto make = [&](RoundKey resolved, size_t begin, size_t length) {
    Payload part = payload;
    part.first = payload.first.subspan(begin, length);
    Buffer encoded = EncodeContribution(resolved, part);
    rounds.push_back(std::make_shared<PendingRound>(std::move(resolved), std::move(encoded)));
    return rounds.back();
  };
  const size_t length = payload.first.size();
  if (absl::Status status = session_.Begin(std::move(key), length, make); !status.ok()) return status;
  return rounds;
}

absl::Status WorkerImpl::Flush() {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  SendReady();
  return absl::OkStatus();
}

absl::Status WorkerImpl::WaitFor(const PendingRounds& rounds, absl::Duration timeout) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  const absl::Time now = Now();
  for (const std::shared_ptr<PendingRound>& round : rounds) {
    if (!round->done) {
      if (absl::Status status = Enter(); !status.ok()) return status;
      NoteWait(round, now, timeout);
      const auto done = [&round] { return round->done; };
      const absl::Status status = Await(done, now + timeout);
      // Perhaps nobody looks again for long, and other workers would wait for this round as long.
      if (IsPending(status) && session_.HasUnsent()) SendReady();
      if (!status.ok() && !round->done) return status;
    }
    if (!round->status.ok()) {
      session_.ResumeAfter(round->status);
      return round->status;
    }
    alone_ = !several_users_;
  }
  return absl::OkStatus();
}

void WorkerImpl::NoteWait(const std::shared_ptr<PendingRound>& round, absl::Time now, absl::Duration timeout) {
  if (several_users_ || timeout < kLongWait) {
    session_.Unblocked(/*retract=*/false);
  } else {
    session_.Blocked(round, alone_, now);
  }
}

bool WorkerImpl::HasEnded(const PendingRounds& rounds) {
  for (const std::shared_ptr<PendingRound>& round : rounds) {
    if (!round->done) return false;
    if (!round->status.ok()) return true;
  }
  return true;
}

bool WorkerImpl::HasOutcome(const PendingRounds& rounds) const {
  if (forked()) return true;  // A wait returns at once.
  absl::MutexLock lock(&mutex_);
  return HasEnded(rounds);
}

void WorkerImpl::Drop(const PendingRounds& rounds) {
  if (forked()) return;
  absl::InlinedVector<RoundResult, 1> results;  // The rest is freed without the lock.
  absl::MutexLock lock(&mutex_);
  for (const std::shared_ptr<PendingRound>& round : rounds) {
    round->dropped = true;
    results.push_back(std::move(round->result));
    KeepMemory(&results.back());
  }
}

void WorkerImpl::KeepMemory(RoundResult* result) {
  spare_.Keep(std::move(result->first));
  spare_.Keep(std::move(result->second));
}

void WorkerImpl::WaitForAny(absl::Span<const PendingRounds* const> rounds, const std::function<bool()>& woken,
                            absl::Duration timeout) {
  if (forked()) return;
  absl::MutexLock lock(&mutex_);
  const auto done = [&] {
    return woken() || std::any_of(rounds.begin(), rounds.end(), [](const auto* round) { return HasEnded(*round); });
  };
  if (done() || !Enter().ok()) return;
  Await(done, Now() + timeout).IgnoreError();
}

}  // namespace syncbn
