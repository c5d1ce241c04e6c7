// Access to the pages about a master.

#ifndef SYNCBN_SERVER_HTTP_ACCESS_H_
#define SYNCBN_SERVER_HTTP_ACCESS_H_

#include <optional>

#include "absl/strings/string_view.h"
#include "server/core/secret.h"
#include "server/http/answer.h"

namespace syncbn::http {

// Probes and metrics are for everybody, since what asks for them often has no token. The status page and everything
// that it is made of may be closed, or ask for a token.
//
// Thread safety: any thread may call any method.
class Access {
 public:
  // `token`: what readers must bear; empty for none. `pages_open`: whether there is anything but probes and metrics.
  Access(absl::string_view token, bool pages_open);

  // `authorization` is the request's header of this name: "Bearer TOKEN", or "Basic ..." with the token as password,
  // which browsers ask for; empty if absent.
  //
  // Returns: what to answer instead of the path's content: 401 without the token, 403 where the pages are closed;
  // nothing if the content may be sent.
  std::optional<Answer> Refuse(absl::string_view path, absl::string_view authorization) const;

 private:
  const core::Secret token_;
  const bool pages_open_;
};

}  // namespace syncbn::http

#endif  // SYNCBN_SERVER_HTTP_ACCESS_H_
