// Gives inputs to a fuzzer's function where there is no libFuzzer: files, the files of folders, and random changes of
// them.
//
//   replay PATH... [--random=N] [--seed=S]

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

// The input that is being tried, which is written to a file if it crashes.
std::string* current = nullptr;

void Try(std::string input) {
  static std::string kept;
  kept = std::move(input);
  current = &kept;
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(kept.data()), kept.size());
}

std::vector<std::string> Read(const std::filesystem::path& path) {
  std::vector<std::filesystem::path> files = {path};
  if (std::filesystem::is_directory(path)) {
    files.clear();
    for (const auto& entry : std::filesystem::directory_iterator(path)) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
  }
  std::vector<std::string> inputs;
  for (const std::filesystem::path& file : files) {
    std::ifstream stream(file, std::ios::binary);
    inputs.emplace_back((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  }
  return inputs;
}

class Mutator {
 public:
  Mutator(std::vector<std::string> corpus, uint64_t seed) : corpus_(std::move(corpus)), random_(seed) {}

  // Returns the beginning of one input and the end of another, with some bytes changed.
  std::string Next() {
    const std::string& head = Pick();
    const std::string& tail = Pick();
    std::string input = head.substr(0, Below(head.size() + 1)) + tail.substr(Below(tail.size() + 1));
    for (size_t i = Below(8); i > 0; --i) {
      const size_t place = Below(input.size() + 1);
      switch (Below(3)) {
        case 0:
          input.insert(place, 1, Byte());
          break;
        case 1:
          if (place < input.size()) input[place] = Byte();
          break;
        default:
          for (size_t j = Below(32); j > 0; --j) input.push_back(Byte());
      }
    }
    return input;
  }

 private:
  size_t Below(size_t n) { return random_() % n; }
  char Byte() { return static_cast<char>(random_()); }
  const std::string& Pick() { return corpus_[Below(corpus_.size())]; }

  const std::vector<std::string> corpus_;
  std::mt19937_64 random_;
};

// Writes the input to where the test's outputs are kept.
void Save(int signal) {
  const char* const folder = std::getenv("TEST_UNDECLARED_OUTPUTS_DIR");
  const std::string name = std::string(folder == nullptr ? "." : folder) + "/crash";
  std::ofstream(name, std::ios::binary) << *current;
  std::fprintf(stderr, "the input of %zu bytes is in %s\n", current->size(), name.c_str());
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> corpus;
  uint64_t random = 0, seed = std::random_device()();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--random=", 0) == 0) {
      random = std::strtoull(argument.c_str() + 9, nullptr, 10);
    } else if (argument.rfind("--seed=", 0) == 0) {
      seed = std::strtoull(argument.c_str() + 7, nullptr, 10);
    } else {
      for (std::string& input : Read(argument)) corpus.push_back(std::move(input));
    }
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "there is no corpus\n");
    return 1;
  }
  std::signal(SIGABRT, Save);
  std::signal(SIGSEGV, Save);
  std::printf("%zu inputs, then %llu random ones of --seed=%llu\n", corpus.size(),
              static_cast<unsigned long long>(random), static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  for (const std::string& input : corpus) Try(input);
  Mutator mutator(corpus, seed);
  for (uint64_t i = 0; i < random; ++i) Try(mutator.Next());
  return 0;
}
