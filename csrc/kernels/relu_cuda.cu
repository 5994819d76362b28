#include "kernels/launch.cuh"
#include "kernels/relu.h"

namespace convviz {

template <class T>
int relu_cuda(const ReluArgs<T>& args, void* stream) {
  const bool aligned = is_aligned<8>(args.x) && is_aligned<8>(args.out);
  return launch(ReluForward<T, 8>{args, aligned}, ceil_div(args.numel, 8), stream);
}

template <class T>
int relu_backward_cuda(const ReluBackwardArgs<T>& args, void* stream) {
  const bool aligned = is_aligned<8>(args.grad) && is_aligned<8>(args.out);
  return launch(ReluBackward<T, 8>{args, aligned}, ceil_div(args.numel, 8), stream);
}

#define CONVVIZ_INSTANTIATE(T)                          \
  template int relu_cuda<T>(const ReluArgs<T>&, void*); \
  template int relu_backward_cuda<T>(const ReluBackwardArgs<T>&, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
