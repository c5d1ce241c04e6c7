#include "kernels/cpu/elementwise.h"

#include <algorithm>

#include "hwy/cache_control.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise.cc"
// clang-format off
#include "kernels/cpu/targets.h"
// clang-format on
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace syncbn::kernels::cpu::HWY_NAMESPACE {
namespace {

// A run of elements whose coefficients are entries entry, entry + 1, ... of the table, or the one entry for all.
struct Segment {
  int64_t first = 0;
  int64_t size = 0;
  int64_t entry = 0;
  int64_t end = 0;  // Elements before it may be read: behind it another thread may be writing, since y may be x.

  bool CanRead(int64_t i) const { return first + i + kLanes <= end; }
};

// Goes through the segments of consecutive elements. Only the start divides: a segment of a small plane takes little
// longer than a division.
class Segments {
 public:
  HWY_INLINE Segments(const ElementwisePlan& plan, int64_t begin) : plan_(plan), at_(begin) {
    if (plan.repeat == 1) {
      entry_ = begin % plan.period;
      left_ = plan.period - entry_;
    } else {
      entry_ = begin / plan.repeat % plan.period;
      left_ = plan.repeat - begin % plan.repeat;
    }
  }

  int64_t at() const { return at_; }

  // The next one, or as much of it as lies before `end`.
  HWY_INLINE Segment Next(int64_t end) {
    const Segment segment = {at_, std::min(end - at_, left_), entry_, end};
    at_ += segment.size;
    left_ -= segment.size;
    if (plan_.repeat == 1) {
      entry_ += segment.size;
      if (left_ == 0) {
        entry_ = 0;
        left_ = plan_.period;
      }
    } else if (left_ == 0) {
      entry_ = entry_ + 1 == plan_.period ? 0 : entry_ + 1;
      left_ = plan_.repeat;
    }
    return segment;
  }

 private:
  const ElementwisePlan& plan_;
  int64_t at_;
  int64_t entry_;
  int64_t left_;  // Elements of the segment that at_ is in.
};

// A coefficient's lanes for a group of elements: from the table, or the same for all.
template <bool adjacent>
class Coefficient {
 public:
  HWY_INLINE Coefficient(const double* table, const Segment& segment)
      : entries_(table + segment.entry), all_(Broadcast(table[segment.entry])) {}

  HWY_INLINE Lanes At(int64_t i) const {
    if constexpr (adjacent) {
      return LoadDoubles(entries_ + i);
    } else {
      return all_;
    }
  }

  HWY_INLINE Lanes At(int64_t i, int64_t n) const {
    if constexpr (adjacent) {
      return LoadDoubles(entries_ + i, n);
    } else {
      return all_;
    }
  }

 private:
  const double* entries_;
  Lanes all_;
};

template <DataType type, bool residual, bool relu>
HWY_INLINE Lanes Normalize(const Lanes& x, const Lanes& mean, const Lanes& scale, const Lanes& shift,
                           const Lanes& added) {
  Lanes y = ForwardOutput<type>(x, {mean, scale, shift, false});
  if constexpr (residual) y = y + added;
  if constexpr (relu) y = Relu(y);
  return y;
}

// Tells whether streams may go to both: vectors are stored around the caches at whole vectors' addresses alone.
bool BothCanStream(const uint8_t* a, const uint8_t* b) {
  const auto addresses = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return addresses % kStreamAlignment == 0;
}

template <DataType type, bool adjacent, bool residual, bool relu, bool streams>
HWY_INLINE void ForwardSegment(const ForwardArgs& args, const Segment& segment) {
  constexpr int64_t kSize = Element<type>::kSize;
  const Coefficient<adjacent> mean(args.coefficients.mean, segment);
  const Coefficient<adjacent> scale(args.coefficients.scale, segment);
  const Coefficient<adjacent> shift(args.coefficients.shift, segment);
  const uint8_t* x = args.x + segment.first * kSize;
  const uint8_t* r = residual ? static_cast<const uint8_t*>(args.epilogue.residual) + segment.first * kSize : nullptr;
  uint8_t* y = args.y + segment.first * kSize;
  int64_t i = 0;
  for (; i + kLanes <= segment.size; i += kLanes) {
    Lanes added = Zero();
    if constexpr (residual) added = Load<type>(r + i * kSize);
    const Lanes in = Load<type>(x + i * kSize);
    const Lanes out = Normalize<type, residual, relu>(in, mean.At(i), scale.At(i), shift.At(i), added);
    StoreOrStream<type, streams>(out, y + i * kSize);
  }
  const int64_t n = segment.size - i;
  if (n == 0) return;
  Lanes added = Zero();
  if constexpr (residual) added = LoadPart<type>(r + i * kSize, n, segment.CanRead(i));
  const Lanes last = LoadPart<type>(x + i * kSize, n, segment.CanRead(i));
  Store<type>(Normalize<type, residual, relu>(last, mean.At(i, n), scale.At(i, n), shift.At(i, n), added),
              y + i * kSize, n);
}

// Taken from the stored outputs: a positive value may have been rounded to 0.
template <DataType type>
void WriteMask(const uint8_t* y, const Range& elements, uint8_t* mask) {
  constexpr int64_t kSize = Element<type>::kSize;
  int64_t i = elements.begin;
  for (; i + kLanes <= elements.end; i += kLanes) mask[i / 8] = BitsAboveZero(Load<type>(y + i * kSize));
  if (i < elements.end) mask[i / 8] = BitsAboveZero(Load<type>(y + i * kSize, elements.end - i));
}

template <DataType type, bool adjacent, bool residual, bool relu>
void ForwardLoop(const ForwardArgs& args, int64_t unit) {
  constexpr int64_t kTile = 2048;  // The mask is made while the outputs are in the first-level cache.
  const Range elements = args.plan.ElementsOf(unit);
  const bool masks = relu && args.epilogue.relu_mask != nullptr;
  const int64_t tile = masks ? kTile : elements.size();
  Segments segments(args.plan, elements.begin);
  while (segments.at() < elements.end) {
    const int64_t begin = segments.at();
    const int64_t end = std::min(begin + tile, elements.end);
    while (segments.at() < end) {
      const Segment segment = segments.Next(end);
      const uint8_t* const y = args.y + segment.first * Element<type>::kSize;
      if (kCanStream<type> && args.around_caches && BothCanStream(y, y)) {
        ForwardSegment<type, adjacent, residual, relu, kCanStream<type>>(args, segment);
      } else {
        ForwardSegment<type, adjacent, residual, relu, false>(args, segment);
      }
    }
    if (masks) WriteMask<type>(args.y, {begin, end}, args.epilogue.relu_mask);
  }
  if (kCanStream<type> && args.around_caches) hwy::FlushStream();
}

template <DataType type, bool adjacent>
void ForwardEpilogue(const ForwardArgs& args, int64_t unit) {
  const bool residual = args.epilogue.residual != nullptr;
  if (residual && args.epilogue.relu) return ForwardLoop<type, adjacent, true, true>(args, unit);
  if (residual) return ForwardLoop<type, adjacent, true, false>(args, unit);
  if (args.epilogue.relu) return ForwardLoop<type, adjacent, false, true>(args, unit);
  return ForwardLoop<type, adjacent, false, false>(args, unit);
}

template <DataType type>
void ForwardOf(const ForwardArgs& args, int64_t unit) {
  if (args.plan.repeat == 1) return ForwardEpilogue<type, true>(args, unit);
  return ForwardEpilogue<type, false>(args, unit);
}

template <DataType type, bool adjacent, Gate gate, bool streams>
class BackwardSegment {
 public:
  HWY_INLINE BackwardSegment(const BackwardArgs& args, const Segment& segment)
      : args_(args),
        segment_(segment),
        mean_(args.coefficients.mean, segment),
        scale_(args.coefficients.scale, segment),
        mean_dy_(args.coefficients.mean_dy, segment),
        projection_(args.coefficients.projection, segment),
        // Not read unless the gate needs them.
        forward_mean_(gate == Gate::kRecompute ? args.gate.forward.mean : args.coefficients.mean, segment),
        forward_scale_(gate == Gate::kRecompute ? args.gate.forward.scale : args.coefficients.mean, segment),
        forward_shift_(gate == Gate::kRecompute ? args.gate.forward.shift : args.coefficients.mean, segment) {}

  HWY_INLINE void Run() const {
    int64_t i = 0;
    for (; i + kLanes <= segment_.size; i += kLanes) Group<true>(i, kLanes);
    if (i < segment_.size) Group<false>(i, segment_.size - i);
  }

 private:
  static constexpr int64_t kSize = Element<type>::kSize;

  template <bool whole>
  static HWY_INLINE Lanes Read(const uint8_t* p, int64_t n, bool readable) {
    if constexpr (whole) {
      return Load<type>(p);
    } else {
      return LoadPart<type>(p, n, readable);
    }
  }

  template <bool whole>
  static HWY_INLINE void Write(const Lanes& v, uint8_t* p, int64_t n) {
    if constexpr (whole) {
      StoreOrStream<type, streams>(v, p);
    } else {
      Store<type>(v, p, n);
    }
  }

  template <bool whole>
  static HWY_INLINE Lanes At(const Coefficient<adjacent>& coefficient, int64_t i, int64_t n) {
    if constexpr (whole) {
      return coefficient.At(i);
    } else {
      return coefficient.At(i, n);
    }
  }

  template <bool whole>
  SYNCBN_INLINE void Group(int64_t i, int64_t n) const {
    const int64_t index = segment_.first + i;
    const int64_t offset = index * kSize;
    const Lanes x = Read<whole>(args_.x + offset, n, segment_.CanRead(i));
    Lanes dy = Read<whole>(args_.dy + offset, n, segment_.CanRead(i));
    if constexpr (gate == Gate::kRecompute) {
      const ForwardLanes forward = {At<whole>(forward_mean_, i, n), At<whole>(forward_scale_, i, n),
                                    At<whole>(forward_shift_, i, n), args_.single_gate};
      dy = PassGate<type, gate>(dy, x, forward, nullptr, index, n);
    } else if constexpr (gate == Gate::kMask) {
      dy = PassGate<type, gate>(dy, x, {x, x, x, false}, args_.gate.mask, index, n);
    }
    const Lanes mean = At<whole>(mean_, i, n), scale = At<whole>(scale_, i, n);
    const Lanes mean_dy = At<whole>(mean_dy_, i, n), projection = At<whole>(projection_, i, n);
    Lanes dx;
    if constexpr (type == DataType::kFloat32) {
      dx = MulAddExact(dy, scale, MulAddExact(x, projection, mean_dy));
    } else {
      dx = scale * (dy - mean_dy - (x - mean) * projection);
    }
    Write<whole>(dx, args_.dx + offset, n);
    if (args_.d_residual != nullptr) Write<whole>(dy, args_.d_residual + offset, n);
  }

  const BackwardArgs& args_;
  const Segment segment_;
  const Coefficient<adjacent> mean_, scale_, mean_dy_, projection_;
  const Coefficient<adjacent> forward_mean_, forward_scale_, forward_shift_;
};

template <DataType type, bool adjacent, Gate gate>
void BackwardLoop(const BackwardArgs& args, int64_t unit) {
  const Range elements = args.plan.ElementsOf(unit);
  Segments segments(args.plan, elements.begin);
  while (segments.at() < elements.end) {
    const Segment segment = segments.Next(elements.end);
    const int64_t offset = segment.first * Element<type>::kSize;
    const uint8_t* const d_residual = args.d_residual != nullptr ? args.d_residual + offset : nullptr;
    if (kCanStream<type> && args.around_caches && BothCanStream(args.dx + offset, d_residual)) {
      BackwardSegment<type, adjacent, gate, kCanStream<type>>(args, segment).Run();
    } else {
      BackwardSegment<type, adjacent, gate, false>(args, segment).Run();
    }
  }
  if (kCanStream<type> && args.around_caches) hwy::FlushStream();
}

template <DataType type, Gate gate>
void BackwardLayout(const BackwardArgs& args, int64_t unit) {
  if (args.plan.repeat == 1) return BackwardLoop<type, true, gate>(args, unit);
  return BackwardLoop<type, false, gate>(args, unit);
}

template <DataType type>
void BackwardOf(const BackwardArgs& args, int64_t unit) {
  switch (KindOf(args.gate)) {
    case Gate::kNone:
      return BackwardLayout<type, Gate::kNone>(args, unit);
    case Gate::kMask:
      return BackwardLayout<type, Gate::kMask>(args, unit);
    case Gate::kRecompute:
      return BackwardLayout<type, Gate::kRecompute>(args, unit);
  }
}

}  // namespace

void Forward(const ForwardArgs& args, int64_t unit) {
  switch (args.type) {
    case DataType::kFloat32:
      return ForwardOf<DataType::kFloat32>(args, unit);
    case DataType::kFloat64:
      return ForwardOf<DataType::kFloat64>(args, unit);
    case DataType::kFloat16:
      return ForwardOf<DataType::kFloat16>(args, unit);
    case DataType::kBFloat16:
      return ForwardOf<DataType::kBFloat16>(args, unit);
  }
}

void Backward(const BackwardArgs& args, int64_t unit) {
  switch (args.type) {
    case DataType::kFloat32:
      return BackwardOf<DataType::kFloat32>(args, unit);
    case DataType::kFloat64:
      return BackwardOf<DataType::kFloat64>(args, unit);
    case DataType::kFloat16:
      return BackwardOf<DataType::kFloat16>(args, unit);
    case DataType::kBFloat16:
      return BackwardOf<DataType::kBFloat16>(args, unit);
  }
}

const char* Target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace syncbn::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace syncbn::kernels::cpu {

HWY_EXPORT(Forward);
HWY_EXPORT(Backward);
HWY_EXPORT(Target);

void ForwardUnit(const ForwardArgs& args, int64_t unit) { HWY_DYNAMIC_DISPATCH(Forward)(args, unit); }
void BackwardUnit(const BackwardArgs& args, int64_t unit) { HWY_DYNAMIC_DISPATCH(Backward)(args, unit); }
const char* TargetName() { return HWY_DYNAMIC_DISPATCH(Target)(); }

}  // namespace syncbn::kernels::cpu

#endif  // HWY_ONCE
