// A set of ranks, one bit each.

#ifndef SYNCBN_SERVER_CORE_RANK_SET_H_
#define SYNCBN_SERVER_CORE_RANK_SET_H_

#include <algorithm>
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

  size_t size() const {
    size_t ranks = 0;
    for (const uint64_t word : words_) ranks += __builtin_popcountll(word);
    return ranks;
  }

  // Calls `visit` with each rank, ascending.
  template <typename Visit>
  void ForEach(const Visit& visit) const {
    for (size_t i = 0; i < words_.size(); ++i) {
      for (uint64_t left = words_[i]; left != 0; left &= left - 1) {
        visit(static_cast<Rank>(i * 64 + __builtin_ctzll(left)));
      }
    }
  }

  // Ascending.
  std::vector<Rank> ToVector() const {
    std::vector<Rank> ranks;
    ranks.reserve(size());
    ForEach([&ranks](Rank rank) { ranks.push_back(rank); });
    return ranks;
  }

 private:
  std::vector<uint64_t> words_;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_RANK_SET_H_
