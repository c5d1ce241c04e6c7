#include "client/cc/worker.h"

#include <unistd.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cc/clock.h"
#include "client/cc/contribution.h"
#include "client/cc/errors.h"
#include "client/cc/targets.h"
#include "client/cc/worker_impl.h"
#include "plumbing/forked.h"
#include "vocabulary/version.h"

namespace syncbn {
namespace {

constexpr absl::string_view kPendingMessage = "the round goes on";

absl::Status CheckOptions(const Worker::Options& options) {
  if (options.find_target == nullptr) {
    if (const auto targets = SplitTargets(options.target); !targets.ok()) return targets.status();
  }
  if (options.world_size == 0) return absl::InvalidArgumentError("world_size is 0; a group has at least 1 worker");
  if (options.rank >= options.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", options.rank, " is not below the world size of ", options.world_size));
  }
  return absl::OkStatus();
}

v1::RoundKey MakeKey(absl::string_view layer, v1::Phase phase, uint64_t sequence) {
  v1::RoundKey key;
  key.set_layer(std::string(layer));
  key.set_phase(phase);
  key.set_sequence(sequence);
  return key;
}

absl::Status DifferentLengths(absl::string_view layer, const char* first, size_t a, const char* second, size_t b) {
  return absl::InvalidArgumentError(
      absl::StrCat("layer \"", layer, "\": ", first, " has ", a, " elements and ", second, " has ", b));
}

}  // namespace

class RoundImpl {
 public:
  RoundImpl(std::shared_ptr<WorkerImpl> worker, std::vector<std::shared_ptr<Piece>> pieces)
      : worker_(std::move(worker)), pieces_(std::move(pieces)) {}

  uint64_t sequence() const { return pieces_.front()->key.sequence(); }

  absl::Status Wait(absl::Duration timeout) {
    absl::Status status = worker_->WaitFor(pieces_, timeout);
    if (status.ok() && !gathered_) Gather();
    return status;
  }

  // The result's vector is two of half its length.
  void SplitInHalves() { halves_ = true; }

  const RoundResult& result() const { return pieces_.size() == 1 && !halves_ ? pieces_.front()->result : whole_; }
  bool HasOutcome() const { return worker_->HasOutcome(pieces_); }
  const std::vector<std::shared_ptr<Piece>>& pieces() const { return pieces_; }

 private:
  void Gather() {
    gathered_ = true;
    if (pieces_.size() == 1 && !halves_) return;
    for (const std::shared_ptr<Piece>& piece : pieces_) {
      whole_.first.insert(whole_.first.end(), piece->result.first.begin(), piece->result.first.end());
    }
    whole_.missing_ranks = pieces_.front()->result.missing_ranks;
    if (!halves_) return;
    const auto middle = whole_.first.begin() + static_cast<std::ptrdiff_t>(whole_.first.size() / 2);
    whole_.second.assign(middle, whole_.first.end());
    whole_.first.erase(middle, whole_.first.end());
  }

  const std::shared_ptr<WorkerImpl> worker_;
  const std::vector<std::shared_ptr<Piece>> pieces_;
  RoundResult whole_;  // Where it is not that of the one piece.
  bool halves_ = false;
  bool gathered_ = false;
};

Round MakeRound(std::shared_ptr<WorkerImpl> worker, std::vector<std::shared_ptr<Piece>> pieces) {
  return Round(std::make_shared<RoundImpl>(std::move(worker), std::move(pieces)));
}

absl::Status PendingStatus() { return absl::DeadlineExceededError(kPendingMessage); }

bool IsPending(const absl::Status& status) {
  return status.code() == absl::StatusCode::kDeadlineExceeded && status.message() == kPendingMessage;
}

uint64_t Round::sequence() const { return impl_->sequence(); }
absl::Status Round::Wait(absl::Duration timeout) { return impl_->Wait(timeout); }
const RoundResult& Round::result() const { return impl_->result(); }
bool Round::HasOutcome() const { return impl_->HasOutcome(); }

absl::StatusOr<std::unique_ptr<Worker>> Worker::Join(Options options) {
  if (absl::Status status = CheckNotForked(); !status.ok()) return status;
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  if (options.description.empty()) {
    char host[256] = "";
    gethostname(host, sizeof(host) - 1);
    options.description = absl::StrCat("syncbn-cc/", kVersion, " host=", host, " pid=", getpid());
  }
  auto channels = ChannelMaker::Make(options.tls);
  if (!channels.ok()) return channels.status();
  const std::shared_ptr<WorkerImpl> impl(new WorkerImpl(std::move(options), *std::move(channels)), WorkerImpl::Abandon);
  if (absl::Status status = impl->Join(); !status.ok()) return status;
  return std::unique_ptr<Worker>(new Worker(impl));
}

Worker::Worker(std::shared_ptr<WorkerImpl> impl) : impl_(std::move(impl)) {}

Worker::~Worker() {
  // The threads and locks of the parent's connection are not in this process: what remains of it can only be abandoned.
  if (impl_->forked()) new std::shared_ptr<WorkerAttachment>(std::move(attachment_));
  Close();
}

absl::Status Worker::CheckProcess() const { return impl_->CheckProcess(); }

void Worker::Close() {
  if (impl_->forked()) return;
  const auto attached = attachment();
  if (attached != nullptr) attached->OnClose();
  impl_->Close();
  if (attached != nullptr) attached->OnClosed();
}

absl::Status Worker::Leave(absl::string_view reason) {
  const absl::Status settled = impl_->forked() ? absl::OkStatus() : Settle();
  const absl::Status left = impl_->Leave(reason);
  return left.ok() ? settled : left;
}

absl::Status Worker::Settle(absl::Duration timeout) {
  if (absl::Status status = impl_->CheckProcess(); !status.ok()) return status;
  const auto attached = attachment();
  return attached == nullptr ? absl::OkStatus() : attached->OnSettle(Now() + timeout);
}

uint32_t Worker::rank() const { return impl_->options().rank; }
uint32_t Worker::world_size() const { return impl_->options().world_size; }
MissingPolicy Worker::missing_policy() const { return impl_->options().missing_policy; }
uint64_t Worker::incarnation() const { return impl_->incarnation(); }
uint64_t Worker::run_id() const { return impl_->run_id(); }
absl::Status Worker::WaitForMembers(absl::Duration timeout) { return impl_->WaitForMembers(timeout); }
absl::Status Worker::ResumeAt(uint64_t sequence) { return impl_->ResumeAt(sequence); }

void Worker::Interrupt() {
  if (impl_->forked()) return;
  if (const auto attached = attachment()) attached->OnInterrupt();
  impl_->Interrupt();
}

absl::Status Worker::DeclareLayer(const LayerOptions& layer) { return impl_->DeclareLayer(layer); }
std::optional<LayerOptions> Worker::FindLayer(absl::string_view name) const { return impl_->FindLayer(name); }

absl::Status Worker::Flush() {
  if (impl_->forked()) return impl_->Flush();
  if (const auto attached = attachment()) attached->OnFlush();
  return impl_->Flush();
}

std::shared_ptr<WorkerAttachment> Worker::Attach(const std::function<std::shared_ptr<WorkerAttachment>()>& make) {
  absl::MutexLock lock(&attachment_mutex_);
  if (attachment_ == nullptr) attachment_ = make();
  return attachment_;
}

std::shared_ptr<WorkerAttachment> Worker::attachment() const {
  absl::MutexLock lock(&attachment_mutex_);
  return attachment_;
}

absl::StatusOr<Round> Worker::StartForward(absl::string_view layer, uint64_t sequence, int64_t count,
                                           absl::Span<const double> mean, absl::Span<const double> m2,
                                           BackwardRole role) {
  if (mean.size() != m2.size()) return DifferentLengths(layer, "mean", mean.size(), "m2", m2.size());
  OutgoingContribution contribution;
  contribution.key = MakeKey(layer, v1::PHASE_FORWARD, sequence);
  contribution.count = count;
  contribution.backward_role = static_cast<v1::BackwardRole>(role);
  if (count != 0) {
    contribution.first = mean;
    contribution.second = m2;
  }
  return impl_->Begin(std::move(contribution));
}

absl::StatusOr<Round> Worker::StartBackward(absl::string_view layer, uint64_t sequence, absl::Span<const double> sum_dy,
                                            absl::Span<const double> sum_dy_xmu) {
  if (sum_dy.size() != sum_dy_xmu.size()) {
    return DifferentLengths(layer, "sum_dy", sum_dy.size(), "sum_dy_xmu", sum_dy_xmu.size());
  }
  OutgoingContribution contribution;
  contribution.key = MakeKey(layer, v1::PHASE_BACKWARD, sequence);
  contribution.first = sum_dy;
  contribution.second = sum_dy_xmu;
  return impl_->Begin(std::move(contribution));
}

absl::StatusOr<Round> Worker::StartBackwardAgain(absl::string_view layer, absl::Span<const double> sum_dy,
                                                 absl::Span<const double> sum_dy_xmu) {
  if (sum_dy.size() != sum_dy_xmu.size()) {
    return DifferentLengths(layer, "sum_dy", sum_dy.size(), "sum_dy_xmu", sum_dy_xmu.size());
  }
  std::vector<double> both(sum_dy.begin(), sum_dy.end());
  both.insert(both.end(), sum_dy_xmu.begin(), sum_dy_xmu.end());
  absl::StatusOr<Round> round = impl_->BeginSum(absl::StrCat(layer, "/retained"), kNextSequence, both);
  if (round.ok()) round->impl_->SplitInHalves();
  return round;
}

absl::StatusOr<Round> Worker::StartSum(absl::string_view name, uint64_t sequence, absl::Span<const double> value) {
  // A sum of gradients that a failed pass has made NaN would hide why they are.
  if (absl::Status status = Settle(absl::ZeroDuration()); !status.ok() && !IsPending(status)) return status;
  return impl_->BeginSum(name, sequence, value);
}

void Worker::WaitForAny(absl::Span<const Round> rounds, const std::function<bool()>& woken, absl::Duration timeout) {
  std::vector<const std::vector<std::shared_ptr<Piece>>*> pieces;
  for (const Round& round : rounds) pieces.push_back(&round.impl_->pieces());
  impl_->WaitForAny(pieces, woken, timeout);
}

void Worker::Wake() { impl_->Wake(); }

}  // namespace syncbn
