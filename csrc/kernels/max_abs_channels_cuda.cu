#include "kernels/launch.cuh"
#include "kernels/max_abs_channels.h"

namespace convviz {

template <class T>
int max_abs_contiguous_cuda(const MaxAbsArgs<T>& args, void* stream) {
  constexpr int V = kGpuLanes<T>;
  const int64_t groups = ceil_div(args.pixels, V);
  const bool packed = args.pixels % V == 0 && is_aligned<V>(args.x) && is_aligned<V>(args.out);
  return launch(MaxAbsContiguous<T, V>{args, Divider(groups), packed}, args.batch * groups, stream);
}

template <class T>
int max_abs_channels_last_cuda(const MaxAbsArgs<T>& args, void* stream) {
  const int64_t count = args.batch * args.pixels;
  if (args.channels == 3) return launch(MaxAbsChannelsLast<T, 3>{args}, count, stream);
  return launch(MaxAbsChannelsLast<T, 0>{args}, count, stream);
}

#define CONVVIZ_INSTANTIATE(T)                                          \
  template int max_abs_contiguous_cuda<T>(const MaxAbsArgs<T>&, void*); \
  template int max_abs_channels_last_cuda<T>(const MaxAbsArgs<T>&, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
