#include "kernels/isa.h"
#include "kernels/max_pool.h"

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

template <class T, class S>
struct ChannelsLastLoop {
  static constexpr int V = kCpuLanes<T>;
  MaxPoolChannelsLast<T, S, V> item;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const MaxPoolArgs<T, S>& args = item.args;
    for (int64_t r = begin; r < end; ++r) {
      int64_t n = r;
      const Taps h = taps_of(args.h, item.out_height.split(n));
      for (int64_t ow = 0; ow < args.w.out; ++ow) {
        const Taps w = taps_of(args.w, ow);
        const int64_t at = (r * args.w.out + ow) * args.channels;
        int64_t c = 0;
        for (; c + V <= args.channels; c += V) item.template channels<true>(n, h, w, c, V, at + c);
        if (c < args.channels) {
          item.template channels<false>(n, h, w, c, static_cast<int>(args.channels - c), at + c);
        }
      }
    }
  }
};

template <class T, class S, int LANE>
struct ContiguousLoop {
  static constexpr int V = kCpuLanes<T>;
  MaxPoolContiguous<T, S> item;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const WindowAxis& axis = item.args.w;
    // The windows of a row that lie inside the input with all their taps can be taken V at a time.
    const int64_t span = (axis.kernel - 1) * axis.dilation;
    const int64_t inner_begin = min_of(axis.out, ceil_div(axis.padding, axis.stride));
    const int64_t room = axis.in - 1 - span + axis.padding;
    const int64_t inner_end = max_of(inner_begin, room < 0 ? 0 : min_of(axis.out, room / axis.stride + 1));
    for (int64_t r = begin; r < end; ++r) {
      int64_t plane = r;
      const Taps h = taps_of(item.args.h, item.out_height.split(plane));
      for (int64_t ow = 0; ow < axis.out;) {
        const Taps w = taps_of(axis, ow);
        const int64_t at = r * axis.out + ow, left = inner_end - ow;
        if (ow < inner_begin || left <= 0) {
          item.template windows<1, 1, true>(plane, h, w, 1, at);
          ow += 1;
        } else if (left >= V) {
          item.template windows<V, LANE, true>(plane, h, w, V, at);
          ow += V;
        } else {
          item.template windows<V, LANE, false>(plane, h, w, static_cast<int>(left), at);
          ow += left;
        }
      }
    }
  }
};

}  // namespace

template <class T, class S>
void max_pool_channels_last_cpu(const MaxPoolArgs<T, S>& args, int64_t begin, int64_t end) {
  run<T, S>(ChannelsLastLoop<T, S>{{args, Divider(1), Divider(args.w.out), Divider(args.h.out)}}, begin, end);
}

template <class T, class S>
void max_pool_contiguous_cpu(const MaxPoolArgs<T, S>& args, int64_t begin, int64_t end) {
  const MaxPoolContiguous<T, S> item{args, Divider(args.w.out), Divider(args.h.out)};
  switch (args.w.stride) {
    case 1:
      return run<T, S>(ContiguousLoop<T, S, 1>{item}, begin, end);
    case 2:
      return run<T, S>(ContiguousLoop<T, S, 2>{item}, begin, end);
    default:
      return run<T, S>(ContiguousLoop<T, S, 0>{item}, begin, end);
  }
}

#define CONVVIZ_INSTANTIATE(T, S)                                                             \
  template void max_pool_channels_last_cpu<T, S>(const MaxPoolArgs<T, S>&, int64_t, int64_t); \
  template void max_pool_contiguous_cpu<T, S>(const MaxPoolArgs<T, S>&, int64_t, int64_t);
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
