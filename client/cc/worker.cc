#include "client/cc/worker.h"

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "client/cc/clock.h"
#include "client/cc/connection.h"
#include "client/cc/contribution.h"
#include "client/cc/errors.h"
#include "client/cc/session/targets.h"
#include "client/cc/shared_memory_transport.h"
#include "client/cc/worker_impl.h"
#include "client/cc/worker_internal.h"
#include "plumbing/forked.h"
#include "plumbing/secret.h"
#include "plumbing/utf8.h"
#include "vocabulary/bad_number.h"
#include "vocabulary/derived_name.h"
#include "vocabulary/version.h"

namespace syncbn {
namespace {

// The payload by which IsPending recognizes a status.
constexpr char kPendingUrl[] = "syncbn/pending";

absl::Status CheckOptions(const Worker::Options& options) {
  if (options.find_target == nullptr) {
    if (const auto targets = SplitTargets(options.target); !targets.ok()) return targets.status();
  }
  if (options.world_size == 0) return absl::InvalidArgumentError("world_size is 0; a group has at least 1 worker");
  if (options.rank >= options.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", options.rank, " is not below the world size of ", options.world_size));
  }
  if (options.join_timeout < absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("join_timeout is ", absl::FormatDuration(options.join_timeout), "; it is not negative"));
  }
  for (const auto& [what, text] : {std::pair("job", &options.job), std::pair("group", &options.group),
                                   std::pair("description", &options.description)}) {
    if (absl::Status status = CheckUtf8(what, *text); !status.ok()) return status;
  }
  for (const LayerOptions& layer : options.layers) {
    if (absl::Status status = CheckUtf8("a layer's name", layer.name); !status.ok()) return status;
    if (const auto fault = FindBadNumber(layer)) return absl::InvalidArgumentError(*fault);
  }
  return options.token.empty() ? absl::OkStatus() : CheckToken(options.token);
}

absl::Status DifferentLengths(absl::string_view layer, const char* first, size_t a, const char* second, size_t b) {
  return absl::InvalidArgumentError(
      absl::StrCat("layer \"", layer, "\": ", first, " has ", a, " elements and ", second, " has ", b));
}

}  // namespace

class RoundImpl {
 public:
  RoundImpl(std::shared_ptr<WorkerImpl> worker, PendingRounds rounds)
      : worker_(std::move(worker)), rounds_(std::move(rounds)) {}
  RoundImpl(const RoundImpl&) = delete;
  RoundImpl& operator=(const RoundImpl&) = delete;
  ~RoundImpl() { worker_->Drop(rounds_); }

  uint64_t sequence() const { return rounds_.front()->key().sequence; }

  absl::Status Wait(absl::Duration timeout) {
    absl::Status status = worker_->WaitFor(rounds_, timeout);
    if (status.ok() && !gathered_) Gather();
    return status;
  }

  // The result's vector is two of half its length.
  void SplitInHalves() { halves_ = true; }

  const RoundResult& result() const { return rounds_.size() == 1 && !halves_ ? rounds_.front()->result : whole_; }
  bool HasOutcome() const { return worker_->HasOutcome(rounds_); }
  const PendingRounds& rounds() const { return rounds_; }

 private:
  void Gather() {
    gathered_ = true;
    if (rounds_.size() == 1 && !halves_) return;
    for (const std::shared_ptr<PendingRound>& chunk : rounds_) {
      const RoundResult& part = chunk->result;
      whole_.first.insert(whole_.first.end(), part.first.begin(), part.first.end());
      whole_.missing_ranks.insert(whole_.missing_ranks.end(), part.missing_ranks.begin(), part.missing_ranks.end());
    }
    std::sort(whole_.missing_ranks.begin(), whole_.missing_ranks.end());
    whole_.missing_ranks.erase(std::unique(whole_.missing_ranks.begin(), whole_.missing_ranks.end()),
                               whole_.missing_ranks.end());
    if (!halves_) return;
    const auto middle = whole_.first.begin() + static_cast<std::ptrdiff_t>(whole_.first.size() / 2);
    whole_.second.assign(middle, whole_.first.end());
    whole_.first.erase(middle, whole_.first.end());
  }

  const std::shared_ptr<WorkerImpl> worker_;
  const PendingRounds rounds_;
  RoundResult whole_;  // Unless it is that of the one round.
  bool halves_ = false;
  bool gathered_ = false;
};

absl::Status PendingStatus() {
  static const absl::Status* const pending = [] {
    auto* const status =
        new absl::Status(absl::StatusCode::kDeadlineExceeded, "the round goes on");  // Never destroyed.
    status->SetPayload(kPendingUrl, absl::Cord());
    return status;
  }();
  return *pending;
}

bool IsPending(const absl::Status& status) { return status.GetPayload(kPendingUrl).has_value(); }

uint64_t Round::sequence() const { return impl_->sequence(); }
absl::Status Round::Wait(absl::Duration timeout) { return impl_->Wait(timeout); }
const RoundResult& Round::result() const { return impl_->result(); }
bool Round::HasOutcome() const { return impl_->HasOutcome(); }

absl::StatusOr<std::unique_ptr<Worker>> Worker::Join(Options options) {
  if (absl::Status status = CheckNotForked(); !status.ok()) return status;
  if (absl::Status status = CheckOptions(options); !status.ok()) return status;
  auto sharing = SharedMemoryOptions::FromEnvironment(MemorySharing::kSameUser);
  if (!sharing.ok()) return sharing.status();
  auto channels = ChannelMaker::Make(options.tls);
  if (!channels.ok()) return channels.status();
  auto transport =
      std::make_unique<SharedMemoryTransport>(*std::move(channels), *std::move(sharing), options.world_size);
  return WorkerInternal::Join(std::move(options), std::move(transport));
}

absl::StatusOr<std::unique_ptr<Worker>> WorkerInternal::Join(Worker::Options options,
                                                             std::unique_ptr<Transport> transport) {
  if (options.description.empty()) {
    char host[256] = "";
    gethostname(host, sizeof(host) - 1);
    options.description = absl::StrCat("syncbn-cc/", kVersion, " host=", host, " pid=", getpid());
  }
  const std::shared_ptr<WorkerImpl> impl(new WorkerImpl(std::move(options), std::move(transport)), WorkerImpl::Abandon);
  if (absl::Status status = impl->Join(); !status.ok()) return status;
  return std::unique_ptr<Worker>(new Worker(impl));
}

Worker::Worker(std::shared_ptr<WorkerImpl> impl) : impl_(std::move(impl)) {}

Worker::~Worker() {
  // The threads of the parent's attachment are not in this process, and its locks may never open: leak it. If memory is
  // out, this process ends.
  // NOLINTNEXTLINE(bugprone-unhandled-exception-at-new)
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
  if (absl::Status status = CheckUtf8("the reason to leave", reason); !status.ok()) return status;
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
bool Worker::shares_memory() const { return impl_->shares_memory(); }
absl::Status Worker::WaitForMembers(absl::Duration timeout) { return impl_->WaitForMembers(timeout); }
absl::Status Worker::ResumeAt(uint64_t sequence) { return impl_->ResumeAt(sequence); }

absl::Status Worker::ResumeLayerAt(const RoundKey& key) { return impl_->ResumeLayerAt(key); }

absl::StatusOr<std::vector<RoundKey>> Worker::NextRounds() const { return impl_->NextRounds(); }

absl::StatusOr<std::vector<RoundKey>> Worker::NewestRounds() const { return impl_->NewestRounds(); }

void Worker::Interrupt() {
  if (impl_->forked()) return;
  if (const auto attached = attachment()) attached->OnInterrupt();
  impl_->Interrupt();
}

absl::Status Worker::DeclareLayer(const LayerOptions& layer) { return impl_->DeclareLayer(layer); }
std::shared_ptr<const LayerOptions> Worker::FindLayer(absl::string_view name) const { return impl_->FindLayer(name); }

absl::Status Worker::Flush() {
  if (impl_->forked()) return impl_->Flush();
  if (const auto attached = attachment()) attached->OnFlush();
  return impl_->Flush();
}

std::shared_ptr<WorkerAttachment> Worker::attachment() const {
  absl::MutexLock lock(&attachment_mutex_);
  return attachment_;
}

// ---- Rounds ---------------------------------------------------------------------------------------------------------

absl::StatusOr<Round> Worker::Start(RoundKey key, const Payload& payload) {
  absl::StatusOr<PendingRounds> rounds = impl_->Begin(std::move(key), payload);
  if (!rounds.ok()) return rounds.status();
  return Round(std::make_shared<RoundImpl>(impl_, *std::move(rounds)));
}

absl::StatusOr<Round> Worker::StartForward(absl::string_view layer, uint64_t sequence, int64_t count,
                                           absl::Span<const double> mean, absl::Span<const double> m2,
                                           BackwardRole role) {
  if (mean.size() != m2.size()) return DifferentLengths(layer, "mean", mean.size(), "m2", m2.size());
  if (count == 0) mean = m2 = {};
  return Start({std::string(layer), sequence, Phase::kForward}, {count, role, mean, m2});
}

absl::StatusOr<Round> Worker::StartBackward(absl::string_view layer, uint64_t sequence, absl::Span<const double> sum_dy,
                                            absl::Span<const double> sum_dy_xmu) {
  if (sum_dy.size() != sum_dy_xmu.size()) {
    return DifferentLengths(layer, "sum_dy", sum_dy.size(), "sum_dy_xmu", sum_dy_xmu.size());
  }
  return Start({std::string(layer), sequence, Phase::kBackward}, {0, BackwardRole::kNone, sum_dy, sum_dy_xmu});
}

absl::StatusOr<Round> Worker::StartBackwardAgain(absl::string_view layer, absl::Span<const double> sum_dy,
                                                 absl::Span<const double> sum_dy_xmu) {
  if (sum_dy.size() != sum_dy_xmu.size()) {
    return DifferentLengths(layer, "sum_dy", sum_dy.size(), "sum_dy_xmu", sum_dy_xmu.size());
  }
  std::vector<double> both(sum_dy.begin(), sum_dy.end());
  both.insert(both.end(), sum_dy_xmu.begin(), sum_dy_xmu.end());
  absl::StatusOr<Round> round =
      Start({DerivedName(layer, "/retained"), kNextSequence, Phase::kSum}, {0, BackwardRole::kNone, both, {}});
  if (round.ok()) round->impl_->SplitInHalves();
  return round;
}

absl::StatusOr<Round> Worker::StartSum(absl::string_view name, uint64_t sequence, absl::Span<const double> value) {
  // A sum of gradients that a failed pass has made NaN would hide why they are.
  if (absl::Status status = Settle(absl::ZeroDuration()); !status.ok() && !IsPending(status)) return status;
  return Start({std::string(name), sequence, Phase::kSum}, {0, BackwardRole::kNone, value, {}});
}

// ---- For the rest of the client -------------------------------------------------------------------------------------

std::shared_ptr<WorkerAttachment> WorkerInternal::Attach(
    Worker& worker, const std::function<std::shared_ptr<WorkerAttachment>()>& make) {
  absl::MutexLock lock(&worker.attachment_mutex_);
  if (worker.attachment_ == nullptr) worker.attachment_ = make();
  return worker.attachment_;
}

void WorkerInternal::WaitForAny(Worker& worker, absl::Span<const Round> rounds, const std::function<bool()>& woken,
                                absl::Duration timeout) {
  std::vector<const PendingRounds*> pending;
  for (const Round& round : rounds) pending.push_back(&round.impl_->rounds());
  worker.impl_->WaitForAny(pending, woken, timeout);
}

void WorkerInternal::Wake(Worker& worker) { worker.impl_->Wake(); }

}  // namespace syncbn
