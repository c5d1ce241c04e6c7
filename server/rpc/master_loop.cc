#include "server/rpc/master_loop.h"

#include <malloc.h>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <variant>
#include <vector>

#include "plumbing/check.h"
#include "plumbing/messages.h"
#include "plumbing/spin.h"
#include "plumbing/start_thread.h"
#include "server/rpc/convert.h"

namespace syncbn::rpc {
namespace {

// Results are put into one frame up to this size; a longer one has a frame of its own. It bounds what a worker must be
// ready to receive, and lets a slow reader show that it reads.
constexpr size_t kMostResultBytes = size_t{1} << 20;
// A frame that is handled in slices gets its turn when the queue has had nothing for so many polls (each of which looks
// at one socket alone), and at least this often, though other events are waiting.
constexpr int kQuietPolls = 8;
constexpr absl::Duration kLongestBacklogPause = absl::Milliseconds(10);

size_t ResultBytes(const core::RoundOutcome& outcome) {
  constexpr size_t kOverhead = 512;  // Beside vectors and texts.
  const size_t error = outcome.error.has_value() ? outcome.error->message.size() : 0;
  return (outcome.first.size() + outcome.second.size()) * sizeof(double) + outcome.key.layer.size() + error +
         (outcome.missing_ranks.size() + outcome.abstaining_ranks.size()) * 2 + kOverhead;
}

// Adds as many of the outcomes, from the one at `begin` on, as belong into one frame, and notes their fingerprints.
// Returns the index after the last.
size_t AddResults(const core::SendResults& results, size_t begin, v1::MasterFrame* frame,
                  std::vector<size_t>* answered) {
  size_t bytes = 0;
  size_t end = begin;
  do {
    const core::RoundOutcome& outcome = *results.outcomes[end];
    bytes += ResultBytes(outcome);
    ToProto(outcome, frame->add_results());
    answered->push_back(Fingerprint(outcome.key));
    ++end;
  } while (end < results.outcomes.size() && bytes + ResultBytes(*results.outcomes[end]) <= kMostResultBytes);
  return end;
}

// Bounds the results of an event to far less than a reader may leave unread before its group waits for it: 512 KiB by
// default, which take a millisecond.
LoopOptions Fitting(LoopOptions options) {
  size_t& turn = options.limits.max_turn_bytes;
  turn = std::max<size_t>(std::min(turn, options.max_unread_bytes / 128), 1);
  return options;
}

}  // namespace

MasterLoop::MasterLoop(LoopOptions options)
    : options_(Fitting(std::move(options))),
      log_([this](core::StreamId stream) { return sessions_.PeerOf(stream); }),
      coordinator_(options_.limits, options_.instance),
      state_saver_(&coordinator_, options_.state_writer, options_.limits.max_turn_bytes),
      sessions_(
          options_, coordinator_, [this](const core::Event& event) { Deliver(event); }, &log_, &now_),
      inspection_(coordinator_, sessions_, clock_, options_),
      health_({v1::StatisticsService::service_full_name(), v1::InspectionService::service_full_name()},
              options_.max_watchers),
      shutdown_tag_(this, &MasterLoop::OnShutdown),
      stop_tag_(this, &MasterLoop::OnStop),
      listening_tag_(this, &MasterLoop::OnListening),
      probe_tag_(this, &MasterLoop::OnProbe),
      handed_on_tag_(this, &MasterLoop::OnHandedOn),
      threads_(
          &clock_, [this](Tag* tag, bool ok) { return OnQueue(tag, ok); }, [this] { OnThreadLeft(); }) {
  if (options_.state_writer != nullptr) coordinator_.Restore(options_.restored, now_);
}

void MasterLoop::Register(grpc::ServerBuilder* builder) {
  sessions_.Register(builder);
  inspection_.Register(builder);
  health_.Register(builder);
  queue_ = builder->AddCompletionQueue();
}

absl::Status MasterLoop::Start() {
  // Before the thread, and before anyone may shut the queue down: an operation on a queue that has been shut down
  // aborts the process.
  sessions_.Serve(queue_.get());
  inspection_.Serve(queue_.get(), &unary_calls_);
  health_.Serve(queue_.get(), &unary_calls_);
  return threads_.Start(queue_.get());
}

absl::Time MasterLoop::OnQueue(Tag* tag, bool ok) {
  const Turn turn(&turn_);
  now_ = clock_.Now();
  if (tag != nullptr) tag->Proceed(ok);
  calls_.store(sessions_.started(), std::memory_order_relaxed);
  EndTurn(/*quiet=*/tag == nullptr);
  EndIfIdle();
  const bool pausing = !sessions_.awaits_call() || unary_calls_.pausing();
  return has_backlog() || pausing ? now_ : NextWakeUp();
}

void MasterLoop::OnThreadLeft() {
  const Turn turn(&turn_);
  if (!queue_ended_ && !std::exchange(handing_on_, true)) Wake(handed_on_alarm_, handed_on_tag_);
}

bool MasterLoop::StartReadingShared() {
  // Workers go on by gRPC where there is no thread.
  return shared_thread_.joinable() || StartThread(
                                          "reading shared memory", [this] { ReadShared(); }, &shared_thread_)
                                          .ok();
}

// A deadline that comes of a turn is watched by the thread that had the turn; the other one may sleep beyond it.
void MasterLoop::ReadShared() {
  Doorbell& bell = *sessions_.bell();
  Spin spin;
  while (true) {
    const uint32_t seen = bell.rings();
    absl::Duration pause = absl::InfiniteDuration();
    size_t workers = 0;
    {
      const Turn turn(&turn_);
      if (stopped_) return;
      now_ = clock_.Now();
      const bool any = sessions_.PollShared();
      EndTurn(!any);
      if (any || has_backlog()) continue;
      workers = sessions_.sharing();
      if (workers > 0) pause = NextWakeUp() - now_;
    }
    if (spin.Until([&] { return bell.rings() != seen; }, workers)) continue;
    bell.Sleep(seen, absl::ToChronoNanoseconds(pause));
    spin.Slept();
  }
}

void MasterLoop::EndTurn(bool quiet) {
  if (!overdue_) ServeDeadlines();
  sessions_.RunTimers();
  unary_calls_.RunTimers();
  quiet_polls_ = quiet ? quiet_polls_ + 1 : 0;
  const bool idle = quiet_polls_ >= kQuietPolls;
  ServeBacklog(idle);
  sessions_.EndTurn(quiet, idle);
  unary_calls_.EndTurn(quiet, idle);
  TrimMemory();
  state_saver_.OnTurn(now_);
}

absl::Time MasterLoop::NextWakeUp() const {
  return std::min({coordinator_.NextDeadline(), sessions_.NextTimer(), unary_calls_.NextTimer(),
                   state_saver_.NextTurn(), trim_at_});
}

void MasterLoop::ServeDeadlines() {
  if (coordinator_.NextDeadline() > now_) return;
  Deliver(core::TimePassed{});
  overdue_ = coordinator_.NextDeadline() <= now_;
}

void MasterLoop::ServeBacklog(bool idle) {
  if (!idle && now_ - backlog_served_ <= kLongestBacklogPause) return;
  quiet_polls_ = 0;
  if (!has_backlog()) return;
  if (std::exchange(overdue_, false)) ServeDeadlines();
  if (sessions_.has_backlog()) sessions_.ServeBacklog();
  backlog_served_ = clock_.Now();
}

// The allocator keeps what a flood, or a large job, has used, also where it takes from the system by the megabyte.
void MasterLoop::TrimMemory() {
  constexpr absl::Duration kPause = absl::Seconds(1);
  if (sessions_.streams() != 0) {
    trim_at_ = absl::InfiniteFuture();
    trimmed_ = false;
  } else if (!trimmed_ && trim_at_ == absl::InfiniteFuture()) {
    trim_at_ = now_ + kPause;
  } else if (now_ >= trim_at_) {
    trim_at_ = absl::InfiniteFuture();
    trimmed_ = true;
    malloc_trim(0);
  }
}

// The server's Shutdown does not wait for calls whose connection has gone: they are still here, and an operation on a
// queue that has been shut down aborts the process. So the queue is shut down after the last of them.
void MasterLoop::EndIfIdle() {
  if (!stopping_ || !sessions_.idle() || !inspection_.idle() || !health_.idle() || !unary_calls_.idle()) return;
  stopping_ = false;
  queue_ended_ = true;
  queue_->Shutdown();
}

// ---- The engine's effects -------------------------------------------------------------------------------------------

void MasterLoop::Deliver(const core::Event& event) {
  for (const core::Effect& effect : coordinator_.On(event, now_)) {
    std::visit([this](const auto& e) { Apply(e); }, effect);
  }
}

void MasterLoop::Apply(const core::SendJoined& joined) {
  sessions_.NoteMember(joined.stream, [this] { return StartReadingShared(); });
  v1::MasterFrame frame;
  ToProto(joined, options_.description, frame.mutable_joined());
  sessions_.Send({joined.stream}, frame);
}

void MasterLoop::Apply(const core::SendResults& results) {
  for (size_t next = 0; next < results.outcomes.size();) {
    FrameArena arena;
    auto* const frame = arena.Create<v1::MasterFrame>();
    std::vector<size_t> answered;
    next = AddResults(results, next, frame, &answered);
    sessions_.Send(results.streams, *frame, answered);
  }
}

void MasterLoop::Apply(const core::SendLayerError& error) {
  v1::MasterFrame frame;
  ToProto(error, frame.add_layer_errors());
  sessions_.Send(error.streams, frame);
}

void MasterLoop::Apply(const core::SendMembership& change) {
  v1::MasterFrame frame;
  ToProto(change.membership, frame.mutable_membership());
  sessions_.Send(change.streams, frame);
}

void MasterLoop::Apply(const core::SendLateRounds& late) {
  log_.On(late, now_);
  if (late.streams.empty()) return;
  v1::MasterFrame frame;
  for (const core::LateRound& round : late.rounds) ToProto(round, frame.add_late_rounds());
  sessions_.Send(late.streams, frame);
}

void MasterLoop::Apply(const core::CloseStream& close) { sessions_.Close(close.stream, close.error); }

void MasterLoop::Apply(const core::RoundEnded& ended) {
  log_.On(ended, now_);
  inspection_.OnRoundEnded(ended, now_);
}

void MasterLoop::Apply(const core::GroupEnded& ended) { inspection_.OnGroupEnded(ended); }

// ---- From other threads ---------------------------------------------------------------------------------------------

void MasterLoop::Wake(grpc::Alarm& alarm, Tag& tag) {
  alarm.Set(queue_.get(), absl::ToChronoTime(absl::UnixEpoch()), &tag);
}

void MasterLoop::SetListening(bool listening) {
  listening_ = listening;
  if (listening_told_.exchange(false)) Wake(listening_alarm_, listening_tag_);
}

bool MasterLoop::Probe() {
  const bool answered = probe_answered_.exchange(false);
  if (answered) Wake(probe_alarm_, probe_tag_);
  return answered;
}

void MasterLoop::BeginShutdown() { Wake(shutdown_alarm_, shutdown_tag_); }

void MasterLoop::Stop() {
  Wake(stop_alarm_, stop_tag_);
  threads_.Join();  // Takes back what the services have begun.
  if (shared_thread_.joinable()) {
    {
      const Turn turn(&turn_);
      stopped_ = true;
    }
    sessions_.bell()->Ring();
    shared_thread_.join();
  }
  // Processes may end without destroying their master.
  sessions_.HideBell();
}

void MasterLoop::OnListening(bool) {
  listening_told_ = true;
  health_.SetListening(listening_);
  inspection_.SetListening(listening_);
}

void MasterLoop::OnProbe(bool) { probe_answered_ = true; }

void MasterLoop::OnShutdown(bool) {
  sessions_.EndServing();
  inspection_.EndServing();
  health_.EndServing();
  state_saver_.Finish();
  Deliver(core::Shutdown{});
}

void MasterLoop::OnStop(bool) { stopping_ = true; }

}  // namespace syncbn::rpc
