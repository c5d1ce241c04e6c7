// The two rounds of a layer's step through the C interface, without a tensor and without Python: the floor of the layer
// benchmark. The library's functions come by address, since the process has loaded it privately.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "client/c/syncbn.h"

extern "C" {

struct RawRoundsApi {
  decltype(&syncbn_round_start_forward) start_forward;
  decltype(&syncbn_round_start_backward) start_backward;
  decltype(&syncbn_round_wait) wait;
  decltype(&syncbn_round_sequence) sequence;
  decltype(&syncbn_round_destroy) destroy;
};

// Runs one forward round of a declared layer, and puts its sequence into `sequence`.
// Returns: 0, or the code of the call that failed.
int32_t raw_forward(const RawRoundsApi* api, syncbn_worker* worker, const char* layer, size_t channels,
                    uint64_t* sequence) {
  const std::vector<double> zeros(channels, 0.0);
  syncbn_round* round = nullptr;
  int32_t code = api->start_forward(worker, layer, SYNCBN_NEXT_SEQUENCE, 2, zeros.data(), zeros.data(), channels,
                                    SYNCBN_BACKWARD_REQUIRED, &round, nullptr);
  if (code != 0) return code;
  code = api->wait(round, -1, nullptr);
  *sequence = api->sequence(round);
  api->destroy(round);
  return code;
}

// Runs the backward round of a forward round.
// Returns: 0, or the code of the call that failed.
int32_t raw_backward(const RawRoundsApi* api, syncbn_worker* worker, const char* layer, size_t channels,
                     uint64_t sequence) {
  const std::vector<double> zeros(channels, 0.0);
  syncbn_round* round = nullptr;
  int32_t code = api->start_backward(worker, layer, sequence, zeros.data(), zeros.data(), channels, &round, nullptr);
  if (code != 0) return code;
  code = api->wait(round, -1, nullptr);
  api->destroy(round);
  return code;
}

}  // extern "C"
