#include <limits>
#include <vector>

#include "kernels/isa.h"
#include "kernels/switch_unpool.h"

namespace convviz {

namespace {

// float64 is for checks, and windows of more than 127 positions are rare: they are not worth three
// compilations each.
template <class T, class S, class Loop>
void run(const Loop& loop, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(double) || sizeof(S) != 1) {
    loop(begin, end);
  } else {
    run_widest(loop, begin, end);
  }
}

// As many lanes as the vectors that GCC chooses have switches: it takes the same width for all types of a
// loop.
constexpr int kLanes = 32;

template <class T, class S, bool UNIT>
struct ChannelsLastLoop {
  UnpoolChannelsLast<T, S, 1, UNIT> item;

  template <int V>
  CONVVIZ_HD void channels(int64_t n, const Cover& h, const Cover& w, int64_t& c, T* out) const {
    for (; c + V <= item.geometry.args.channels; c += V) {
      T result[V];
      item.channels(n, h, w, c, result);
      store_pack(out + c, result);
    }
  }

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const UnpoolArgs<T, S>& args = item.geometry.args;
    for (int64_t r = begin; r < end; ++r) {
      int64_t n = r;
      const Cover h = item.geometry.rows(item.geometry.height.split(n));
      T* out = args.out + r * args.w.in * args.channels;
      for (int64_t x = 0; x < args.w.in; ++x, out += args.channels) {
        const Cover w = item.geometry.columns(x);
        int64_t c = 0;
        channels<kLanes>(n, h, w, c, out);
        channels<kLanes / 2>(n, h, w, c, out);
        channels<1>(n, h, w, c, out);
      }
    }
  }
};

// The rows of windows that the current rows of the result need, copied with a margin of windows that point
// nowhere: no lane has to ask whether its window exists.
template <class T, class S>
class PaddedRows {
 public:
  // Holds `rows` rows in turn; windows `before` the first to `after` the last one of a row may be looked at.
  PaddedRows(const UnpoolArgs<T, S>& args, int64_t rows, int64_t before, int64_t after)
      : before_(before), length_(before + args.w.out + after) {
    while (mask_ + 1 < rows) mask_ = 2 * mask_ + 1;
    held_.assign(mask_ + 1, -1);
    grad_.assign((mask_ + 1) * length_, static_cast<T>(acc_t<T>(0)));
    switches_.assign((mask_ + 1) * length_, std::numeric_limits<S>::min());
  }

  CONVVIZ_HD const T* grad_at(int64_t oh, int64_t ow) const { return grad_.data() + place(oh) + ow; }
  CONVVIZ_HD const S* switch_at(int64_t oh, int64_t ow) const { return switches_.data() + place(oh) + ow; }
  static constexpr int64_t lane = 1;

  // `row` tells rows of all planes apart.
  CONVVIZ_HD void hold(int64_t row, int64_t oh, const StridedWindows<T, S>& source, int64_t count) {
    if (held_[oh & mask_] == row) return;
    held_[oh & mask_] = row;
    T* grad = grad_.data() + place(oh);
    S* switches = switches_.data() + place(oh);
    const T* from = source.grad_at(oh, 0);
    if (source.lane == 1) {
      for (int64_t ow = 0; ow < count; ++ow) grad[ow] = from[ow];
    } else {
      for (int64_t ow = 0; ow < count; ++ow) grad[ow] = from[ow * source.lane];
    }
    std::memcpy(switches, source.switch_at(oh, 0), sizeof(S) * count);
  }

 private:
  CONVVIZ_HD int64_t place(int64_t oh) const { return (oh & mask_) * length_ + before_; }

  int64_t mask_ = 0, before_, length_;  // a power of two, less one, of rows
  std::vector<int64_t> held_;
  std::vector<T> grad_;
  std::vector<S> switches_;
};

template <class T, class S, int STEP>
struct ContiguousLoop {
  using Item = UnpoolContiguous<T, S, STEP == 0 ? 1 : kLanes, STEP, true>;
  Item item;
  PaddedRows<T, S>* rows;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const UnpoolArgs<T, S>& args = item.geometry.args;
    for (int64_t r = begin; r < end; ++r) {
      int64_t plane = r;
      const Cover h = item.geometry.rows(item.geometry.height.split(plane));
      const StridedWindows<T, S> windows = item.windows_of(plane);
      for (int64_t oh = h.first; oh <= h.last; ++oh)
        rows->hold(plane * args.h.out + oh, oh, windows, args.w.out);
      for (int64_t j = 0; j < item.groups.divisor; ++j)
        item.template group<false>(h, *rows, j, r * args.w.in);
    }
  }
};

template <class T, class S, int STEP>
void contiguous(const UnpoolArgs<T, S>& args, int64_t begin, int64_t end) {
  using Loop = ContiguousLoop<T, S, STEP>;
  const UnpoolGeometry<T, S> geometry(args);
  // The last group may pass the end of its row, its windows the last one.
  const int64_t last = (args.w.in - 1 + args.w.padding) / args.w.stride + Loop::Item::kWidth;
  PaddedRows<T, S> rows(args, geometry.back_h, geometry.back_w,
                        max_of<int64_t>(0, last - args.w.out) + kLanes);
  run<T, S>(Loop{{geometry, Divider(ceil_div(args.w.in, Loop::Item::kWidth)), true}, &rows}, begin, end);
}

}  // namespace

template <class T, class S>
void unpool_channels_last_cpu(const UnpoolArgs<T, S>& args, int64_t begin, int64_t end) {
  const UnpoolGeometry<T, S> geometry(args);
  if (args.c_stride == 1) {
    run<T, S>(ChannelsLastLoop<T, S, true>{{geometry, Divider(1), true}}, begin, end);
  } else {
    run<T, S>(ChannelsLastLoop<T, S, false>{{geometry, Divider(1), true}}, begin, end);
  }
}

template <class T, class S>
void unpool_contiguous_cpu(const UnpoolArgs<T, S>& args, int64_t begin, int64_t end) {
  switch (args.w.stride) {
    case 1:
      return contiguous<T, S, 1>(args, begin, end);
    case 2:
      return contiguous<T, S, 2>(args, begin, end);
    default:
      return contiguous<T, S, 0>(args, begin, end);
  }
}

#define CONVVIZ_INSTANTIATE(T, S)                                                          \
  template void unpool_channels_last_cpu<T, S>(const UnpoolArgs<T, S>&, int64_t, int64_t); \
  template void unpool_contiguous_cpu<T, S>(const UnpoolArgs<T, S>&, int64_t, int64_t);
#define CONVVIZ_INSTANTIATE_SWITCHES(T) \
  CONVVIZ_INSTANTIATE(T, int8_t)        \
  CONVVIZ_INSTANTIATE(T, int16_t)       \
  CONVVIZ_INSTANTIATE(T, int32_t)
CONVVIZ_INSTANTIATE_SWITCHES(double)
CONVVIZ_INSTANTIATE_SWITCHES(float)
CONVVIZ_INSTANTIATE_SWITCHES(Half)
CONVVIZ_INSTANTIATE_SWITCHES(BFloat16)
#undef CONVVIZ_INSTANTIATE_SWITCHES
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
