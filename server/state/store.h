// The place where a master's state is kept between its lives.

#ifndef SYNCBN_SERVER_STATE_STORE_H_
#define SYNCBN_SERVER_STATE_STORE_H_

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/core/state.h"

namespace syncbn::state {

// Belongs to one master at a time.
//
// Thread safety: one thread at a time.
class Store {
 public:
  virtual ~Store() = default;

  // Returns: every group that is stored, with its layers, by name. To be called once, before the first Save.
  // Errors: DATA_LOSS if what is stored is damaged; it stays as it is.
  virtual absl::StatusOr<std::vector<core::GroupState>> Load() = 0;

  // Stores the changes, all of them or none, whatever happens meanwhile: a group's layers that are not among them stay.
  //
  // Errors: why nothing was stored where the next master looks for it, such as a full disk. The same call may be tried
  // again.
  virtual absl::Status Save(const core::StateChanges& changes) = 0;
};

}  // namespace syncbn::state

#endif  // SYNCBN_SERVER_STATE_STORE_H_
