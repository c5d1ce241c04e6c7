// The layers of a worker, and what the master has been told about them on the current stream.

#ifndef SYNCBN_CLIENT_CC_SESSION_DECLARATIONS_H_
#define SYNCBN_CLIENT_CC_SESSION_DECLARATIONS_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "client/cc/session/frame.h"
#include "client/cc/session/types.h"

namespace syncbn::session {

// A declaration of a layer, valid from one point on in the order of all that the worker declares and begins.
struct DeclaredLayer {
  LayerOptions options;
  uint64_t order = 0;
};
using DeclaredLayerPtr = std::shared_ptr<const DeclaredLayer>;

// The options of a declaration, which keep it alive.
inline std::shared_ptr<const LayerOptions> OptionsOf(const DeclaredLayerPtr& declared) {
  return {declared, &declared->options};
}

struct KnownLayer {
  DeclaredLayerPtr now;   // The newest declaration.
  DeclaredLayerPtr said;  // The newest that the master has from this stream: null, `now`, or an earlier one.
};

// Keeps declarations in step with contributions: a contribution reaches the master under the declaration that was valid
// when it was begun, on the first stream and on every later one.
//
// *Thread safety*: none.
class Declarations {
 public:
  // Declares the layer for what is begun from now on. Has no effect if its newest declaration is the same. The returned
  // reference stays valid.
  KnownLayer& Declare(const LayerOptions& layer);
  // Returns null if there is no such layer.
  KnownLayer* Find(absl::string_view name);
  const KnownLayer* Find(absl::string_view name) const;
  // Returns the next point in the order of declarations and contributions.
  uint64_t NextOrder() { return ++order_; }

  // Begins a new stream, which brings the contributions of `pending` again: for each layer it starts with the
  // declaration under which the oldest of them was begun. `known` becomes these declarations, by name.
  void BeginStream(const std::vector<std::shared_ptr<Contribution>>& pending,
                   std::vector<std::shared_ptr<const LayerOptions>>* known);

  // Adds to the frame what must be declared before `contribution`. Returns false if the contribution must wait for
  // another frame, because a frame's declarations count before all of its contributions.
  bool AddBefore(const Contribution& contribution, ClientFrame* frame);
  // Adds to the frame every declaration that the master does not have, as far as its contributions permit.
  void AddRest(ClientFrame* frame);
  // Returns whether the master has been told every declaration.
  bool all_said() const { return unsaid_.empty(); }

 private:
  bool AddBefore(uint64_t order, ClientFrame* frame);
  bool Add(const DeclaredLayerPtr& declared, ClientFrame* frame);

  // A std::map: contributions point into it.
  std::map<std::string, KnownLayer, std::less<>> layers_;
  std::deque<DeclaredLayerPtr> unsaid_;  // Not yet said on this stream, by order.
  uint64_t order_ = 0;
};

}  // namespace syncbn::session

#endif  // SYNCBN_CLIENT_CC_SESSION_DECLARATIONS_H_
