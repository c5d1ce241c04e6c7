// The expected results of the batch-norm operations, computed the plain way in long double over a
// [batch, channels, spatial] tensor of doubles. Shares no code with the kernels.

#ifndef SYNCBN_TESTS_TESTING_BATCH_NORM_ORACLE_H_
#define SYNCBN_TESTS_TESTING_BATCH_NORM_ORACLE_H_

#include <cstddef>
#include <vector>

namespace syncbn::testing {

// A tensor's extents and where its elements lie in memory.
struct OracleShape {
  size_t batch = 0;
  size_t channels = 0;
  size_t spatial = 1;
  bool channels_last = false;

  size_t size() const { return batch * channels * spatial; }
  size_t ChannelOf(size_t i) const { return channels_last ? i % channels : i / spatial % channels; }
};

using Wide = std::vector<long double>;

struct OracleStats {
  Wide mean, m2;
};

inline OracleStats Stats(const OracleShape& shape, const std::vector<double>& x) {
  OracleStats stats{Wide(shape.channels, 0), Wide(shape.channels, 0)};
  const long double count = static_cast<long double>(shape.batch * shape.spatial);
  if (count == 0) return stats;
  for (size_t i = 0; i < x.size(); ++i) stats.mean[shape.ChannelOf(i)] += x[i];
  for (long double& mean : stats.mean) mean /= count;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double d = x[i] - stats.mean[shape.ChannelOf(i)];
    stats.m2[shape.ChannelOf(i)] += d * d;
  }
  return stats;
}

// `residual` may be empty. No rounding to the tensor's type.
inline Wide Forward(const OracleShape& shape, const std::vector<double>& x, const std::vector<double>& mean,
                    const std::vector<double>& scale, const std::vector<double>& shift,
                    const std::vector<double>& residual, bool relu) {
  Wide y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t c = shape.ChannelOf(i);
    y[i] = (static_cast<long double>(x[i]) - mean[c]) * scale[c] + shift[c];
    if (!residual.empty()) y[i] += residual[i];
    if (relu && y[i] < 0) y[i] = 0;
  }
  return y;
}

struct OracleSums {
  Wide sum_dy, sum_dy_xmu;
  // The sums of the terms' magnitudes, to which tolerances are relative.
  Wide magnitude_dy, magnitude_dy_xmu;
};

// `open[i]` says whether the gradient passes at element i.
inline OracleSums BackwardReduce(const OracleShape& shape, const std::vector<double>& dy, const std::vector<double>& x,
                                 const std::vector<double>& mean, const std::vector<bool>& open) {
  const Wide zeros(shape.channels, 0);
  OracleSums sums{zeros, zeros, zeros, zeros};
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t c = shape.ChannelOf(i);
    const long double gradient = open[i] ? dy[i] : 0.0;
    const long double product = gradient * (static_cast<long double>(x[i]) - mean[c]);
    sums.sum_dy[c] += gradient;
    sums.sum_dy_xmu[c] += product;
    sums.magnitude_dy[c] += gradient < 0 ? -gradient : gradient;
    sums.magnitude_dy_xmu[c] += product < 0 ? -product : product;
  }
  return sums;
}

inline Wide Backward(const OracleShape& shape, const std::vector<double>& dy, const std::vector<double>& x,
                     const std::vector<double>& mean, const std::vector<double>& scale,
                     const std::vector<double>& mean_dy, const std::vector<double>& projection,
                     const std::vector<bool>& open) {
  Wide dx(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t c = shape.ChannelOf(i);
    const long double gradient = open[i] ? dy[i] : 0.0;
    dx[i] = scale[c] * (gradient - mean_dy[c] - (static_cast<long double>(x[i]) - mean[c]) * projection[c]);
  }
  return dx;
}

}  // namespace syncbn::testing

#endif  // SYNCBN_TESTS_TESTING_BATCH_NORM_ORACLE_H_
