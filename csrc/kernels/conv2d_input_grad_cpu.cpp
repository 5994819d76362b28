#include "kernels/conv2d_input_grad.h"
#include "kernels/isa.h"

namespace convviz {

namespace {

// Enough pixels to hide the latency of the additions, few enough for the sums to stay in registers.
constexpr int kPixels = 8;

template <class T, int CI>
struct ChannelsLastLoop {
  InputGradChannelsLast<T, CI, kPixels, kCpuLanes<T>, kCpuLanes<T>> item;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const WindowAxis& axis = item.args.w;
    for (int64_t r = begin; r < end; ++r) {
      int64_t n = r;
      const int64_t h = item.height.split(n);
      const Cover rows = cover_of(item.args.h, item.stride_h, item.back_h, h);
      for (int64_t phase = 0; phase < min_of(axis.stride, axis.in); ++phase) {
        // Pixels j = first ... last - 1 of this phase have all windows that a pixel can have.
        const int64_t count = ceil_div(axis.in - phase, axis.stride);
        const int64_t highest = item.stride_w.quotient(phase + axis.padding);
        const int64_t first = min_of(count, max_of<int64_t>(0, item.back_w - 1 - highest));
        const int64_t last = max_of(first, min_of(count, axis.out - highest));
        int64_t j = 0;
        while (j < count) {
          const int64_t w = phase + j * axis.stride;
          if (j >= first && j + kPixels <= last) {
            item.template pixels<kPixels, false>(n, rows, h, w);
            j += kPixels;
          } else {
            item.template pixels<1, true>(n, rows, h, w);
            j += 1;
          }
        }
      }
    }
  }
};

template <class T, int CI>
struct ContiguousLoop {
  static constexpr int V = 32;
  InputGradContiguous<T, CI, V> item;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const WindowAxis& axis = item.args.w;
    for (int64_t r = begin; r < end; ++r) {
      int64_t n = r;
      const int64_t h = item.height.split(n);
      const Cover rows = cover_of(item.args.h, item.stride_h, item.back_h, h);
      for (int64_t phase = 0; phase < min_of(axis.stride, axis.in); ++phase) {
        for (int64_t w = phase; w < axis.in; w += V * axis.stride) item.pixels(n, rows, h, w);
      }
    }
  }
};

// float64 is for checks: not worth three compilations.
template <class T, class Loop>
void run(const Loop& loop, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(double)) {
    loop(begin, end);
  } else {
    run_widest(loop, begin, end);
  }
}

}  // namespace

template <class T>
void pack_weight_cpu(const PackWeight<T>& item, int64_t count) {
  for (int64_t i = 0; i < count; ++i) item(i);
}

template <class T>
void input_grad_channels_last_cpu(const InputGradArgs<T>& args, int64_t begin, int64_t end) {
  with_in_channels(args.in_channels, [&](auto ci) {
    using Loop = ChannelsLastLoop<T, decltype(ci)::value>;
    run<T>(Loop{make_input_grad<decltype(Loop::item)>(args, kPixels)}, begin, end);
  });
}

template <class T>
void input_grad_contiguous_cpu(const InputGradArgs<T>& args, int64_t begin, int64_t end) {
  with_in_channels(args.in_channels, [&](auto ci) {
    using Loop = ContiguousLoop<T, decltype(ci)::value>;
    run<T>(Loop{make_input_grad<decltype(Loop::item)>(args, Loop::V)}, begin, end);
  });
}

#define CONVVIZ_INSTANTIATE(T)                                                              \
  template void pack_weight_cpu<T>(const PackWeight<T>&, int64_t);                          \
  template void input_grad_channels_last_cpu<T>(const InputGradArgs<T>&, int64_t, int64_t); \
  template void input_grad_contiguous_cpu<T>(const InputGradArgs<T>&, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
