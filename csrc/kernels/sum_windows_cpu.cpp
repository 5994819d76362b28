#include "kernels/isa.h"
#include "kernels/sum_windows.h"

namespace convviz {

namespace {

// A block's channels of one variant. Pixels are read whole, as they lie in memory; the sums, in the nearest
// cache, are written once for each of them.
template <class T>
struct ChannelsLastLoop {
  using A = acc_t<T>;
  static constexpr int V = kCpuLanes<T>;
  SumWindowsArgs<T> args;
  Divider blocks;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    A sum[kSumBlock], total[kSumBlock];
    for (int64_t i = begin; i < end; ++i) {
      int64_t n = i;
      const int64_t c = blocks.split(n) * kSumBlock, count = min_of(kSumBlock, args.channels - c);
      const WindowSources<T>& from = args.from;
      const AxisEntry rows = from.row(n), cols = from.col(n);
      const int64_t image = from.tables.image(n);
      const int64_t left = max_of<int64_t>(cols.start, 0), right = min_of(cols.end, from.width);
      for (int64_t l = 0; l < count; ++l) total[l] = A(0);
      for (int64_t y = max_of<int64_t>(rows.start, 0); y < min_of(rows.end, from.height); ++y) {
        const auto row = from.at(n, image, rows, cols, y);
        const T* base = row.base + left * from.base.w + c;
        const T* patch = row.patch + left * from.patch.w + c;
        for (int64_t l = 0; l < count; ++l) sum[l] = A(0);
        for (int64_t x = left; x < right; ++x, base += from.base.w, patch += from.patch.w) {
          int64_t l = 0;
          for (; l + V <= count; l += V) add<V>(base + l, patch + l, c + l, sum + l);
          for (; l < count; ++l) add<1>(base + l, patch + l, c + l, sum + l);
        }
        for (int64_t l = 0; l < count; ++l) total[l] += sum[l];
      }
      A* out = args.out + n * args.channels + c;
      for (int64_t l = 0; l < count; ++l) out[l] = total[l];
    }
  }

  template <int N>
  CONVVIZ_HD void add(const T* base, const T* patch, int64_t c, A* sum) const {
    T old[N], fresh[N];
    A numbers[N];
    load_pack(base, old);
    load_pack(patch, fresh);
    args.activation.template lanes<N, true>(fresh, c, N, numbers);
    CONVVIZ_LANES
    for (int l = 0; l < N; ++l) sum[l] += numbers[l] - to_acc(old[l]);
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
