#include "kernels/launch.cuh"
#include "kernels/switch_unpool.h"

namespace convviz {

namespace {

template <class T, class S, int V, bool UNIT>
int channels_last(const UnpoolArgs<T, S>& args, bool packed, void* stream) {
  const int64_t count = args.batch * args.channels * args.h.in * args.w.in;
  return launch(
      UnpoolChannelsLast<T, S, V, UNIT>{UnpoolGeometry<T, S>(args), Divider(args.channels / V), packed},
      count / V, stream);
}

template <class T, class S, int V, int STEP>
int contiguous(const UnpoolArgs<T, S>& args, void* stream) {
  using Item = UnpoolContiguous<T, S, V, STEP>;
  const int64_t groups = ceil_div(args.w.in, Item::kWidth);
  const bool packed = args.w.in % Item::kWidth == 0 && is_aligned<Item::kWidth>(args.out);
  return launch(Item{UnpoolGeometry<T, S>(args), Divider(groups), packed},
                args.batch * args.channels * args.h.in * groups, stream);
}

}  // namespace

// Windows of more than 127 positions are rare: one lane serves them.
template <class T, class S>
constexpr int kLanes = sizeof(S) == 1 ? kGpuLanes<T> : 1;

template <class T, class S>
int unpool_channels_last_cuda(const UnpoolArgs<T, S>& args, void* stream) {
  constexpr int V = kLanes<T, S>;
  if (args.channels % V == 0 && is_aligned<V>(args.out) && is_aligned<V>(args.switches)) {
    const bool unit = args.c_stride == 1 && is_aligned<V>(args.grad) && args.n_stride % V == 0 &&
                      args.h_stride % V == 0 && args.w_stride % V == 0;
    if (unit) return channels_last<T, S, V, true>(args, true, stream);
    return channels_last<T, S, V, false>(args, true, stream);
  }
  return channels_last<T, S, 1, false>(args, false, stream);
}

template <class T, class S>
int unpool_contiguous_cuda(const UnpoolArgs<T, S>& args, void* stream) {
  if constexpr (sizeof(S) == 1) {
    if (args.w.stride == 1) return contiguous<T, S, kGpuLanes<T>, 1>(args, stream);
    if (args.w.stride == 2) return contiguous<T, S, kGpuLanes<T> / 2, 2>(args, stream);
  }
  return contiguous<T, S, 1, 0>(args, stream);
}

#define CONVVIZ_INSTANTIATE(T, S)                                               \
  template int unpool_channels_last_cuda<T, S>(const UnpoolArgs<T, S>&, void*); \
  template int unpool_contiguous_cuda<T, S>(const UnpoolArgs<T, S>&, void*);
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
