#include "tests/layout/planted/apart.h"

namespace syncbn::testing {

// Reads without the lock, which the header names.
int CounterApart::value() const { return value_; }

}  // namespace syncbn::testing
