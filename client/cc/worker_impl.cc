#include "client/cc/worker_impl.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cc/clock.h"
#include "client/cc/credentials.h"
#include "client/cc/errors.h"
#include "google/protobuf/arena.h"
#include "grpc/slice.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "plumbing/log.h"

namespace syncbn {

// In worker.cc.
Round MakeRound(std::shared_ptr<WorkerImpl> worker, std::vector<std::shared_ptr<Piece>> pieces);
absl::Status PendingStatus();

namespace {

constexpr uint32_t kProtocolVersion = 1;
// Elements of a summed vector in one contribution: what masters accept by default.
constexpr size_t kPieceElements = size_t{1} << 20;
// Frames up to here are read whatever they hold; longer ones only as far as what this worker waits for can fill them.
constexpr size_t kOrdinaryFrameBytes = size_t{32} << 20;
// Bytes that a round's outcome takes beyond its vectors: names, ranks, an error's text.
constexpr size_t kOutcomeBytes = size_t{64} << 10;
// How many of them may be unanswered at a time: 32 MiB. By default masters keep 64 MiB for a worker to read, and the
// newest 4 results, however large, for one that has to ask again.
constexpr size_t kPiecesUnderWay = 4;
constexpr absl::Duration kSayBlockedAfter = absl::Milliseconds(20);
// The same before this worker's first round has completed: until then nothing tells a worker of one thread from one
// whose other threads have yet to start.
constexpr absl::Duration kSayBlockedAtFirstAfter = absl::Milliseconds(200);
// Contributions beyond this many bytes go into another frame; masters take frames of 64 MiB by default.
constexpr size_t kFullFrameBytes = size_t{16} << 20;
// And beyond as many contributions; masters take 65536 by default.
constexpr size_t kFullFrameRounds = 16384;
// A pause in driving the queue after which what the master has sent may still wait to be read.
constexpr absl::Duration kLongPause = absl::Seconds(1);
// What an answer may take beyond the round's timeout.
constexpr absl::Duration kLeastMargin = absl::Seconds(2);
constexpr absl::Duration kMostMargin = absl::Seconds(5);
// Time that a connection to one address may take; less where others may be tried instead.
constexpr absl::Duration kConnectTimeout = absl::Seconds(5);
constexpr absl::Duration kConnectTimeoutOfSeveral = absl::Seconds(2);
constexpr absl::string_view kRankTaken = "RANK_TAKEN";
constexpr absl::Duration kFirstBackoff = absl::Milliseconds(10);
constexpr absl::Duration kLongestBackoff = absl::Seconds(1);
// What the write before a flush may take to end, should the master not read.
constexpr absl::Duration kFlushTimeout = absl::Milliseconds(100);
// What a leave may take to be acknowledged.
constexpr absl::Duration kLeaveTimeout = absl::Seconds(2);

// A frame of few channels needs nothing from the heap.
constexpr size_t kArenaBlockBytes = 4096;

grpc::Slice Encode(const v1::WorkerFrame& frame) {
  const grpc::Slice slice(grpc_slice_malloc(frame.ByteSizeLong()), grpc::Slice::STEAL_REF);
  frame.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return slice;
}

void ToProto(const LayerOptions& layer, v1::LayerSpec* spec) {
  spec->set_name(layer.name);
  spec->set_channels(layer.channels);
  spec->set_kind(static_cast<v1::LayerKind>(layer.kind));
  spec->set_eps(layer.eps);
  spec->set_eps_mode(layer.clamp_eps ? v1::EPS_MODE_CLAMP : v1::EPS_MODE_ADD);
  spec->set_numeric_policy(static_cast<v1::NumericPolicy>(layer.numeric_policy));
  if (layer.momentum.has_value()) spec->set_momentum(*layer.momentum);
  spec->set_biased_running_variance(layer.biased_running_variance);
}

bool SameLayer(const LayerOptions& a, const LayerOptions& b) {
  return a.name == b.name && a.channels == b.channels && a.kind == b.kind && a.eps == b.eps &&
         a.clamp_eps == b.clamp_eps && a.numeric_policy == b.numeric_policy && a.momentum == b.momentum &&
         a.biased_running_variance == b.biased_running_variance;
}

void ToProto(absl::Duration duration, google::protobuf::Duration* message) {
  message->set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  message->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
}

void ToProto(const Worker::Options& options, v1::Join* join) {
  join->set_min_protocol_version(kProtocolVersion);
  join->set_max_protocol_version(kProtocolVersion);
  join->set_job(options.job);
  join->set_group(options.group);
  join->set_rank(options.rank);
  join->set_world_size(options.world_size);
  join->set_generation(options.generation);
  join->set_description(options.description);
  v1::GroupConfig* const config = join->mutable_config();
  if (options.round_timeout.has_value()) ToProto(*options.round_timeout, config->mutable_round_timeout());
  if (options.rejoin_grace.has_value()) ToProto(*options.rejoin_grace, config->mutable_rejoin_grace());
  config->set_missing_policy(static_cast<v1::MissingPolicy>(options.missing_policy));
  config->set_min_workers(options.min_workers);
}

std::vector<double> ToVector(const google::protobuf::RepeatedField<double>& field) {
  return std::vector<double>(field.begin(), field.end());
}

// Returns whether all are finite: 0 times a number that is not is not 0. Four sums, so that none waits for the one
// before.
bool AllFinite(const std::vector<double>& values) {
  double sums[4] = {};
  size_t i = 0;
  for (; i + 4 <= values.size(); i += 4) {
    for (size_t j = 0; j < 4; ++j) sums[j] += 0.0 * values[i + j];
  }
  for (; i < values.size(); ++i) sums[0] += 0.0 * values[i];
  return sums[0] + sums[1] + sums[2] + sums[3] == 0.0;
}

bool AnyNegative(const std::vector<double>& values) {
  int negative = 0;
  for (const double value : values) negative |= static_cast<int>(value < 0);
  return negative != 0;
}

// Returns an error for statistics that no merge of contributions gives.
absl::Status CheckMoments(const Piece& piece) {
  const RoundResult& result = piece.result;
  const bool finite = !piece.finite || (AllFinite(result.first) && AllFinite(result.second));
  if (finite && !AnyNegative(result.second)) return absl::OkStatus();
  const auto bad = [&piece](const char* what, double value, size_t channel) {
    return absl::InternalError(absl::StrCat("the master sent a ", what, " of ", value, " for channel ", channel,
                                            " of layer \"", piece.key.layer(), "\""));
  };
  for (size_t i = 0; i < result.first.size(); ++i) {
    if (piece.finite && !std::isfinite(result.first[i])) return bad("mean", result.first[i], i);
  }
  for (size_t i = 0; i < result.second.size(); ++i) {
    const double variance = result.second[i];
    if (variance < 0 || (piece.finite && !std::isfinite(variance))) return bad("variance", variance, i);
  }
  return absl::OkStatus();
}

// A status with which no master of ours answers a first join: whoever does is something else, or does not want this
// worker. Once joined, a worker takes the same for what stands between: a proxy that has lost its backend, say.
bool IsHopelessAtFirst(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::INVALID_ARGUMENT:
    case grpc::StatusCode::UNIMPLEMENTED:
    case grpc::StatusCode::UNAUTHENTICATED:
    case grpc::StatusCode::PERMISSION_DENIED:
      return true;
    default:
      return false;
  }
}

// Reasons that a later attempt need not meet.
bool IsPassing(absl::string_view reason) { return reason == "SHUTTING_DOWN" || reason == kRankTaken; }

}  // namespace

WorkerImpl::WorkerImpl(Worker::Options options, ChannelMaker channels)
    : options_(std::move(options)), channels_(std::move(channels)) {}

void WorkerImpl::Abandon(WorkerImpl* impl) {
  if (!impl->forked()) delete impl;
}

void WorkerImpl::Close() {
  absl::MutexLock lock(&mutex_);
  End(MakeStatus(absl::StatusCode::kCancelled, "this worker has been closed", {"CLOSED", "", {}}));
  changed_.SignalAll();
}

WorkerImpl::~WorkerImpl() {
  {
    absl::MutexLock lock(&mutex_);
    if (connection_ != nullptr) {
      connection_->Cancel();
      if (!connection_->finishing()) connection_->Finish();
    }
    if (alarm_pending_) alarm_.Cancel();
  }
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

// ---- The connection -------------------------------------------------------------------------------------------------

void WorkerImpl::Connect() {
  state_ = State::kConnecting;
  absl::StatusOr<std::string> list = options_.target;
  if (options_.find_target != nullptr) {
    driving_ = true;  // Nobody else has anything to drive.
    mutex_.Unlock();
    list = options_.find_target();
    mutex_.Lock();
    driving_ = false;
    if (state_ == State::kEnded) return;
  }
  absl::Status status = list.ok() ? targets_.SetList(*list) : list.status();
  if (!status.ok()) return ConnectLater(std::move(status));
  const absl::Duration timeout = targets_.has_several() ? kConnectTimeoutOfSeveral : kConnectTimeout;
  connection_ = std::make_unique<Connection>(channels_.Open(targets_.current(), timeout), &queue_);
  connection_->Start();
}

void WorkerImpl::ConnectLater(absl::Status why) {
  const absl::Time now = Now();
  bool pause = true;
  if (state_ == State::kJoined) {
    give_up_at_ = now + options_.join_timeout;
    // A master that takes every join and breaks down over what follows is not to be hurried.
    if (answered_ || now - joined_at_ > kLongestBackoff) backoff_ = kFirstBackoff;
  } else {
    pause = targets_.Failed();
  }
  last_break_ = std::move(why);
  state_ = State::kWaiting;
  retry_at_ = now;
  if (!pause) return;
  retry_at_ += backoff_;
  backoff_ = std::min(2 * backoff_, kLongestBackoff);
}

void WorkerImpl::NoteRankTaken(const absl::Status& why) {
  std::string text = absl::StrCat("rank ", options_.rank, " is taken, and this worker waits until it is free, for ",
                                  absl::FormatDuration(options_.join_timeout), ": ", why.message());
  if (text == taken_said_) return;
  taken_said_ = text;
  notices_.push_back(std::move(text));
}

void WorkerImpl::NoteLateRounds(const v1::MasterFrame& frame) {
  if (frame.late_rounds().empty()) return;
  // The first stands for those that came with it: they wait for the same workers, or for what these have not reached.
  const v1::LateRound& late = frame.late_rounds(0);
  const absl::Duration age = absl::Seconds(late.age().seconds()) + absl::Nanoseconds(late.age().nanos());
  const int named = late.missing_ranks_size();
  const uint32_t others = late.missing() - std::min(late.missing(), static_cast<uint32_t>(named));
  notices_.push_back(absl::StrCat(
      "round ", late.key().sequence(), " of layer \"", late.key().layer(), "\" has waited ",
      absl::FormatDuration(absl::Trunc(age, absl::Milliseconds(100))), " for rank",
      named == 1 && others == 0 ? " " : "s ", absl::StrJoin(late.missing_ranks(), ", "),
      others > 0 ? absl::StrCat(" and ", others, " more") : "",
      frame.late_rounds_size() > 1 ? absl::StrCat("; rounds that wait as well: ", frame.late_rounds_size() - 1) : "",
      "; it goes on until round_timeout (", absl::FormatDuration(round_timeout_), ")"));
}

absl::string_view WorkerImpl::HintOf(const absl::Status& why) const {
  const bool closed =
      absl::StrContains(why.message(), "Socket closed") || absl::StrContains(why.message(), "reset by peer");
  if (!closed || run_id_ != 0) return "";
  return options_.tls.enabled()
             ? "; a master that closes a TLS connection may not accept this worker's certificate, or "
               "speak without TLS"
             : "; a master that closes a connection may expect TLS";
}

void WorkerImpl::SayNotices() {
  if (notices_.empty()) return;
  const std::vector<std::string> notices = std::exchange(notices_, {});
  mutex_.Unlock();
  for (const std::string& notice : notices) Log(LogLevel::kWarning, notice);
  mutex_.Lock();
}

void WorkerImpl::SendJoin() {
  v1::WorkerFrame frame;
  ToProto(options_, frame.mutable_join());
  ChooseDeclarations();
  for (const LayerOptions& layer : options_.layers) {
    ToProto(layers_.at(layer.name).said->options, frame.mutable_join()->add_layers());
  }
  frame.mutable_join()->set_incarnation(incarnation_);
  frame.mutable_join()->set_run_id(run_id_);
  for (const auto& [name, layer] : layers_) ToProto(layer.said->options, frame.add_layers());
  const grpc::Slice slice = Encode(frame);
  connection_->Write(grpc::ByteBuffer(&slice, 1));
  connection_->Read();
}

void WorkerImpl::ChooseDeclarations() {
  for (auto& [name, layer] : layers_) layer.said = layer.now;
  for (const auto& [key, piece] : pending_) {
    if (piece->declared != nullptr && piece->declared->order < piece->layer->said->order) {
      piece->layer->said = piece->declared;
    }
  }
  undeclared_.clear();
  for (const auto& [name, layer] : layers_) {
    if (layer.said != layer.now) undeclared_.push_back(layer.now);
  }
  std::sort(undeclared_.begin(), undeclared_.end(), [](const auto& a, const auto& b) { return a->order < b->order; });
}

bool WorkerImpl::AddDeclaration(const DeclaredLayerPtr& declared, size_t taken, v1::WorkerFrame* frame) {
  const std::string& name = declared->options.name;
  for (size_t i = 0; i < taken; ++i) {
    if (unsent_[i] != nullptr && !unsent_[i]->done && unsent_[i]->key.layer() == name) return false;
  }
  ToProto(declared->options, frame->add_layers());
  layers_.at(name).said = declared;
  return true;
}

bool WorkerImpl::DeclareBefore(uint64_t order, const DeclaredLayerPtr& declared, size_t taken, v1::WorkerFrame* frame) {
  while (!undeclared_.empty() && undeclared_.front()->order < order) {
    if (!AddDeclaration(undeclared_.front(), taken, frame)) return false;
    undeclared_.pop_front();
  }
  return declared == nullptr || layers_.at(declared->options.name).said == declared ||
         AddDeclaration(declared, taken, frame);
}

void WorkerImpl::OnEvent(void* tag, bool ok) {
  if (tag == &alarm_) {
    alarm_pending_ = false;
    return;
  }
  auto* const operation = static_cast<Connection::Operation*>(tag);
  Connection* const connection = operation->connection;
  connection->Ended(operation->kind);
  if (connection != connection_.get()) {
    if (connection->outstanding() == 0) {
      retired_.erase(std::find_if(retired_.begin(), retired_.end(),
                                  [connection](const auto& retired) { return retired.get() == connection; }));
    }
    return;
  }
  if (operation->kind == Connection::Kind::kFinish) {
    OnStreamEnded();
  } else if (!ok) {
    if (!connection->finishing()) connection->Finish();
  } else if (operation->kind == Connection::Kind::kStart) {
    SendJoin();
  } else if (operation->kind == Connection::Kind::kRead) {
    OnFrame();
  }
}

void WorkerImpl::OnStreamEnded() {
  const grpc::Status status = connection_->status();  // Outlives the connection.
  if (connection_->outstanding() == 0) {
    connection_.reset();
  } else {
    retired_.push_back(std::move(connection_));
  }
  if (state_ == State::kEnded) return;
  absl::Status why(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  if (!status.error_details().empty()) why = FromSerializedStatus(status.error_details());
  if (leave_sent_) {
    End(MakeStatus(absl::StatusCode::kFailedPrecondition, "this worker has left its group", {"LEFT", "", {}}));
    return;
  }
  const std::string reason = DetailsOf(why).reason;
  // gRPC's own refusal of a frame that is longer than any may be: the next stream would bring it again.
  const bool too_long = reason.empty() && status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED &&
                        absl::StrContains(status.error_message(), "larger than max");
  const bool hopeless = reason.empty() ? run_id_ == 0 && IsHopelessAtFirst(status.error_code()) : !IsPassing(reason);
  if (run_id_ == 0 && reason.empty() && IsTlsRefusal(why.message()) && !targets_.has_several()) {
    End(absl::UnauthenticatedError(
        absl::StrCat("TLS with the master at ", targets_.current(), " has failed: ", why.message())));
    return;
  }
  if (hopeless || too_long) {
    End(std::move(why));
    return;
  }
  if (reason == kRankTaken) NoteRankTaken(why);
  ConnectLater(std::move(why));
}

size_t WorkerImpl::LongestFrame() const {
  size_t bytes = kOrdinaryFrameBytes;
  for (const auto& [key, piece] : pending_) bytes += kOutcomeBytes + 2 * sizeof(double) * piece->length;
  return bytes;
}

void WorkerImpl::OnFrame() {
  const size_t bytes = connection_->incoming()->Length();
  if (bytes > kOrdinaryFrameBytes && bytes > LongestFrame()) {
    End(absl::InternalError(absl::StrCat("the master sent a frame of ", bytes,
                                         " bytes; all that this worker waits for ", "takes ", LongestFrame(),
                                         " at most")));
    return;
  }
  alignas(8) char block[kArenaBlockBytes];
  google::protobuf::Arena arena(block, sizeof(block));
  auto* const frame = google::protobuf::Arena::CreateMessage<v1::MasterFrame>(&arena);
  if (!grpc::SerializationTraits<v1::MasterFrame>::Deserialize(connection_->incoming(), frame).ok()) {
    End(absl::InternalError("the master sent a frame that is not a syncbn.v1.MasterFrame"));
    return;
  }
  heard_at_ = Now();
  if (frame->has_joined()) {
    state_ = State::kJoined;
    joined_at_ = heard_at_;
    targets_.Reached();
    taken_said_.clear();
    answered_ = false;
    const google::protobuf::Duration& timeout = frame->joined().config().round_timeout();
    round_timeout_ = absl::Seconds(timeout.seconds()) + absl::Nanoseconds(timeout.nanos());
    incarnation_ = frame->joined().incarnation();
    run_id_ = frame->joined().run_id();
    present_ = frame->joined().membership().present_ranks_size();
    // What was on the way when the last stream broke may or may not have arrived: the master knows.
    unsent_.clear();
    for (auto& [key, piece] : pending_) {
      unsent_.push_back(piece);
      SetUnderWay(*piece, false);
    }
    // The pieces of a long vector go in the same order everywhere: else workers could wait for each other's.
    std::sort(unsent_.begin(), unsent_.end(), [](const auto& a, const auto& b) { return a->order < b->order; });
    blocked_said_ = false;
  }
  if (frame->has_membership()) present_ = frame->membership().present_ranks_size();
  NoteLateRounds(*frame);
  // Layer errors are for people: the rounds that they concern have their outcomes among the results.
  for (v1::RoundResult& result : *frame->mutable_results()) OnResult(&result);
}

void WorkerImpl::OnResult(v1::RoundResult* message) {
  const auto it = pending_.find(TupleOf(message->key()));
  if (it == pending_.end()) return;  // A replay that nobody waits for.
  Piece& piece = *it->second;
  RoundResult& result = piece.result;
  result.missing_ranks.assign(message->missing_ranks().begin(), message->missing_ranks().end());
  switch (message->outcome_case()) {
    case v1::RoundResult::kMoments:
      result.count = message->moments().count();
      result.first = ToVector(message->moments().mean());
      result.second = ToVector(message->moments().var());
      result.backward_required = message->moments().backward_required();
      break;
    case v1::RoundResult::kGradientSums:
      result.count = message->gradient_sums().count();
      result.first = ToVector(message->gradient_sums().sum_dy());
      result.second = ToVector(message->gradient_sums().sum_dy_xmu());
      break;
    case v1::RoundResult::kVector:
      result.first = ToVector(message->vector().value());
      break;
    case v1::RoundResult::kError:
      piece.status = FromSerializedStatus(message->error().SerializeAsString());
      if (piece.status.ok()) piece.status = absl::InternalError("the master sent an error without a code");
      break;
    case v1::RoundResult::OUTCOME_NOT_SET:
      piece.status = absl::InternalError("the master sent a round's result without an outcome");
      break;
  }
  if (piece.status.ok() && message->has_moments()) piece.status = CheckMoments(piece);
  if (piece.status.ok() && result.count < 0) {
    piece.status = absl::InternalError(
        absl::StrCat("the master sent a count of ", result.count, " for layer \"", piece.key.layer(), "\""));
  }
  const size_t length = piece.length != 0 ? piece.length : result.first.size();
  const size_t second = piece.key.phase() == v1::PHASE_SUM ? 0 : length;
  if (piece.status.ok() && (result.first.size() != length || result.second.size() != second)) {
    piece.status = absl::InternalError(absl::StrCat("the master sent ", result.first.size(), " and ",
                                                    result.second.size(), " elements as the result of layer \"",
                                                    piece.key.layer(), "\", which has ", length));
  }
  answered_ = true;
  SetUnderWay(piece, false);
  piece.done = true;
  pending_.erase(it);
}

void WorkerImpl::End(absl::Status why) {
  if (state_ == State::kEnded) return;
  state_ = State::kEnded;
  end_ = std::move(why);
  for (auto& [key, piece] : pending_) {
    piece->status = end_;
    piece->done = true;
  }
  pending_.clear();
  unsent_.clear();
  if (connection_ != nullptr) connection_->Cancel();
}

void WorkerImpl::Pump() {
  if (state_ != State::kJoined || connection_ == nullptr || connection_->finishing()) return;
  // In this order: a read that waits already would make the transport send a packet for it.
  if (!connection_->writing()) WriteFrame();
  if (!connection_->reading()) connection_->Read();
}

void WorkerImpl::WriteFrame() {
  std::vector<grpc::Slice> slices;
  v1::WorkerFrame head;
  size_t taken = 0;
  std::vector<std::shared_ptr<Piece>> waiting;
  const absl::Time now = Now();
  for (size_t bytes = 0; taken < unsent_.size() && bytes < kFullFrameBytes && taken < kFullFrameRounds; ++taken) {
    Piece& piece = *unsent_[taken];
    if (piece.done) continue;
    if (MustWait(piece)) {
      waiting.push_back(std::move(unsent_[taken]));
      continue;
    }
    const bool declared = piece.declared == nullptr || piece.layer->said == piece.declared;
    const bool as_said = declared && (undeclared_.empty() || piece.order < undeclared_.front()->order);
    if (!as_said && !DeclareBefore(piece.order, piece.declared, taken, &head)) break;
    SetUnderWay(piece, true);
    slices.push_back(piece.encoded);
    bytes += piece.encoded.size();
    ExpectAnswer(piece, now);
  }
  if (taken == unsent_.size()) DeclareBefore(UINT64_MAX, nullptr, taken, &head);
  if (head.layers_size() != 0) slices.insert(slices.begin(), Encode(head));
  unsent_.erase(unsent_.begin(), unsent_.begin() + static_cast<ptrdiff_t>(taken));
  unsent_.insert(unsent_.begin(), std::make_move_iterator(waiting.begin()), std::make_move_iterator(waiting.end()));
  v1::WorkerFrame tail;
  const bool blocked = unsent_.empty() && blocked_on_ != nullptr && !blocked_said_ && blocked_on_->sent &&
                       !blocked_on_->done && ((alone_ && !slices.empty()) || now >= say_blocked_at_);
  if (blocked) {
    *tail.add_blocked_on() = blocked_on_->key;
    blocked_said_ = true;
  }
  if (leaving_.has_value() && !leave_sent_ && unsent_.empty()) {
    tail.mutable_leave()->set_reason(*leaving_);
    leave_sent_ = true;
  }
  const bool retract = std::exchange(retract_, false) && slices.empty();  // Any frame ends the promise before it.
  if (blocked || tail.has_leave() || retract) slices.push_back(Encode(tail));
  if (!slices.empty()) connection_->Write(grpc::ByteBuffer(slices.data(), slices.size()));
}

bool WorkerImpl::MustWait(const Piece& piece) const {
  return piece.siblings_under_way != nullptr && *piece.siblings_under_way > 0 && under_way_ >= kPiecesUnderWay &&
         !leaving_.has_value();
}

void WorkerImpl::SetUnderWay(Piece& piece, bool under_way) {
  if (piece.siblings_under_way == nullptr || piece.under_way == under_way) return;
  piece.under_way = under_way;
  if (under_way) {
    ++*piece.siblings_under_way;
    ++under_way_;
  } else {
    --*piece.siblings_under_way;
    --under_way_;
  }
}

// ---- Waiting --------------------------------------------------------------------------------------------------------

absl::Status WorkerImpl::Await(const std::function<bool()>& done, absl::Time deadline) {
  const uint64_t interrupts = interrupts_;
  for (bool looked = false;; looked = true) {
    if (done()) return absl::OkStatus();
    if (interrupts_ != interrupts) {
      return MakeStatus(absl::StatusCode::kCancelled, "the wait was interrupted", {"INTERRUPTED", "", {}});
    }
    if (looked && Now() >= deadline) return PendingStatus();
    if (driving_) {
      Pump();  // The thread that drives may wait for long, and for something else.
      const absl::Time until = std::min(deadline, NextCheck());
      changed_.WaitWithTimeout(&mutex_, until - Now());
      NoteAbsence(until);
      CheckMaster(Now());
    } else {
      DriveOnce(deadline);
    }
  }
}

void WorkerImpl::DriveOnce(absl::Time deadline) {
  const bool had_ended = state_ == State::kEnded;
  NoteAbsence(last_look_);
  RunTimers(Now());
  if (state_ == State::kEnded && !had_ended) {
    changed_.SignalAll();
    return;  // Perhaps without a connection, and then no event would tell the caller, who looks again now.
  }
  Pump();
  const absl::Time until = std::min(deadline, NextTimer());
  driving_ = true;
  mutex_.Unlock();
  void* tag = nullptr;
  bool ok = false;
  const auto event = queue_.AsyncNext(&tag, &ok, QueueDeadline(until));
  mutex_.Lock();
  driving_ = false;
  NoteAbsence(until);
  last_look_ = Now();
  if (event == grpc::CompletionQueue::GOT_EVENT) OnEvent(tag, ok);
  changed_.SignalAll();
  SayNotices();
}

absl::Time WorkerImpl::NextTimer() const {
  absl::Time next = absl::InfiniteFuture();
  if (state_ == State::kWaiting) next = retry_at_;
  if (state_ == State::kConnecting || state_ == State::kWaiting) next = std::min(next, give_up_at_);
  const bool blocked = blocked_on_ != nullptr && !blocked_said_ && blocked_on_->sent && !blocked_on_->done;
  if (blocked && state_ == State::kJoined && !connection_->writing()) next = std::min(next, say_blocked_at_);
  return std::min(next, NextCheck());
}

void WorkerImpl::RunTimers(absl::Time now) {
  const bool joining = state_ == State::kConnecting || state_ == State::kWaiting;
  if (joining && now >= give_up_at_ && DetailsOf(last_break_).reason == kRankTaken) {
    End(last_break_);
  } else if (joining && now >= give_up_at_) {
    End(MakeStatus(
        absl::StatusCode::kUnavailable,
        absl::StrCat(
            "no answer from ",
            targets_.list().empty() ? "a master that nobody finds" : absl::StrCat("the master at ", targets_.list()),
            " within ", absl::FormatDuration(options_.join_timeout),
            last_break_.ok() ? "" : absl::StrCat("; last: ", last_break_.message()), HintOf(last_break_)),
        {"UNREACHABLE", "", {}}));
  } else if (state_ == State::kWaiting && now >= retry_at_) {
    Connect();
  } else {
    CheckMaster(now);
  }
}

void WorkerImpl::ExpectAnswer(Piece& piece, absl::Time now) {
  if (!std::exchange(piece.sent, true)) piece.first_sent_at = now;
  piece.sent_at = now;
  check_master_at_ = std::min(check_master_at_, AnswerDue(piece));
}

absl::Time WorkerImpl::AnswerDue(const Piece& piece) const {
  // Whatever comes shows that the master lives; and after a restart of the master the round begins anew. Neither can go
  // on for ever.
  const absl::Time due = std::min(std::max(piece.sent_at, heard_at_) + round_timeout_,
                                  piece.first_sent_at + 2 * (round_timeout_ + options_.join_timeout));
  return std::max(due, attended_since_) + std::min(std::max(round_timeout_, kLeastMargin), kMostMargin);
}

absl::Time WorkerImpl::NextCheck() const {
  return state_ == State::kJoined ? check_master_at_ : absl::InfiniteFuture();
}

void WorkerImpl::CheckMaster(absl::Time now) {
  if (now < NextCheck()) return;
  check_master_at_ = absl::InfiniteFuture();
  for (const auto& [key, piece] : pending_) {
    if (!piece->sent) continue;
    const absl::Time due = AnswerDue(*piece);
    check_master_at_ = std::min(check_master_at_, due);
    if (now < due) continue;
    const std::string layer = piece->key.layer();
    End(MakeStatus(absl::StatusCode::kUnavailable,
                   absl::StrCat("the master at ", targets_.current(), " has not answered round ", piece->key.sequence(),
                                " of layer \"", layer, "\" for ", absl::FormatDuration(now - piece->first_sent_at),
                                ", and round_timeout is ", absl::FormatDuration(round_timeout_),
                                ": it has stopped, or cannot be reached"),
                   {"UNREACHABLE", layer, {}}));
    return;
  }
}

void WorkerImpl::NoteAbsence(absl::Time planned) {
  const absl::Time now = Now();
  if (now - planned > kLongPause) attended_since_ = now;
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

absl::Status WorkerImpl::CheckProcess() const { return forked() ? ForkedError() : absl::OkStatus(); }

absl::Status WorkerImpl::Enter() {
  if (state_ == State::kEnded) return end_;
  const std::thread::id self = std::this_thread::get_id();
  if (!user_.has_value()) user_ = self;
  if (*user_ != self && !std::exchange(several_users_, true)) {
    retract_ = blocked_on_ != nullptr && blocked_said_ && !blocked_on_->done;
    blocked_on_ = nullptr;
  }
  return absl::OkStatus();
}

absl::Status WorkerImpl::Join() {
  absl::MutexLock lock(&mutex_);
  backoff_ = kFirstBackoff;
  give_up_at_ = Now() + options_.join_timeout;
  for (const LayerOptions& layer : options_.layers) Declare(layer);
  retry_at_ = Now();
  const auto settled = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return state_ == State::kJoined || state_ == State::kEnded;
  };
  if (absl::Status status = Await(settled, absl::InfiniteFuture()); !status.ok()) return status;
  return state_ == State::kEnded ? end_ : absl::OkStatus();
}

absl::Status WorkerImpl::Leave(absl::string_view reason) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (state_ == State::kEnded) return DetailsOf(end_).reason == "LEFT" ? absl::OkStatus() : end_;
  leaving_ = std::string(reason);
  blocked_on_ = nullptr;
  const auto ended = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return state_ != State::kJoined; };
  const absl::Status status = Await(ended, Now() + kLeaveTimeout);
  End(MakeStatus(absl::StatusCode::kFailedPrecondition, "this worker has left its group", {"LEFT", "", {}}));
  changed_.SignalAll();
  return absl::OkStatus();
}

absl::Status WorkerImpl::WaitForMembers(absl::Duration timeout) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  const auto complete = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return state_ == State::kEnded || (state_ == State::kJoined && present_ >= options_.world_size);
  };
  if (absl::Status status = Await(complete, Now() + timeout); !status.ok()) return status;
  return state_ == State::kEnded ? end_ : absl::OkStatus();
}

absl::Status WorkerImpl::ResumeAt(uint64_t sequence) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (sequence == Worker::kNextSequence) {
    return absl::InvalidArgumentError(
        absl::StrCat("the sequence to resume at is ", sequence, ", the greatest is ", Worker::kGreatestSequence));
  }
  if (absl::Status status = Enter(); !status.ok()) return status;
  first_sequence_ = sequence;
  next_sequence_.clear();
  return absl::OkStatus();
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

void WorkerImpl::WakeAll() {
  changed_.SignalAll();
  if (alarm_pending_ || !driving_) return;
  alarm_pending_ = true;
  alarm_.Set(&queue_, absl::ToChronoTime(absl::UnixEpoch()), &alarm_);
}

KnownLayer& WorkerImpl::Declare(const LayerOptions& layer) {
  KnownLayer& known = layers_[layer.name];
  if (known.now != nullptr && SameLayer(known.now->options, layer)) return known;
  known.now = std::make_shared<const DeclaredLayer>(DeclaredLayer{layer, ++begun_});
  undeclared_.push_back(known.now);
  return known;
}

absl::Status WorkerImpl::DeclareLayer(const LayerOptions& layer) {
  if (forked()) return ForkedError();
  if (layer.name.empty() || layer.name.size() > 255) {
    return absl::InvalidArgumentError(
        absl::StrCat("a layer's name has 1 to 255 bytes; this one has ", layer.name.size()));
  }
  if (layer.channels == 0) {
    return absl::InvalidArgumentError(absl::StrCat("layer \"", layer.name, "\" has 0 channels; at least 1 is needed"));
  }
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  Declare(layer);
  return absl::OkStatus();
}

std::optional<LayerOptions> WorkerImpl::FindLayer(absl::string_view name) const {
  if (forked()) return std::nullopt;
  absl::MutexLock lock(&mutex_);
  const auto it = layers_.find(name);
  if (it == layers_.end()) return std::nullopt;
  return it->second.now->options;
}

absl::StatusOr<uint64_t> WorkerImpl::ResolveSequence(const std::string& layer, v1::Phase phase, uint64_t sequence) {
  uint64_t& next = next_sequence_.try_emplace({layer, phase}, first_sequence_).first->second;
  if (sequence == Worker::kNextSequence) {
    if (next > Worker::kGreatestSequence) {
      return absl::OutOfRangeError(absl::StrCat("layer \"", layer, "\" has used sequence ", Worker::kGreatestSequence,
                                                ", and there is none after it"));
    }
    return next++;
  }
  next = std::max(next, sequence + 1);
  return sequence;
}

absl::StatusOr<std::shared_ptr<Piece>> WorkerImpl::AddPiece(OutgoingContribution contribution, size_t length,
                                                            KnownLayer& layer) {
  std::shared_ptr<Piece>& slot = pending_[TupleOf(contribution.key)];
  if (slot != nullptr) {
    return absl::AlreadyExistsError(absl::StrCat("a round of layer \"", contribution.key.layer(), "\" with sequence ",
                                                 contribution.key.sequence(), " is pending already"));
  }
  auto piece = std::make_shared<Piece>();
  piece->order = ++begun_;
  piece->length = length;
  piece->layer = &layer;
  if (contribution.key.phase() != v1::PHASE_BACKWARD) piece->declared = layer.now;
  piece->encoded = Encode(contribution);
  piece->key = std::move(contribution.key);
  slot = piece;
  unsent_.push_back(piece);
  return piece;
}

absl::StatusOr<Round> WorkerImpl::Begin(OutgoingContribution contribution) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  v1::RoundKey& key = contribution.key;
  const auto layer = layers_.find(key.layer());
  if (layer == layers_.end()) {
    return absl::FailedPreconditionError(absl::StrCat("layer \"", key.layer(), "\" has not been declared"));
  }
  const auto sequence = ResolveSequence(key.layer(), key.phase(), key.sequence());
  if (!sequence.ok()) return sequence.status();
  key.set_sequence(*sequence);
  // A backward round is of its forward round's size, and the layer may have another by now.
  const size_t length =
      key.phase() == v1::PHASE_BACKWARD ? contribution.first.size() : layer->second.now->options.channels;
  auto piece = AddPiece(std::move(contribution), length, layer->second);
  if (!piece.ok()) return piece.status();
  (*piece)->finite = layer->second.now->options.numeric_policy == NumericPolicy::kRefuse;
  return MakeRound(shared_from_this(), {*std::move(piece)});
}

absl::StatusOr<Round> WorkerImpl::BeginSum(absl::string_view name, uint64_t wanted, absl::Span<const double> value) {
  if (forked()) return ForkedError();
  if (value.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("vector \"", name, "\" is empty; a sum has at least 1 element"));
  }
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  const std::string whole(name);
  const auto sequence = ResolveSequence(whole, v1::PHASE_SUM, wanted);
  if (!sequence.ok()) return sequence.status();
  std::vector<std::shared_ptr<Piece>> pieces;
  const auto siblings = value.size() > kPieceElements ? std::make_shared<size_t>(0) : nullptr;
  for (size_t begin = 0; begin < value.size(); begin += kPieceElements) {
    const absl::Span<const double> part = value.subspan(begin, kPieceElements);
    LayerOptions layer;
    layer.name = value.size() > kPieceElements ? absl::StrCat(name, "#", pieces.size()) : whole;
    layer.kind = LayerKind::kSum;
    const auto before = layers_.find(layer.name);
    if (before != layers_.end() && before->second.now->options.kind == LayerKind::kSum) {
      layer = before->second.now->options;  // Its policy is the caller's.
    }
    layer.channels = static_cast<uint32_t>(part.size());
    KnownLayer& known = Declare(layer);
    OutgoingContribution contribution;
    contribution.key.set_layer(layer.name);
    contribution.key.set_phase(v1::PHASE_SUM);
    contribution.key.set_sequence(*sequence);
    contribution.first = part;
    auto piece = AddPiece(std::move(contribution), part.size(), known);
    if (!piece.ok()) return piece.status();
    (*piece)->siblings_under_way = siblings;
    pieces.push_back(*std::move(piece));
  }
  return MakeRound(shared_from_this(), std::move(pieces));
}

absl::Status WorkerImpl::Flush() {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  if (absl::Status status = Enter(); !status.ok()) return status;
  // The write before this one has ended, or is about to: nobody has looked since the last wait.
  const auto idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return connection_ == nullptr || !connection_->writing();
  };
  Await(idle, Now() + kFlushTimeout).IgnoreError();
  Pump();
  return absl::OkStatus();
}

absl::Status WorkerImpl::WaitFor(const std::vector<std::shared_ptr<Piece>>& pieces, absl::Duration timeout) {
  if (forked()) return ForkedError();
  absl::MutexLock lock(&mutex_);
  const absl::Time now = Now();
  for (const std::shared_ptr<Piece>& piece : pieces) {
    if (!piece->done) {
      if (absl::Status status = Enter(); !status.ok()) return status;
      PromiseSilence(piece, now, timeout);
      const auto done = [&piece] { return piece->done; };
      if (absl::Status status = Await(done, now + timeout); !status.ok()) return status;
    }
    if (!piece->status.ok()) return piece->status;
    alone_ = !several_users_;
  }
  return absl::OkStatus();
}

bool WorkerImpl::HasEnded(const std::vector<std::shared_ptr<Piece>>& pieces) {
  for (const std::shared_ptr<Piece>& piece : pieces) {
    if (!piece->done) return false;
    if (!piece->status.ok()) return true;
  }
  return true;
}

bool WorkerImpl::HasOutcome(const std::vector<std::shared_ptr<Piece>>& pieces) const {
  if (forked()) return true;  // A wait returns at once.
  absl::MutexLock lock(&mutex_);
  return HasEnded(pieces);
}

void WorkerImpl::WaitForAny(const std::vector<const std::vector<std::shared_ptr<Piece>>*>& rounds,
                            const std::function<bool()>& woken, absl::Duration timeout) {
  if (forked()) return;
  absl::MutexLock lock(&mutex_);
  const auto done = [&] {
    return woken() || std::any_of(rounds.begin(), rounds.end(), [](const auto* pieces) { return HasEnded(*pieces); });
  };
  if (done() || !Enter().ok()) return;
  Await(done, Now() + timeout).IgnoreError();
}

void WorkerImpl::PromiseSilence(const std::shared_ptr<Piece>& piece, absl::Time now, absl::Duration timeout) {
  if (several_users_ || timeout < kSayBlockedAfter) {
    blocked_on_ = nullptr;
  } else if (blocked_on_ != piece) {
    blocked_on_ = piece;
    blocked_said_ = false;
    say_blocked_at_ = now + (alone_ ? kSayBlockedAfter : kSayBlockedAtFirstAfter);
  }
}

}  // namespace syncbn
