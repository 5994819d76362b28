#include "kernels/launch.cuh"
#include "kernels/window_mean.h"

namespace convviz {

template <class T>
int window_mean_cuda(const WindowMeanArgs<T>& args, void* stream) {
  return launch(WindowMean<T>{args, Divider(args.w.size), Divider(args.h.size)},
                args.maps * args.h.size * args.w.size, stream);
}

#define CONVVIZ_INSTANTIATE(T) template int window_mean_cuda<T>(const WindowMeanArgs<T>&, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
