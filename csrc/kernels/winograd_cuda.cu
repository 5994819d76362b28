#include "kernels/launch.cuh"
#include "kernels/winograd.h"

namespace convviz {

template <class T>
int winograd_input_cuda(const WinogradInputArgs<T>& args, void* stream) {
  constexpr int V = kGpuLanes<T>;
  const int64_t groups = ceil_div(args.channels, V);
  const bool packed = args.channels % V == 0 && is_aligned<V>(args.x) && is_aligned<V>(args.out);
  return launch(WinogradInput<T, V>{args, Divider(groups), packed}, args.tiles * groups, stream);
}

template <class T>
int winograd_output_cuda(const WinogradOutputArgs<T>& args, void* stream) {
  constexpr int V = kGpuLanes<T>;
  const int64_t groups = ceil_div(args.channels, V);
  const bool packed = args.channels % V == 0 && is_aligned<V>(args.products) && is_aligned<V>(args.out);
  return launch(WinogradOutput<T, V>{args, Divider(groups), packed}, args.tiles * groups, stream);
}

#define CONVVIZ_INSTANTIATE(T)                                             \
  template int winograd_input_cuda<T>(const WinogradInputArgs<T>&, void*); \
  template int winograd_output_cuda<T>(const WinogradOutputArgs<T>&, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
