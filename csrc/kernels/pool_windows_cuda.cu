#include "kernels/launch.cuh"
#include "kernels/pool_windows.h"

namespace convviz {

namespace {

template <class T, int V, bool AVERAGE, bool LAST>
int start(const PoolWindowsArgs<T>& args, void* stream) {
  const int64_t groups = args.channels / V;
  const PoolWindows<T, V, AVERAGE, LAST> item{args, Divider(groups), Divider(args.w.out),
                                              Divider(args.h.out)};
  return launch(item, args.count * args.h.out * args.w.out * groups, stream);
}

template <class T, bool AVERAGE>
int start(const PoolWindowsArgs<T>& args, void* stream) {
  constexpr int V = kGpuLanes<T>;
  if (args.channels % V == 0 && packs<V>(args.from.base) && packs<V>(args.from.patch) && packs<V>(args.out) &&
      (args.activation.bias == nullptr || is_aligned<V>(args.activation.bias))) {
    return start<T, V, AVERAGE, true>(args, stream);
  }
  return args.out.c == 1 ? start<T, 1, AVERAGE, true>(args, stream)
                         : start<T, 1, AVERAGE, false>(args, stream);
}

}  // namespace

template <class T>
int pool_windows_cuda(const PoolWindowsArgs<T>& args, bool average, void* stream) {
  return average ? start<T, true>(args, stream) : start<T, false>(args, stream);
}

#define CONVVIZ_INSTANTIATE(T) template int pool_windows_cuda<T>(const PoolWindowsArgs<T>&, bool, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
