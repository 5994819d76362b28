#include <vector>

#include "kernels/isa.h"
#include "kernels/replace_ranked.h"

namespace convviz {

namespace {

// A row of the result is one of each channel's (lanes = 1), or the pixels' with their channels (lanes =
// channels). Which elements show the fill is written down once a row, as ones and zeros in all bits: the
// choice is then three bit operations, whatever the dtype.
template <class B>
struct Loop {
  ReplaceRankedArgs<B> args;
  int64_t lanes;
  B *pixels, *elements, *shown;  // scratch: width, and twice width * lanes

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t length = args.width * lanes, streams = args.channels / lanes;
    const int64_t step = args.height * length;  // from one channel's row to the next one's
    const bool direct = (args.fill_x == lanes) && (lanes == 1 || args.fill_c == 1);
    const B* held = nullptr;  // the fill's row that `shown` holds
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / args.height, y = r % args.height, image = args.image_of(n);
      const RankRange range = args.range_of(n);
      const int32_t* rank = args.ranks + (image * args.height + y) * args.width;
      for (int64_t x = 0; x < args.width; ++x) {
        pixels[x] = static_cast<B>(-static_cast<B>((rank[x] >= range.first) & (rank[x] <= range.last)));
      }
      const B* const mask = spread();
      const B* from = args.images + image * streams * step + y * length;
      B* to = args.out + n * streams * step + y * length;
      for (int64_t s = 0; s < streams; ++s, from += step, to += step) {
        const B* fill = args.fill_at(image, s, y, 0);
        if (!direct) {
          if (fill != held) gather(fill);
          held = fill;
          fill = shown;
        }
        choose(from, fill, mask, to, length);
      }
    }
  }

  // The pixels' mask for each of their elements.
  CONVVIZ_HD const B* spread() const {
    if (lanes == 1) return pixels;
    if (lanes == 3) {  // colour images: a loop that the compiler can make vectors of
      for (int64_t x = 0; x < args.width; ++x) {
        elements[3 * x] = elements[3 * x + 1] = elements[3 * x + 2] = pixels[x];
      }
      return elements;
    }
    B* to = elements;
    for (int64_t x = 0; x < args.width; ++x) {
      for (int64_t l = 0; l < lanes; ++l) *to++ = pixels[x];
    }
    return elements;
  }

  // A row of a fill that does not lie in memory as the images' rows do.
  CONVVIZ_HD void gather(const B* fill) const {
    B* to = shown;
    for (int64_t x = 0; x < args.width; ++x) {
      for (int64_t l = 0; l < lanes; ++l) *to++ = fill[x * args.fill_x + l * args.fill_c];
    }
  }

  static CONVVIZ_HD void choose(const B* from, const B* fill, const B* mask, B* to, int64_t length) {
    for (int64_t i = 0; i < length; ++i) to[i] = static_cast<B>((from[i] & ~mask[i]) | (fill[i] & mask[i]));
  }
};

}  // namespace

template <class B>
void replace_ranked_cpu(const ReplaceRankedArgs<B>& args, bool channels_last, int64_t begin, int64_t end) {
  const int64_t lanes = channels_last ? args.channels : 1, length = args.width * lanes;
  std::vector<B> scratch(static_cast<size_t>(args.width + 2 * length));
  B* const pixels = scratch.data();
  run_widest(Loop<B>{args, lanes, pixels, pixels + args.width, pixels + args.width + length}, begin, end);
}

template void replace_ranked_cpu<uint16_t>(const ReplaceRankedArgs<uint16_t>&, bool, int64_t, int64_t);
template void replace_ranked_cpu<uint32_t>(const ReplaceRankedArgs<uint32_t>&, bool, int64_t, int64_t);
template void replace_ranked_cpu<uint64_t>(const ReplaceRankedArgs<uint64_t>&, bool, int64_t, int64_t);

}  // namespace convviz
