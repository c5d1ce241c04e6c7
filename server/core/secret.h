// A secret that a join brings, as its digest: enough to compare it, and useless to whoever reads the master's memory.

#ifndef SYNCBN_SERVER_CORE_SECRET_H_
#define SYNCBN_SERVER_CORE_SECRET_H_

#include <array>
#include <cstddef>
#include <cstdint>

namespace syncbn::core {

// An absent secret equals only another absent one. The comparison takes the same time wherever two digests differ.
//
// Thread safety: none; a plain value.
class Secret {
 public:
  using Digest = std::array<uint8_t, 32>;

  Secret() = default;
  // `digest` is that of a secret that is not empty, by a cryptographic hash.
  explicit Secret(const Digest& digest) : digest_(digest), present_(true) {}

  bool present() const { return present_; }

  friend bool operator==(const Secret& a, const Secret& b) {
    uint8_t difference = a.present_ == b.present_ ? 0 : 1;
    for (size_t i = 0; i < a.digest_.size(); ++i) difference |= a.digest_[i] ^ b.digest_[i];
    return difference == 0;
  }
  friend bool operator!=(const Secret& a, const Secret& b) { return !(a == b); }

 private:
  Digest digest_ = {};
  bool present_ = false;
};

}  // namespace syncbn::core

#endif  // SYNCBN_SERVER_CORE_SECRET_H_
