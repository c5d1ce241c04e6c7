#include "plumbing/secret.h"

#include <openssl/evp.h>
#include <openssl/rand.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "plumbing/bounded_file.h"
#include "plumbing/check.h"

namespace syncbn {

absl::Status CheckToken(absl::string_view token) {
  if (token.empty() || token.size() > kMostTokenBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the token has ", token.size(), " bytes; it has 1 to ", kMostTokenBytes));
  }
  if (std::all_of(token.begin(), token.end(), [](unsigned char c) { return absl::ascii_isgraph(c); })) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      "the token has a space or a character that is not printable ASCII; a token has neither");
}

absl::StatusOr<std::string> ReadTokenFile(const std::string& path) {
  constexpr size_t kMostFileBytes = 4 * kMostTokenBytes;
  const auto text = ReadBoundedFile("token file", path, kMostFileBytes);
  if (!text.ok()) return text.status();
  if (text->empty()) {
    return absl::InvalidArgumentError(absl::StrCat("cannot read a token from \"", path, "\": it is empty"));
  }
  const size_t end = std::min(text->find('\n'), text->size());
  if (end + 1 < text->size()) {
    return absl::InvalidArgumentError(absl::StrCat("the token file \"", path, "\" has more than one line"));
  }
  std::string token = text->substr(0, end);
  if (end < text->size() && absl::EndsWith(token, "\r")) token.pop_back();
  if (const absl::Status status = CheckToken(token); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("token file \"", path, "\": ", status.message()));
  }
  return token;
}

std::array<uint8_t, 32> Sha256(absl::string_view bytes) {
  std::array<uint8_t, 32> digest = {};
  unsigned int size = 0;
  const int done = EVP_Digest(bytes.data(), bytes.size(), digest.data(), &size, EVP_sha256(), nullptr);
  SYNCBN_CHECK(done == 1 && size == digest.size(), "OpenSSL has no SHA-256");
  return digest;
}

std::string RandomBytes(size_t count) {
  std::string bytes(count, '\0');
  const int done = RAND_bytes(reinterpret_cast<unsigned char*>(bytes.data()), static_cast<int>(count));
  SYNCBN_CHECK(done == 1, "the system has no random bytes");
  return bytes;
}

}  // namespace syncbn
