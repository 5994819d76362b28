#include "kernels/launch.cuh"
#include "kernels/mask_images.h"

namespace convviz {

template <class T>
int mask_images_cuda(const MaskImagesArgs<T>& args, bool channels_last, void* stream) {
  constexpr int V = kGpuLanes<T>;
  const int64_t row = channels_last ? args.width * args.channels : args.width, groups = ceil_div(row, V);
  const bool packed = row % V == 0 && is_aligned<V>(args.images) && is_aligned<V>(args.out);
  const int64_t items = args.count * args.height * groups;
  if (channels_last) {
    return launch(
        MaskPixels<T, V>{args, Divider(groups), Divider(args.height), Divider(args.channels), packed}, items,
        stream);
  }
  return launch(MaskPlanes<T, V>{args, Divider(groups), Divider(args.height), packed}, items, stream);
}

#define CONVVIZ_INSTANTIATE(T) template int mask_images_cuda<T>(const MaskImagesArgs<T>&, bool, void*);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
