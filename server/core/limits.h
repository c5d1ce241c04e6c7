// Every limit of a master, in one place. Exceeding one gives RESOURCE_EXHAUSTED, LIMIT_EXCEEDED, naming the field
// below.

#ifndef SYNCBN_SERVER_CORE_LIMITS_H_
#define SYNCBN_SERVER_CORE_LIMITS_H_

#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"
#include "vocabulary/derived_name.h"

namespace syncbn::core {

struct Limits {
  // Groups that exist at one time, whether or not anyone is connected.
  size_t max_groups = 1024;
  // world_size of a group.
  uint32_t max_workers = 4096;
  // Layers of a group, the names of sums included.
  size_t max_layers = 8192;
  // Channels of a batch-norm layer.
  uint32_t max_channels = 1u << 16;
  // Elements of one PHASE_SUM vector. Clients send longer vectors in chunks.
  uint32_t max_vector_elements = 1u << 20;
  // Rounds of a group that have begun and not ended.
  size_t max_rounds_in_flight = 8192;
  // Contributions in one frame, and keys that a worker is blocked on.
  size_t max_rounds_in_frame = 65536;
  // A stream's first frame, in bytes: room for the longest join of max_layers layers. Later frames may be longer.
  size_t max_first_frame_bytes = size_t{4} << 20;
  // Work that one event may cause at once, in bytes of results and contributions. The rest follows in turns, so that
  // other events are handled in between.
  size_t max_turn_bytes = size_t{8} << 20;
  // Contributions held for rounds of a group that have not ended, in bytes.
  size_t max_pending_bytes = size_t{1} << 30;
  // Length of a job, group or layer name, in bytes, and of a description.
  size_t max_name_bytes = kMostNameBytes;
  size_t max_description_bytes = 1024;

  // The retention window: a replay finds its outcome up to this many sequences behind the layer's newest completed
  // round, within the limits below.
  uint64_t retained_rounds = 128;
  // Failed rounds do not make others old. This many are remembered for each layer and phase, the newest.
  size_t retained_failures = 1024;
  // Outcomes (vectors, errors, missing ranks) of a group beyond this many bytes are forgotten, oldest first.
  size_t max_retained_bytes = size_t{4} << 20;
  // A forward round whose backward round is required is remembered (its contributors and its count) until that has
  // ended, however old it is. Beyond this many bytes in a group, the oldest are dropped.
  size_t max_awaited_bytes = size_t{64} << 20;
  // The newest outcomes are kept whatever their size: as many as a client has of the longest chunks of a vector in
  // flight, all of which it may ask for again after a reconnect.
  size_t min_retained_outcomes = 4;
  // The same as max_retained_bytes under MISSING_POLICY_WAIT, where workers that restart ask again for the outcomes of
  // a whole step.
  size_t max_retained_bytes_waiting = size_t{64} << 20;
  // The bytes of ended rounds that all groups together may keep. Beyond this, groups without a live stream end, those
  // that have been without one for longest first; then the group that keeps most forgets its oldest outcomes.
  size_t max_retained_bytes_of_all = size_t{256} << 20;
  // The keys that tell a new worker where its group stands, in bytes.
  size_t max_newest_rounds_bytes = size_t{1} << 20;

  // Bounds of what a group may declare.
  absl::Duration min_round_timeout = absl::Milliseconds(10);
  absl::Duration max_round_timeout = absl::Hours(24);
  // Longer than any pause of training itself (a validation, a checkpoint). Losses are reported at once, and late rounds
  // after late_round_after.
  absl::Duration default_round_timeout = absl::Minutes(10);
  absl::Duration max_rejoin_grace = absl::Minutes(10);
  absl::Duration default_rejoin_grace = absl::Milliseconds(50);  // Under MISSING_POLICY_WAIT half of round_timeout.
  // The contributors of a round that has waited this long are told once, with the ranks that it waits for.
  absl::Duration late_round_after = absl::Seconds(10);
  // The greatest step by which a join may raise a group's generation. Requeued jobs raise it by 2^32 (client/python),
  // times in microseconds by less than this for years.
  uint64_t max_generation_jump = uint64_t{1} << 48;
  // The furthest that a member's sequences may be beyond another's, and still count for the number at which all go on
  // after some of them have failed.
  uint64_t max_sequence_jump = uint64_t{1} << 40;
  // A leave is acknowledged once the others have read of it. If they do not read, it waits this long. Clients wait for
  // 2 s.
  absl::Duration max_leave_delay = absl::Seconds(1);
  // For so long a worker whose leave an earlier master has not acknowledged may come to the next, which may need what
  // it holds. Counts from when that master hears of the leave.
  absl::Duration leaver_return = absl::Seconds(2);
  // A group without a live stream is kept this long for its workers to come back to.
  absl::Duration group_linger = absl::Minutes(1);

  // The greatest magnitude of a mean or a sum that can be merged without overflow, 2^500; for M2, its square.
  double max_magnitude = 3.2733906078961419e150;
  // The greatest count: the sum over max_workers workers is exact in float64. Beyond it a contribution is
  // INVALID_CONTRIBUTION, whatever the numeric policy.
  int64_t max_count = int64_t{1} << 40;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_LIMITS_H_
