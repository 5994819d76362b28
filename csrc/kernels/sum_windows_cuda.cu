#include "kernels/launch.cuh"
#include "kernels/sum_windows.h"

namespace convviz {

template <class T>
int sum_windows_cuda(const SumWindowsArgs<T>& args, void* stream) {
  return launch(SumWindows<T>{args, Divider(args.channels)}, args.count * args.channels, stream);
}

#define CONVVIZ_INSTANTIATE(T) template int sum_windows_cuda<T>(const SumWindowsArgs<T>&, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
