// A master's frames of any kind, at a worker: bytes to the client's codec, its frames to a session with rounds under
// way, and the session's frames to bytes again, which a master must be able to read.

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/cc/contribution.h"
#include "client/cc/errors.h"
#include "client/cc/frame_codec.h"
#include "client/cc/session/session.h"
#include "plumbing/check.h"
#include "plumbing/vector_pool.h"
#include "syncbn/v1/statistics.pb.h"
#include "tests/fuzz/messages.h"
#include "tests/fuzz/script.h"

namespace syncbn::fuzz {
namespace {

using session::Session;

constexpr uint32_t kRank = 1;
constexpr size_t kChunk = 3;  // Elements of a sum in one contribution.

class Round final : public EncodedContribution {
 public:
  using EncodedContribution::EncodedContribution;

  size_t channels = 0;  // The result's; 0 if only the master knows.
  bool finite = false;
  bool ended = false;
};

session::Options SmallOptions() {
  session::Options options;
  options.rank = kRank;
  options.join_timeout = absl::Seconds(5);
  options.chunks = {kChunk, kChunk, /*under_way=*/0};
  return options;
}

// Drives the session as a worker does, with a transport on which everything may happen.
class Client {
 public:
  explicit Client(Script& script) : script_(script), session_(SmallOptions(), now_) {
    options_.rank = kRank;
    options_.world_size = 3;
    for (const KnownLayer& known : kLayers) {
      LayerOptions layer;
      layer.name = known.name;
      layer.channels = known.channels;
      if (known.kind == v1::LAYER_KIND_BATCH_NORM) SYNCBN_CHECK(session_.Declare(layer).ok());
    }
  }

  void Run() {
    Apply(session_.OnTime(now_));
    if (!script_.OneIn(8)) Join();
    while (!script_.done() && !ended_) Step();
    Apply(session_.Close());
    SYNCBN_CHECK(ended_ && session_.state() == Session::State::kEnded);
    for (const auto& round : rounds_) SYNCBN_CHECK(round->ended, "a round is left without an end");
  }

 private:
  void Join() {
    OpenStream();
    if (!up_) return;
    OnWritten();
    v1::MasterFrame frame;
    MakeJoined(frame.mutable_joined());
    OnFrame(frame.SerializeAsString());
    if (!ended_) Begin();
  }

  void Step() {
    switch (script_.Choose(24)) {
      default:
        if (!up_) return OpenStream();
        return OnFrame(Damage(script_, MakeFrame().SerializeAsString()));
      case 12:
        if (up_) OnFrame(script_.Bytes(512));
        return;
      case 13:
      case 14:
      case 15:
        return Begin();
      case 16:
      case 17:
        return Apply(session_.Send(now_));
      case 18:
        return OnWritten();
      case 19:
        return Break();
      case 20:
        now_ += absl::Milliseconds(script_.Number() & 0xffff);
        if (script_.OneIn(4)) now_ = std::max(now_, std::min(session_.NextTimer(), now_ + absl::Hours(25)));
        session_.OnAttended(now_ - absl::Milliseconds(script_.Byte() * 8), now_);
        return Apply(script_.OneIn(4) ? session_.CheckMaster(now_) : session_.OnTime(now_));
      case 21:
        return Block();
      case 22:
        return session_.Unblocked(script_.OneIn(2));
      case 23:
        if (script_.OneIn(4)) session_.Leave("done");
        if (script_.OneIn(4)) session_.ResumeAt(script_.Number()).IgnoreError();
        return Declare();
    }
  }

  // ---- What the program does

  // Returns a layer's name as a program gives it: text, which the wire takes.
  std::string MakeText() {
    std::string name = MakeName(script_);
    for (char& letter : name) letter &= 0x7f;
    return name;
  }

  void Declare() {
    LayerOptions layer;
    layer.name = MakeText();
    layer.channels = static_cast<uint32_t>(script_.Choose(5));
    if (script_.OneIn(2)) layer.numeric_policy = NumericPolicy::kPropagate;
    session_.Declare(layer).IgnoreError();
  }

  void Begin() {
    RoundKey key;
    key.layer = MakeText();
    key.sequence = script_.OneIn(2) ? kNextSequence : script_.Number();
    key.phase = key.layer == "s" ? Phase::kSum : script_.OneIn(2) ? Phase::kBackward : Phase::kForward;
    const bool sum = key.phase == Phase::kSum;
    const size_t length = sum ? script_.Choose(4 * kChunk) : 3;
    const auto layer = session_.FindLayer(key.layer);
    const std::vector<double> first(length, script_.Double()), second(sum ? 0 : length, script_.Double());
    Payload payload;
    payload.count = 8;
    payload.second = second;
    std::vector<std::shared_ptr<Round>> begun;
    const auto make = [&](RoundKey resolved, size_t begin, size_t elements) {
      payload.first = absl::MakeConstSpan(first).subspan(begin, elements);
      Buffer encoded = EncodeContribution(resolved, payload);
      auto round = std::make_shared<Round>(std::move(resolved), std::move(encoded));
      const bool forward = round->key().phase == Phase::kForward;
      round->channels = forward ? layer->channels : elements;
      round->finite = forward && layer->numeric_policy == NumericPolicy::kRefuse;
      begun.push_back(round);
      return round;
    };
    if (session_.Begin(std::move(key), length, make).ok()) {
      rounds_.insert(rounds_.end(), begun.begin(), begun.end());
    }
  }

  void Block() {
    if (rounds_.empty()) return;
    const auto& round = rounds_[script_.Choose(256) % rounds_.size()];
    if (!round->ended) session_.Blocked(round, script_.OneIn(2), now_);
  }

  // ---- What the stream does

  void OpenStream() {
    if (!connecting_) return;
    connecting_ = false;
    up_ = true;
    Apply(session_.OnStreamUp());
  }

  void OnWritten() {
    if (std::exchange(writing_, false)) session_.OnWritten();
  }

  void Break() {
    if (!up_ && !connecting_) return;
    up_ = connecting_ = writing_ = false;
    google::rpc::Status status;
    session::Break why;
    if (script_.OneIn(2)) {
      MakeStatus(script_, &status);
      why.status = FromSerializedStatus(status.SerializeAsString());
      why.cause = static_cast<session::Break::Cause>(script_.Choose(4));
    }
    Apply(session_.OnStreamBroken(std::move(why), now_));
  }

  // As WorkerImpl::OnFrame. The bytes come in parts.
  void OnFrame(const std::string& bytes) {
    if (ended_) return;
    const size_t middle = bytes.empty() ? 0 : script_.Number() % bytes.size();
    const absl::string_view whole(bytes);
    const std::vector<absl::string_view> parts = {whole.substr(0, middle), "", whole.substr(middle)};
    if (absl::Status status = session_.CheckFrameLength(bytes.size()); !status.ok()) {
      return Apply(session_.OnBadFrame(std::move(status)));
    }
    auto frame = DecodeFrame(parts, &spare_);
    if (!frame.ok()) return Apply(session_.OnBadFrame(frame.status()));
    Apply(session_.OnFrame(*std::move(frame), now_));
  }

  // ---- The master's frames

  v1::MasterFrame MakeFrame() {
    v1::MasterFrame frame;
    const uint8_t kinds = script_.Byte();
    if (session_.state() == Session::State::kConnecting || (kinds & 1)) MakeJoined(frame.mutable_joined());
    if (kinds & 6) Repeat([&] { MakeResult(frame.add_results()); });
    if (kinds & 8) MakeMembership(frame.mutable_membership());
    if (kinds & 16) Repeat([&] { MakeLate(frame.add_late_rounds()); });
    if (kinds & 32) frame.add_layer_errors()->set_layer(MakeName(script_));
    return frame;
  }

  template <typename Action>
  void Repeat(const Action& action) {
    for (size_t i = script_.Choose(4); i < 4; ++i) action();
  }

  void MakeMembership(v1::Membership* membership) {
    membership->set_world_size(3);
    MakeRanks(script_, membership->mutable_present_ranks());
    MakeRanks(script_, membership->mutable_left_ranks());
  }

  void MakeJoined(v1::Joined* joined) {
    joined->set_incarnation(1 + script_.Choose(4));
    joined->set_run_id(script_.Choose(3));
    joined->set_memory(script_.Choose(3));
    joined->mutable_config()->mutable_round_timeout()->set_seconds(60);
    if (script_.OneIn(4)) MakeConfig(script_, joined->mutable_config());
    if (script_.OneIn(4)) MakeMembership(joined->mutable_membership());
  }

  void MakeResult(v1::RoundResult* result) {
    if (rounds_.empty() || script_.OneIn(8)) {
      MakeKey(script_, result->mutable_key());
    } else {
      const RoundKey& key = rounds_[rounds_.size() - 1 - script_.Choose(256) % rounds_.size()]->key();
      result->mutable_key()->set_layer(key.layer);
      result->mutable_key()->set_sequence(key.sequence);
      result->mutable_key()->set_phase(static_cast<v1::Phase>(key.phase));
    }
    const std::string& layer = result->key().layer();
    MakeRanks(script_, result->mutable_missing_ranks());
    result->set_refused(script_.OneIn(8));
    result->set_digest(script_.Number());
    const bool honest = !script_.OneIn(8);
    const size_t kind = honest && !script_.OneIn(4) ? static_cast<size_t>(result->key().phase()) : script_.Choose(5);
    if (kind == v1::PHASE_FORWARD) {
      v1::MergedMoments* const moments = result->mutable_moments();
      moments->set_count(static_cast<int64_t>(script_.Number()));
      MakeVector(script_, layer, moments->mutable_mean());
      MakeVector(script_, layer, moments->mutable_var());
      moments->set_backward_required(script_.OneIn(2));
      MakeRanks(script_, moments->mutable_abstaining_ranks());
    } else if (kind == v1::PHASE_BACKWARD) {
      result->mutable_gradient_sums()->set_count(static_cast<int64_t>(script_.Number()));
      MakeVector(script_, layer, result->mutable_gradient_sums()->mutable_sum_dy());
      MakeVector(script_, layer, result->mutable_gradient_sums()->mutable_sum_dy_xmu());
    } else if (kind == v1::PHASE_SUM) {
      MakeVector(script_, layer, result->mutable_vector()->mutable_value());
    } else if (kind == 4) {
      MakeStatus(script_, result->mutable_error());
    }
  }

  void MakeLate(v1::LateRound* late) {
    MakeKey(script_, late->mutable_key());
    MakeDuration(script_, late->mutable_age());
    MakeRanks(script_, late->mutable_missing_ranks());
    late->set_missing(static_cast<uint32_t>(script_.Number()));
  }

  // ---- The session's effects

  void Apply(session::Effects effects) {
    for (session::Effect& effect : effects) {
      SYNCBN_CHECK(!ended_, "something happens after the end");
      std::visit([this](auto& kind) { Apply(kind); }, effect);
    }
    SYNCBN_CHECK(session_.writing() == writing_ || ended_ || !up_);
    SYNCBN_CHECK(session_.NextTimer() >= absl::UnixEpoch());
  }

  void Apply(session::FindMaster&) {
    if (script_.OneIn(8)) return Apply(session_.OnMasterFound(absl::NotFoundError("there is none"), now_));
    Apply(session_.OnMasterFound(script_.OneIn(8) ? script_.Bytes(32) : "127.0.0.1:1,127.0.0.1:2", now_));
  }

  void Apply(session::Connect&) {
    SYNCBN_CHECK(!up_ && !connecting_, "two streams at a time");
    connecting_ = true;
  }

  void Apply(session::Write& write) {
    SYNCBN_CHECK(up_ && !std::exchange(writing_, true), "two writes at a time");
    std::vector<Buffer> parts;
    EncodeFrame(write.frame, options_, "key", &parts);
    std::string bytes;
    for (const Buffer& part : parts) bytes.append(reinterpret_cast<const char*>(part.data()), part.size());
    v1::WorkerFrame frame;
    SYNCBN_CHECK(frame.ParseFromString(bytes), "the worker sends what is no frame");
  }

  void Apply(session::CloseStream&) { up_ = connecting_ = writing_ = false; }

  void Apply(session::Complete& complete) {
    auto& round = static_cast<Round&>(*complete.contribution);
    SYNCBN_CHECK(!std::exchange(round.ended, true), "a round ends for the second time");
    if (!complete.status.ok()) return;
    const RoundResult& result = complete.result;
    const size_t second = round.key().phase == Phase::kSum ? 0 : round.channels;
    SYNCBN_CHECK(result.first.size() == round.channels && result.second.size() == second, "of another length");
    SYNCBN_CHECK(result.count >= 0);
    if (round.key().phase != Phase::kForward) return;
    for (const double var : result.second) SYNCBN_CHECK(!(var < 0.0), "a negative variance");
    for (const double mean : result.first)
      SYNCBN_CHECK(!round.finite || std::isfinite(mean), "a mean that is no number");
  }

  void Apply(session::JoinedGroup&) {}
  void Apply(session::Notice&) {}
  void Apply(session::Ended&) { ended_ = true; }

  Script& script_;
  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  Worker::Options options_;
  Session session_;
  bool connecting_ = false;
  bool up_ = false;
  bool writing_ = false;
  VectorPool spare_{size_t{64} << 10};
  bool ended_ = false;
  std::vector<std::shared_ptr<Round>> rounds_;
};

}  // namespace
}  // namespace syncbn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  syncbn::fuzz::Script script(data, size);
  syncbn::fuzz::Client(script).Run();
  return 0;
}
