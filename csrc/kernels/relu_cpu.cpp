#include "kernels/isa.h"
#include "kernels/relu.h"

namespace convviz {

namespace {

constexpr int kItem = kReluBlock;

template <class T>
struct ForwardLoop {
  ReluForward<T, kItem> item;
  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) item(i);
  }
};

template <class T>
struct BackwardLoop {
  ReluBackward<T, kItem> item;
  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    StridedPosition position;
    position.set(item.args, begin * kItem);
    for (int64_t i = begin; i < end; ++i) item(i, position);
  }
};

}  // namespace

template <class T>
void relu_cpu(const ReluArgs<T>& args, int64_t begin, int64_t end) {
  run_widest(ForwardLoop<T>{{args, true}}, begin, end);
}

template <class T>
void relu_backward_cpu(const ReluBackwardArgs<T>& args, int64_t begin, int64_t end) {
  run_widest(BackwardLoop<T>{{args, true}}, begin, end);
}

#define CONVVIZ_INSTANTIATE(T)                                     \
  template void relu_cpu<T>(const ReluArgs<T>&, int64_t, int64_t); \
  template void relu_backward_cpu<T>(const ReluBackwardArgs<T>&, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
