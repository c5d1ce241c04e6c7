// A set of ranks, one bit each.

#ifndef SYNCBN_SERVER_CORE_RANK_SET_H_
#define SYNCBN_SERVER_CORE_RANK_SET_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "server/core/types.h"

namespace syncbn::core {

// Grows with the greatest rank that it has held: 512 bytes at the most workers that a group may have.
class RankSet {
 public:
  bool empty() const {
    return std::all_of(words_.begin(), words_.end(), [](uint64_t word) { return word == 0; });
  }

  bool contains(Rank rank) const { return rank / 64 < words_.size() && (words_[rank / 64] >> (rank % 64) & 1) != 0; }

  void insert(Rank rank) {
    if (rank / 64 >= words_.size()) words_.resize(rank / 64 + 1);
    words_[rank / 64] |= uint64_t{1} << (rank % 64);
  }

  void erase(Rank rank) {
    if (rank / 64 < words_.size()) words_[rank / 64] &= ~(uint64_t{1} << (rank % 64));
  }

  // Ascending.
  std::vector<Rank> ToVector() const {
    std::vector<Rank> ranks;
    for (Rank rank = 0; rank < words_.size() * 64; ++rank) {
      if (contains(rank)) ranks.push_back(rank);
    }
    return ranks;
  }

 private:
  std::vector<uint64_t> words_;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_RANK_SET_H_
