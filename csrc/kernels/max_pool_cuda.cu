#include "kernels/launch.cuh"
#include "kernels/max_pool.h"

namespace convviz {

template <class T, class S>
int max_pool_channels_last_cuda(const MaxPoolArgs<T, S>& args, void* stream) {
  const Divider out_width(args.w.out), out_height(args.h.out);
  const int64_t count = args.batch * args.channels * args.h.out * args.w.out;
  // Windows of more than 127 positions are rare: one lane serves them.
  constexpr int V = sizeof(S) == 1 ? kGpuLanes<T> : 1;
  if (args.channels % V == 0 && is_aligned<V>(args.x) && is_aligned<V>(args.out) &&
      is_aligned<V>(args.switches)) {
    const Divider groups(args.channels / V);
    return launch(MaxPoolChannelsLast<T, S, V>{args, groups, out_width, out_height}, count / V, stream);
  }
  return launch(MaxPoolChannelsLast<T, S, 1>{args, Divider(args.channels), out_width, out_height}, count,
                stream);
}

// One window a thread: a warp then reads whole stretches of a row, which wider threads would read in strides.
template <class T, class S>
int max_pool_contiguous_cuda(const MaxPoolArgs<T, S>& args, void* stream) {
  const int64_t count = args.batch * args.channels * args.h.out * args.w.out;
  return launch(MaxPoolContiguous<T, S>{args, Divider(args.w.out), Divider(args.h.out)}, count, stream);
}

#define CONVVIZ_INSTANTIATE(T, S)                                                  \
  template int max_pool_channels_last_cuda<T, S>(const MaxPoolArgs<T, S>&, void*); \
  template int max_pool_contiguous_cuda<T, S>(const MaxPoolArgs<T, S>&, void*);
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
