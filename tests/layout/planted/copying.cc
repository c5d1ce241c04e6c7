#include "tests/layout/planted/copying.h"

namespace syncbn::testing {

size_t SizeOfTwo(const std::string& name) { return TotalSize({name, name}); }

}  // namespace syncbn::testing
