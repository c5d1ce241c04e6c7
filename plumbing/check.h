// Assertions on our own code. A condition that only a bug can break crashes the process with a message; bad input from
// outside gets a status instead.

#ifndef SYNCBN_PLUMBING_CHECK_H_
#define SYNCBN_PLUMBING_CHECK_H_

#include <string>

#include "absl/base/attributes.h"
#include "absl/base/optimization.h"
#include "absl/strings/str_cat.h"

// Aborts unless the condition holds, in every build. Writes file, line, condition and message to stderr first.
//
//   SYNCBN_CHECK(round != pending.end());
//   SYNCBN_CHECK(rank < world_size, "rank ", rank, " of ", world_size);
//
// The message is what follows the condition, joined by absl::StrCat; it is evaluated only if the condition is false. A
// condition with a comma outside parentheses needs parentheses of its own.
//
// Thread safety: any thread, with any lock held. Takes no lock and calls no gRPC.
#define SYNCBN_CHECK(condition, ...) \
  (ABSL_PREDICT_TRUE(condition)      \
       ? (void)0                     \
       : ::syncbn::internal::CheckFailed(__FILE__, __LINE__, #condition, ::absl::StrCat(__VA_ARGS__)))

namespace syncbn::internal {

[[noreturn]] ABSL_ATTRIBUTE_COLD void CheckFailed(const char* file, int line, const char* condition,
                                                  const std::string& message);

}  // namespace syncbn::internal

#endif  // SYNCBN_PLUMBING_CHECK_H_
