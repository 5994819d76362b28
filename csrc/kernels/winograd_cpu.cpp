#include "kernels/isa.h"
#include "kernels/winograd.h"

namespace convviz {

template <class T>
void winograd_input_cpu(const WinogradInputArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int V = kWinogradLanes<T>;
  const Divider groups(ceil_div(args.channels, V));
  run_widest(EachItem<WinogradInput<T, V>>{{args, groups, args.channels % V == 0}}, begin, end);
}

template <class T>
void winograd_output_cpu(const WinogradOutputArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int V = kWinogradLanes<T>;
  const Divider groups(ceil_div(args.channels, V));
  run_widest(EachItem<WinogradOutput<T, V>>{{args, groups, args.channels % V == 0}}, begin, end);
}

#define CONVVIZ_INSTANTIATE(T)                                                        \
  template void winograd_input_cpu<T>(const WinogradInputArgs<T>&, int64_t, int64_t); \
  template void winograd_output_cpu<T>(const WinogradOutputArgs<T>&, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
