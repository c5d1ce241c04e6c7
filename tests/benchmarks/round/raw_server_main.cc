// The raw star's server as a process: raw_server ADDRESS WORLD_SIZE. It ends when its workers do.

#include <cstdio>
#include <cstdlib>
#include <string>

#include "tests/benchmarks/round/raw_star.h"

int main(int argc, char** argv) {
  using namespace syncbn::benchmarks;
  if (argc != 3) {
    std::fprintf(stderr, "usage: raw_server 127.0.0.1:PORT|unix:PATH WORLD_SIZE\n");
    return 2;
  }
  std::string target = argv[1];
  const int world_size = std::atoi(argv[2]);
  const auto listener = Socket::Listen(&target, world_size);
  absl::Status status = listener.status();
  if (status.ok()) {
    std::printf("ready on %s\n", target.c_str());
    std::fflush(stdout);
    status = ServeRawStar(**listener, static_cast<uint32_t>(world_size));
  }
  if (!status.ok()) std::fprintf(stderr, "raw_server: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
