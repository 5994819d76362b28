#include "kernels/isa.h"
#include "kernels/max_abs_channels.h"

namespace convviz {

template <class T>
void max_abs_contiguous_cpu(const MaxAbsArgs<T>& args, int64_t begin, int64_t end) {
  using Item = MaxAbsContiguous<T, kMaxAbsBlock>;
  run_widest(EachItem<Item>{{args, Divider(ceil_div(args.pixels, kMaxAbsBlock)), true}}, begin, end);
}

template <class T>
void max_abs_channels_last_cpu(const MaxAbsArgs<T>& args, int64_t begin, int64_t end) {
  if (args.channels == 3) {
    run_widest(EachItem<MaxAbsChannelsLast<T, 3>>{{args}}, begin, end);
  } else {
    run_widest(EachItem<MaxAbsChannelsLast<T, 0>>{{args}}, begin, end);
  }
}

#define CONVVIZ_INSTANTIATE(T)                                                     \
  template void max_abs_contiguous_cpu<T>(const MaxAbsArgs<T>&, int64_t, int64_t); \
  template void max_abs_channels_last_cpu<T>(const MaxAbsArgs<T>&, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
