// The contributions of a worker that have been answered, kept for a master that does not know them.

#ifndef SYNCBN_CLIENT_CC_SESSION_ROUND_LOG_H_
#define SYNCBN_CLIENT_CC_SESSION_ROUND_LOG_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "client/cc/session/frame.h"
#include "client/cc/session/types.h"

namespace syncbn::session {

// Limits of the rounds that a worker keeps. PROTOCOL.md, section 13, lists both.
struct LogLimits {
  size_t rounds = 16;               // The newest of each layer and phase,
  size_t bytes = size_t{32} << 20;  // and of all layers together, as long as they take so much.
};

// Holds the newest answered rounds of each layer and phase, and beyond those the forward rounds whose backward rounds
// have not ended. Adding a round allocates nothing once the log is full.
//
// *Thread safety*: none.
class RoundLog {
 public:
  using Entry = std::shared_ptr<Contribution>;

  explicit RoundLog(LogLimits limits) : limits_(limits) {}
  RoundLog(const RoundLog&) = delete;
  RoundLog& operator=(const RoundLog&) = delete;

  // Adds a round that has ended, and forgets others for the limits. `layer` identifies the layer, and is not looked
  // into. `awaited`: a forward round whose backward round this worker is to contribute to.
  void Add(const KnownLayer* layer, Entry entry, bool awaited);
  // The backward round of this sequence has ended.
  void EndAwaiting(const KnownLayer* layer, uint64_t sequence);
  void Clear();

  // Calls `visit` with each entry, in no order.
  template <typename Visit>
  void ForEach(Visit&& visit) const {
    for (const Entries* entries : {&recent_, &awaited_}) {
      for (const Entry& entry : *entries) visit(entry);
    }
  }
  // Returns, of each layer and phase, the greatest sequence that was forgotten. Forward rounds that are held are none
  // of these, however old they are.
  std::vector<RoundKey> Forgotten() const;

 private:
  using Entries = std::list<Entry>;
  struct History {
    absl::InlinedVector<Entries::iterator, 17> recent;  // Oldest first.
    std::optional<RoundKey> forgotten;
  };
  struct Layer {
    std::array<History, 3> phases;
    absl::flat_hash_map<uint64_t, Entries::iterator> awaited;  // Forward rounds, by sequence.
  };

  static History& HistoryOf(Layer& layer, const Entry& entry);
  static size_t BytesOf(const Entry& entry);
  void AddRecent(Layer& layer, Entries::iterator entry);
  // Forgets the oldest of the history, or the oldest awaited round of all.
  void DropOldest(History& history);
  void DropOldestAwaited();
  void Drop(History& history, Entries& from, Entries::iterator entry);
  void Trim();

  const LogLimits limits_;
  absl::flat_hash_map<const KnownLayer*, std::unique_ptr<Layer>> layers_;
  Entries recent_;   // Oldest first.
  Entries awaited_;  // Oldest first.
  Entries spare_;    // Nodes to use again.
  size_t bytes_ = 0;
};

}  // namespace syncbn::session

#endif  // SYNCBN_CLIENT_CC_SESSION_ROUND_LOG_H_
