#include "kernels/isa.h"
#include "kernels/sum_windows.h"

namespace convviz {

namespace {

template <class T>
struct ChannelsLastLoop {
  SumWindowsArgs<T> args;
  Divider blocks;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    constexpr int V = static_cast<int>(kSumBlock);
    for (int64_t i = begin; i < end; ++i) {
      int64_t n = i;
      const int64_t c = blocks.split(n) * V;
      if (c + V <= args.channels) {
        sum_window<T, V, true, true>(args, n, c, V);
      } else {
        sum_window<T, V, true, false>(args, n, c, static_cast<int>(args.channels - c));
      }
    }
  }
};

}  // namespace

template <class T>
void sum_windows_channels_last_cpu(const SumWindowsArgs<T>& args, int64_t begin, int64_t end) {
  run_widest(ChannelsLastLoop<T>{args, Divider(ceil_div(args.channels, kSumBlock))}, begin, end);
}

template <class T>
void sum_windows_planes_cpu(const SumWindowsArgs<T>& args, int64_t begin, int64_t end) {
  const SumWindows<T> item{args, Divider(args.channels)};
  for (int64_t i = begin; i < end; ++i) item(i);
}

#define CONVVIZ_INSTANTIATE(T)                                                                \
  template void sum_windows_channels_last_cpu<T>(const SumWindowsArgs<T>&, int64_t, int64_t); \
  template void sum_windows_planes_cpu<T>(const SumWindowsArgs<T>&, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
