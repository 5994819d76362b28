#include "kernels/launch.cuh"
#include "kernels/replace_ranked.h"

namespace convviz {

template <class B>
int replace_ranked_cuda(const ReplaceRankedArgs<B>& given, bool channels_last, void* stream) {
  constexpr int V = kGpuLanes<B>;
  ReplaceRankedArgs<B> args = given;
  if (!channels_last && args.fill_y == args.width * args.fill_x) {  // planes without rows: fewer tails
    args.width *= args.height;
    args.height = 1;
  }
  const int64_t row = channels_last ? args.width * args.channels : args.width, groups = ceil_div(row, V);
  const bool packed = row % V == 0 && is_aligned<V>(args.images) && is_aligned<V>(args.out) &&
                      (channels_last || is_aligned<V>(args.ranks));
  const int64_t items = args.count * args.height * groups;
  if (channels_last) {
    return launch(
        ReplacePixels<B, V>{args, Divider(groups), Divider(args.height), Divider(args.channels), packed},
        items, stream);
  }
  const bool fill_packed = args.fill_x == 1 && args.fill_n % V == 0 && args.fill_c % V == 0 &&
                           args.fill_y % V == 0 && is_aligned<V>(args.fills);
  return launch(ReplacePlanes<B, V>{args, Divider(groups), Divider(args.height), packed, fill_packed}, items,
                stream);
}

template int replace_ranked_cuda<uint16_t>(const ReplaceRankedArgs<uint16_t>&, bool, void*);
template int replace_ranked_cuda<uint32_t>(const ReplaceRankedArgs<uint32_t>&, bool, void*);
template int replace_ranked_cuda<uint64_t>(const ReplaceRankedArgs<uint64_t>&, bool, void*);

}  // namespace convviz
