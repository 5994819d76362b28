#include <vector>

#include "kernels/isa.h"
#include "kernels/mask_images.h"

namespace convviz {

namespace {

// What the columns of a mask read, and rows of the grid between its columns.
template <class T>
struct Scratch {
  std::vector<Sample> columns;
  std::vector<acc_t<T>>
      lines;  // two rows of the grid and one of the mask, each as long as a row of the result

  Scratch(int64_t width, int64_t length)
      : columns(static_cast<size_t>(width)), lines(static_cast<size_t>(3 * length)) {}
};

// A row of the result is one of each channel's (lanes = 1), or the pixels' with their channels (lanes =
// channels). Each row of the grid is brought to that length once: most rows of the result only blend two of
// them.
template <class T>
struct Loop {
  using A = acc_t<T>;
  MaskImagesArgs<T> args;
  int64_t lanes;
  Sample* columns;
  A* lines;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t length = args.width * lanes, streams = args.channels / lanes;
    const int64_t step = args.height * length;  // from one channel's row to the next one's
    A* const mask = lines + 2 * length;
    int64_t now = -1, held[2] = {-1, -1};
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / args.height, y = r % args.height;
      if (n != now) {
        now = n;
        held[0] = held[1] = -1;
        for (int64_t x = 0; x < args.width; ++x) columns[x] = args.column(n, x);
      }
      const Sample row = args.row(n, y);
      const A* low = lines + length * line(n, row.low, row.high, held);
      const A* high = lines + length * line(n, row.high, row.low, held);
      const A weight = static_cast<A>(row.weight);
      for (int64_t i = 0; i < length; ++i) mask[i] = blend(low[i], high[i], weight);
      const T* from = args.images + args.image_of(n) * streams * step + y * length;
      T* to = args.out + n * streams * step + y * length;
      for (int64_t s = 0; s < streams; ++s, from += step, to += step) multiply(from, mask, to, length);
    }
  }

  // Which of the two lines holds this row of the grid; not written over the row `kept`.
  CONVVIZ_HD int line(int64_t n, int64_t row, int64_t kept, int64_t (&held)[2]) const {
    for (int i = 0; i < 2; ++i) {
      if (held[i] == row) return i;
    }
    const int i = held[0] == kept ? 1 : 0;
    held[i] = row;
    const T* grid = args.grid_row(n, row);
    A* to = lines + i * args.width * lanes;
    for (int64_t x = 0; x < args.width; ++x) {
      const A value = args.across(grid, columns[x]);
      for (int64_t l = 0; l < lanes; ++l) *to++ = value;
    }
    return i;
  }

  static CONVVIZ_HD void multiply(const T* from, const A* mask, T* to, int64_t length) {
    for (int64_t i = 0; i < length; ++i) to[i] = MaskImagesArgs<T>::masked(from[i], mask[i]);
  }
};

}  // namespace

template <class T>
void mask_images_cpu(const MaskImagesArgs<T>& args, bool channels_last, int64_t begin, int64_t end) {
  const int64_t lanes = channels_last ? args.channels : 1;
  Scratch<T> scratch(args.width, args.width * lanes);
  run_widest(Loop<T>{args, lanes, scratch.columns.data(), scratch.lines.data()}, begin, end);
}

#define CONVVIZ_INSTANTIATE(T) \
  template void mask_images_cpu<T>(const MaskImagesArgs<T>&, bool, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
