// Runs the algorithms of kernels/cuda on the host: a block is a loop over its threads for each phase, a grid is a loop
// over its blocks. A seed permutes both loops, since the result must depend on neither order.

#ifndef SYNCBN_TESTS_KERNELS_CUDA_HOST_EXECUTOR_H_
#define SYNCBN_TESTS_KERNELS_CUDA_HOST_EXECUTOR_H_

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace syncbn::testing {

// The host's version of the Block that kernels/cuda/block.cuh describes.
template <typename State>
class HostBlock {
 public:
  using StateType = State;

  HostBlock(int64_t tile, int split, int threads, size_t shared_doubles, std::mt19937_64* random)
      : tile_(tile), split_(split), random_(random), order_(threads), states_(threads), shared_(shared_doubles) {
    std::iota(order_.begin(), order_.end(), 0);
  }

  int64_t tile() const { return tile_; }
  int split() const { return split_; }
  double* shared() { return shared_.data(); }

  template <typename Phase>
  void Each(Phase phase) {
    if (random_ != nullptr) std::shuffle(order_.begin(), order_.end(), *random_);
    for (const int thread : order_) phase(thread, states_[thread]);
    after_barrier_ = true;
  }

  bool Arrive(uint32_t* counter, int64_t parties) {
    if (!std::exchange(after_barrier_, false)) {
      std::fprintf(stderr, "Arrive does not follow an Each, whose barrier it relies on\n");
      std::abort();
    }
    const bool last = *counter == parties - 1;
    *counter = last ? 0 : *counter + 1;
    return last;
  }

  void Raise(volatile uint32_t* flag, uint32_t value) { *flag = value; }

 private:
  int64_t tile_;
  int split_;
  std::mt19937_64* random_;
  std::vector<int> order_;
  std::vector<State> states_;
  std::vector<double> shared_;
  bool after_barrier_ = false;
};

// Calls body(block) for each block of a grid of tiles x splits, in order for seed 0, else in an order and with orders
// of threads drawn from the seed.
template <typename State, typename Body>
void RunGrid(int64_t tiles, int splits, int threads, size_t shared_doubles, uint64_t seed, Body body) {
  std::mt19937_64 random(seed);
  std::vector<int64_t> order(tiles * splits);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (seed != 0) std::shuffle(order.begin(), order.end(), random);
  for (const int64_t index : order) {
    HostBlock<State> block(index % tiles, static_cast<int>(index / tiles), threads, shared_doubles,
                           seed == 0 ? nullptr : &random);
    body(block);
  }
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_KERNELS_CUDA_HOST_EXECUTOR_H_
