// The C++ worker of the heterogeneous example: a whole trainer around syncbn::BatchNorm. README.md tells the rules.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "client/cc/batch_norm.h"
#include "client/cc/worker.h"

namespace {

constexpr int64_t kPixels = 64;
constexpr int64_t kHidden = 32;
constexpr int64_t kClasses = 10;

struct Flags {
  std::string target, group, folder, output;
  uint32_t rank = 0, world_size = 1;
  int64_t begin = 0, end = 0, steps = 0, global_batch = 0;
  double learning_rate = 0.0;
};

template <typename T>
absl::StatusOr<std::vector<T>> ReadArray(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read \"", path, "\""));
  std::vector<T> values(static_cast<size_t>(file.tellg()) / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  return values;
}

absl::Status WriteArray(const std::string& path, const std::vector<double>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(double)));
  return file ? absl::OkStatus() : absl::UnavailableError(absl::StrCat("cannot write \"", path, "\""));
}

// [rows, columns], row by row.
struct Matrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<double> values;

  Matrix(int64_t r, int64_t c) : rows(r), columns(c), values(r * c, 0.0) {}
  double& at(int64_t r, int64_t c) { return values[r * columns + c]; }
  double at(int64_t r, int64_t c) const { return values[r * columns + c]; }

  syncbn::TensorView view() {
    return {values.data(), {rows, columns, 1, syncbn::kernels::DataType::kFloat64}, syncbn::Device::kCpu, 0};
  }
};

// x [n, in] times the transpose of w [out, in].
Matrix Linear(const Matrix& x, absl::Span<const double> w, int64_t out) {
  Matrix y(x.rows, out);
  for (int64_t n = 0; n < x.rows; ++n) {
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < x.columns; ++i) y.at(n, o) += x.at(n, i) * w[o * x.columns + i];
    }
  }
  return y;
}

// dy [n, out] times w [out, in].
Matrix LinearInputGradient(const Matrix& dy, absl::Span<const double> w, int64_t in) {
  Matrix dx(dy.rows, in);
  for (int64_t n = 0; n < dy.rows; ++n) {
    for (int64_t o = 0; o < dy.columns; ++o) {
      for (int64_t i = 0; i < in; ++i) dx.at(n, i) += dy.at(n, o) * w[o * in + i];
    }
  }
  return dx;
}

// Transpose of dy times x, added to `gradient` [out, in].
void AddLinearWeightGradient(const Matrix& dy, const Matrix& x, absl::Span<double> gradient) {
  for (int64_t n = 0; n < dy.rows; ++n) {
    for (int64_t o = 0; o < dy.columns; ++o) {
      for (int64_t i = 0; i < x.columns; ++i) gradient[o * x.columns + i] += dy.at(n, o) * x.at(n, i);
    }
  }
}

// Softmax minus the labels' indicator: the gradient of the cross entropy summed over rows.
void ToLogitsGradient(const std::vector<int64_t>& labels, Matrix& logits) {
  for (int64_t n = 0; n < logits.rows; ++n) {
    double* const row = &logits.at(n, 0);
    const double largest = *std::max_element(row, row + logits.columns);
    double sum = 0.0;
    for (int64_t c = 0; c < logits.columns; ++c) sum += row[c] = std::exp(row[c] - largest);
    for (int64_t c = 0; c < logits.columns; ++c) row[c] /= sum;
    row[labels[n]] -= 1.0;
  }
}

// The place of each parameter in the flat vector.
struct Parameters {
  absl::Span<double> w1, gamma1, beta1, w2, gamma2, beta2, w3, b3;

  explicit Parameters(std::vector<double>& flat) {
    size_t offset = 0;
    for (const auto& [part, size] :
         {std::pair{&w1, kHidden * kPixels}, std::pair{&gamma1, kHidden}, std::pair{&beta1, kHidden},
          std::pair{&w2, kHidden * kHidden}, std::pair{&gamma2, kHidden}, std::pair{&beta2, kHidden},
          std::pair{&w3, kClasses * kHidden}, std::pair{&b3, kClasses}}) {
      *part = absl::MakeSpan(flat).subspan(offset, static_cast<size_t>(size));
      offset += static_cast<size_t>(size);
    }
  }
};

void Copy(absl::Span<const double> from, absl::Span<double> to) { std::copy(from.begin(), from.end(), to.begin()); }

class Network {
 public:
  static absl::StatusOr<Network> Create(syncbn::Worker* worker) {
    syncbn::BatchNorm::Options options;
    options.channels = kHidden;
    options.relu = true;
    options.name = "bn1";
    auto first = syncbn::BatchNorm::Create(worker, options);
    if (!first.ok()) return first.status();
    options.name = "bn2";
    auto second = syncbn::BatchNorm::Create(worker, options);
    if (!second.ok()) return second.status();
    return Network(*std::move(first), *std::move(second));
  }

  // The gradient of the summed cross entropy, flat, as `flat` is.
  absl::StatusOr<std::vector<double>> Gradient(std::vector<double>& flat, const Matrix& images,
                                               const std::vector<int64_t>& labels) {
    const Parameters p(flat);
    Copy(p.gamma1, first_.weight());
    Copy(p.beta1, first_.bias());
    Copy(p.gamma2, second_.weight());
    Copy(p.beta2, second_.bias());

    Matrix x1 = Linear(images, p.w1, kHidden);
    Matrix y1(x1.rows, kHidden);
    if (absl::Status status = first_.Forward(x1.view(), y1.view()); !status.ok()) return status;
    Matrix x2 = Linear(y1, p.w2, kHidden);
    Matrix y2(x2.rows, kHidden);
    if (absl::Status status = second_.Forward(x2.view(), y2.view()); !status.ok()) return status;
    Matrix d_logits = Linear(y2, p.w3, kClasses);
    for (int64_t n = 0; n < d_logits.rows; ++n) {
      for (int64_t c = 0; c < kClasses; ++c) d_logits.at(n, c) += p.b3[c];
    }
    ToLogitsGradient(labels, d_logits);

    std::vector<double> gradient(flat.size(), 0.0);
    const Parameters g(gradient);
    for (int64_t n = 0; n < d_logits.rows; ++n) {
      for (int64_t c = 0; c < kClasses; ++c) g.b3[c] += d_logits.at(n, c);
    }
    AddLinearWeightGradient(d_logits, y2, g.w3);
    Matrix d2 = LinearInputGradient(d_logits, p.w3, kHidden);
    if (absl::Status status = BackwardThrough(second_, x2, d2, g.gamma2, g.beta2); !status.ok()) return status;
    AddLinearWeightGradient(d2, y1, g.w2);
    Matrix d1 = LinearInputGradient(d2, p.w2, kHidden);
    if (absl::Status status = BackwardThrough(first_, x1, d1, g.gamma1, g.beta1); !status.ok()) return status;
    AddLinearWeightGradient(d1, images, g.w1);
    return gradient;
  }

  std::vector<double> RunningStatistics() {
    std::vector<double> all;
    for (syncbn::BatchNorm* norm : {&first_, &second_}) {
      all.insert(all.end(), norm->running_mean().begin(), norm->running_mean().end());
      all.insert(all.end(), norm->running_var().begin(), norm->running_var().end());
    }
    return all;
  }

 private:
  Network(syncbn::BatchNorm first, syncbn::BatchNorm second) : first_(std::move(first)), second_(std::move(second)) {}

  // `d` holds dy before and dx afterwards.
  static absl::Status BackwardThrough(syncbn::BatchNorm& norm, Matrix& x, Matrix& d, absl::Span<double> d_gamma,
                                      absl::Span<double> d_beta) {
    norm.ClearGradients();
    if (absl::Status status = norm.Backward(x.view(), d.view(), d.view()); !status.ok()) return status;
    Copy(norm.weight_gradient(), d_gamma);
    Copy(norm.bias_gradient(), d_beta);
    return absl::OkStatus();
  }

  syncbn::BatchNorm first_;
  syncbn::BatchNorm second_;
};

absl::Status Train(const Flags& flags) {
  const auto images = ReadArray<double>(flags.folder + "/images");
  const auto labels = ReadArray<int64_t>(flags.folder + "/labels");
  const auto batches = ReadArray<int64_t>(flags.folder + "/batches");
  auto parameters = ReadArray<double>(flags.folder + "/parameters");
  for (const absl::Status& status : {images.status(), labels.status(), batches.status(), parameters.status()}) {
    if (!status.ok()) return status;
  }
  syncbn::Worker::Options options;
  options.target = flags.target;
  options.group = flags.group;
  options.rank = flags.rank;
  options.world_size = flags.world_size;
  options.round_timeout = absl::Seconds(60);
  auto worker = syncbn::Worker::Join(options);
  if (!worker.ok()) return worker.status();
  if (absl::Status status = (*worker)->WaitForMembers(absl::Seconds(60)); !status.ok()) return status;
  absl::StatusOr<Network> network = Network::Create(worker->get());
  if (!network.ok()) return network.status();

  const int64_t rows = flags.end - flags.begin;
  for (int64_t step = 0; step < flags.steps; ++step) {
    Matrix batch(rows, kPixels);
    std::vector<int64_t> batch_labels(rows);
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t row = (*batches)[step * flags.global_batch + flags.begin + n];
      std::copy_n(&(*images)[row * kPixels], kPixels, &batch.at(n, 0));
      batch_labels[n] = (*labels)[row];
    }
    const auto gradient = network->Gradient(*parameters, batch, batch_labels);
    if (!gradient.ok()) return gradient.status();
    auto round = (*worker)->StartSum("gradients", syncbn::Worker::kNextSequence, *gradient);
    if (!round.ok()) return round.status();
    if (absl::Status status = round->Wait(); !status.ok()) return status;
    const double rate = flags.learning_rate / static_cast<double>(flags.global_batch);
    for (size_t i = 0; i < parameters->size(); ++i) (*parameters)[i] -= rate * round->result().vector()[i];
  }
  const std::vector<double> statistics = network->RunningStatistics();
  parameters->insert(parameters->end(), statistics.begin(), statistics.end());
  if (absl::Status status = (*worker)->Leave("finished"); !status.ok()) return status;
  return WriteArray(flags.output, *parameters);
}

}  // namespace

int main(int argc, char** argv) {
  Flags flags;
  CLI::App app("A C++ worker of the heterogeneous example.");
  app.add_option("--target", flags.target)->required();
  app.add_option("--group", flags.group)->required();
  app.add_option("--folder", flags.folder)->required();
  app.add_option("--output", flags.output)->required();
  app.add_option("--rank", flags.rank)->required();
  app.add_option("--world-size", flags.world_size)->required();
  app.add_option("--begin", flags.begin)->required();
  app.add_option("--end", flags.end)->required();
  app.add_option("--steps", flags.steps)->required();
  app.add_option("--global-batch", flags.global_batch)->required();
  app.add_option("--learning-rate", flags.learning_rate)->required();
  CLI11_PARSE(app, argc, argv);
  if (const absl::Status status = Train(flags); !status.ok()) {
    std::fprintf(stderr, "cpp_worker: %s\n", status.ToString().c_str());
    return 1;
  }
  return 0;
}
