#include "kernels/conv2d_input_grad.h"
#include "kernels/launch.cuh"

namespace convviz {

namespace {

constexpr int kPixels = 4;

template <class Item, class T>
int launch_groups(const InputGradArgs<T>& args, int group, void* stream) {
  const Item item = make_input_grad<Item>(args, group);
  return launch(item, args.batch * args.h.in * args.w.stride * item.groups.divisor, stream);
}

}  // namespace

template <class T>
int pack_weight_cuda(const PackWeight<T>& item, int64_t count, void* stream) {
  return launch(item, count, stream);
}

template <class T>
int input_grad_channels_last_cuda(const InputGradArgs<T>& args, void* stream) {
  constexpr int L = kGpuLanes<T>;
  return with_in_channels(args.in_channels, [&](auto ci) {
    constexpr int CI = decltype(ci)::value;
    if (args.channels % L == 0 && is_aligned<L>(args.grad) && is_aligned<L>(args.weight)) {
      return launch_groups<InputGradChannelsLast<T, CI, kPixels, L, 1>>(args, kPixels, stream);
    }
    return launch_groups<InputGradChannelsLast<T, CI, kPixels, 1, 1>>(args, kPixels, stream);
  });
}

// One pixel a thread: the pixels of a warp are neighbours, and so are their windows' gradients.
template <class T>
int input_grad_contiguous_cuda(const InputGradArgs<T>& args, void* stream) {
  return with_in_channels(args.in_channels, [&](auto ci) {
    return launch_groups<InputGradContiguous<T, decltype(ci)::value, 1>>(args, 1, stream);
  });
}

#define CONVVIZ_INSTANTIATE(T)                                                   \
  template int pack_weight_cuda<T>(const PackWeight<T>&, int64_t, void*);        \
  template int input_grad_channels_last_cuda<T>(const InputGradArgs<T>&, void*); \
  template int input_grad_contiguous_cuda<T>(const InputGradArgs<T>&, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
