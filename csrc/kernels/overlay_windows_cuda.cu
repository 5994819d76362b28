#include "kernels/launch.cuh"
#include "kernels/overlay_windows.h"

namespace convviz {

namespace {

template <class T, int V, bool LAST>
int elements(const OverlayArgs<T>& args, bool packed, void* stream) {
  const int64_t row = LAST ? args.width * args.channels : args.width, groups = ceil_div(row, V);
  const int64_t rows = args.count * args.height * (LAST ? 1 : args.channels);
  const OverlayElements<T, V, LAST> item{args, Divider(groups), Divider(args.channels), Divider(args.height),
                                         packed};
  return launch(item, rows * groups, stream);
}

template <class T, int V, int U>
int vectors(const OverlayArgs<T>& args, void* stream) {
  const int64_t step = args.channels / U, groups = step / V;
  const OverlayChannels<T, V, U> item{args, Divider(groups), Divider(args.width), Divider(args.height), step};
  return launch(item, args.count * args.height * args.width * groups, stream);
}

}  // namespace

template <class T>
int overlay_cuda(const OverlayArgs<T>& args, void* stream) {
  const bool channels_last = args.out.c == 1;  // the order of the threads is that of the result's memory
  constexpr int V = kGpuLanes<T>;
  if (channels_last && args.channels % V == 0 && packs<V>(args.from.base) && packs<V>(args.from.patch) &&
      packs<V>(args.out) && (args.activation.bias == nullptr || is_aligned<V>(args.activation.bias))) {
    if (args.channels % (4 * V) == 0) return vectors<T, V, 4>(args, stream);
    if (args.channels % (2 * V) == 0) return vectors<T, V, 2>(args, stream);
    return vectors<T, V, 1>(args, stream);
  }
  const MapView<T>& out = args.out;
  const bool aligned = is_aligned<V>(out.data) && out.n % V == 0 && out.h % V == 0;
  if (channels_last) {
    const bool packed = aligned && out.c == 1 && out.w == args.channels;
    return elements<T, V, true>(args, packed, stream);
  }
  return elements<T, V, false>(args, aligned && out.w == 1 && out.c % V == 0, stream);
}

#define CONVVIZ_INSTANTIATE(T) template int overlay_cuda<T>(const OverlayArgs<T>&, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
