#include <vector>

#include "kernels/isa.h"
#include "kernels/mask_images.h"

#if defined(__GNUC__) && !defined(__clang__)
#define CONVVIZ_APART _Pragma("GCC ivdep")
#else
#define CONVVIZ_APART
#endif

namespace convviz {

namespace {

// Elements begin <= i < end of a row of the result, which lie between the same two columns of the grid.
struct Run {
  int64_t begin, end, low, high;
};

template <class T>
struct Scratch {
  std::vector<Run> runs;  // of a mask's columns
  // Each as long as a row of the result: how far each element is from its first column, two rows of the grid
  // between its columns, and a row of the mask.
  std::vector<acc_t<T>> lines;

  Scratch(int64_t width, int64_t length)
      : runs(static_cast<size_t>(width)), lines(static_cast<size_t>(4 * length)) {}
};

// A row of the result is one of each channel's (lanes = 1), or the pixels' with their channels (lanes =
// channels). Each row of the grid is brought to that length once: most rows of the result only blend two of
// them.
template <class T>
struct Loop {
  using A = acc_t<T>;
  MaskImagesArgs<T> args;
  int64_t lanes;
  Run* runs;
  A* lines;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t length = args.width * lanes, streams = args.channels / lanes;
    const int64_t step = args.height * length;  // from one channel's row to the next one's
    A* const mask = lines + 3 * length;
    int64_t now = -1, prepared = -1, count = 0, held[2] = {-1, -1};
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / args.height, y = r % args.height;
      if (n != now) {
        if (prepared < 0 || args.offsets[2 * n + 1] != args.offsets[2 * prepared + 1]) {
          count = prepare(n);
          prepared = n;
        }
        now = n;
        held[0] = held[1] = -1;
      }
      const Sample row = args.row(n, y);
      const A* low = lines + length * (1 + line(n, row.low, row.high, count, held));
      const A* high = lines + length * (1 + line(n, row.high, row.low, count, held));
      const A weight = static_cast<A>(row.weight);
      const T* from = args.images + args.image_of(n) * streams * step + y * length;
      T* to = args.out + n * streams * step + y * length;
      if (streams == 1) {
        blend_and_multiply<1>(from, low, high, weight, to, length, step);
      } else if (streams == 3) {
        blend_and_multiply<3>(from, low, high, weight, to, length, step);
      } else {
        for (int64_t i = 0; i < length; ++i) mask[i] = blend(low[i], high[i], weight);
        for (int64_t s = 0; s < streams; ++s, from += step, to += step) multiply(from, mask, to, length);
      }
    }
  }

  // The columns of mask n: their weights, and how many runs they are.
  CONVVIZ_HD int64_t prepare(int64_t n) const {
    int64_t count = 0;
    A* weight = lines;
    for (int64_t x = 0; x < args.width; ++x) {
      const Sample column = args.column(n, x);
      if (count == 0 || column.low != runs[count - 1].low) {
        runs[count++] = {x * lanes, 0, column.low, column.high};
      }
      runs[count - 1].end = (x + 1) * lanes;
      for (int64_t l = 0; l < lanes; ++l) *weight++ = static_cast<A>(column.weight);
    }
    return count;
  }

  // Which of the two lines holds this row of the grid; not written over the row `kept`.
  CONVVIZ_HD int line(int64_t n, int64_t row, int64_t kept, int64_t count, int64_t (&held)[2]) const {
    for (int i = 0; i < 2; ++i) {
      if (held[i] == row) return i;
    }
    const int i = held[0] == kept ? 1 : 0;
    held[i] = row;
    const T* grid = args.grid_row(n, row);
    A* to = lines + (1 + i) * args.width * lanes;
    for (int64_t j = 0; j < count; ++j) {
      const Run run = runs[j];
      spread(to_acc(grid[run.low]), to_acc(grid[run.high]), lines + run.begin, to + run.begin,
             run.end - run.begin);
    }
    return i;
  }

  static CONVVIZ_HD void spread(A low, A high, const A* weight, A* to, int64_t length) {
    for (int64_t i = 0; i < length; ++i) to[i] = blend(low, high, weight[i]);
  }
  static CONVVIZ_HD void multiply(const T* from, const A* mask, T* to, int64_t length) {
    for (int64_t i = 0; i < length; ++i) to[i] = MaskImagesArgs<T>::masked(from[i], mask[i]);
  }
  // Of so many channels' rows, `step` apart; the result shares no memory with what is read.
  template <int STREAMS>
  static CONVVIZ_HD void blend_and_multiply(const T* from, const A* low, const A* high, A weight, T* to,
                                            int64_t length, int64_t step) {
    CONVVIZ_APART
    for (int64_t i = 0; i < length; ++i) {
      const A mask = blend(low[i], high[i], weight);
      CONVVIZ_UNROLL
      for (int s = 0; s < STREAMS; ++s) {
        to[s * step + i] = MaskImagesArgs<T>::masked(from[s * step + i], mask);
      }
    }
  }
};

}  // namespace

template <class T>
void mask_images_cpu(const MaskImagesArgs<T>& args, bool channels_last, int64_t begin, int64_t end) {
  const int64_t lanes = channels_last ? args.channels : 1;
  Scratch<T> scratch(args.width, args.width * lanes);
  run_widest(Loop<T>{args, lanes, scratch.runs.data(), scratch.lines.data()}, begin, end);
}

#define CONVVIZ_INSTANTIATE(T) \
  template void mask_images_cpu<T>(const MaskImagesArgs<T>&, bool, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
