#include <type_traits>
#include <vector>

#include "kernels/isa.h"
#include "kernels/lanes.h"
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

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CONVVIZ_COLOUR_BANDS 1

// Colour images in float32, which is nearly all that is masked: some rows of all masks, then the next ones.
// Each row of the image then stays in the nearest cache while the masks pass over it; the way there is the
// bottleneck.
constexpr int64_t BAND = 4, GROUP = 8;  // rows; masks at once, whose lines stay in the nearest cache too

// Vectors of W pixels.
template <int W>
struct ColourBands {
  using Vector = Lanes<W>;
  using V = typename Vector::Pack;
  using Places = decltype(V{} < V{});  // integers, as many as numbers

  MaskImagesArgs<float> args;
  bool last;     // channels_last
  float* lines;  // [GROUP, 3, width]: of each mask how far pixels are from their first column, two rows of
                 // the grid
  Run* runs;     // [GROUP, width]

  // Rows of the result between the same two rows of the grid: how far each is from the first.
  struct Rows {
    float weight[BAND];
    int64_t count;
  };

  struct Mask {
    int64_t runs, held[2];  // how many runs; which rows of the grid the lines are
  };

  // Rows n * height + y.
  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t height = args.height;
    for (int64_t from = begin; from < end;) {
      const int64_t first = from / height, to = min_of(end, (first + GROUP) * height);
      group(first, from, to);
      from = to;
    }
  }

  CONVVIZ_HD void group(int64_t first, int64_t begin, int64_t end) const {
    const int64_t height = args.height, count = (end - 1) / height - first + 1;
    Mask masks[GROUP];
    for (int64_t i = 0; i < count; ++i) masks[i] = {prepare(i, first + i), {-1, -1}};
    for (int64_t top = 0; top < height; top += BAND) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (first + i) * height;
        const int64_t low = max_of(top, begin - row), high = min_of(min_of(top + BAND, height), end - row);
        for (int64_t y = low; y < high;) y += mask_rows(i, first + i, y, high, masks[i]);
      }
    }
  }

  CONVVIZ_HD int64_t prepare(int64_t i, int64_t n) const {
    float* weight = lines + i * 3 * args.width;
    Run* run = runs + i * args.width;
    int64_t count = 0;
    for (int64_t x = 0; x < args.width; ++x) {
      const Sample column = args.column(n, x);
      if (count == 0 || column.low != run[count - 1].low) run[count++] = {x, 0, column.low, column.high};
      run[count - 1].end = x + 1;
      weight[x] = static_cast<float>(column.weight);
    }
    return count;
  }

  // Where this row of the grid is, between its columns; not written over the row `kept`.
  CONVVIZ_HD const float* line(int64_t i, int64_t n, int64_t row, int64_t kept, Mask& mask) const {
    float* const weight = lines + i * 3 * args.width;
    for (int l = 0; l < 2; ++l) {
      if (mask.held[l] == row) return weight + (1 + l) * args.width;
    }
    const int l = mask.held[0] == kept ? 1 : 0;
    mask.held[l] = row;
    float* const to = weight + (1 + l) * args.width;
    const float* grid = args.grid_row(n, row);
    const Run* run = runs + i * args.width;
    for (int64_t j = 0; j < mask.runs; ++j) {
      const float low = grid[run[j].low], high = grid[run[j].high];
      for (int64_t x = run[j].begin; x < run[j].end; ++x) to[x] = blend(low, high, weight[x]);
    }
    return to;
  }

  // As many rows from y on as lie between the same two rows of the grid; how many they are.
  CONVVIZ_HD int64_t mask_rows(int64_t i, int64_t n, int64_t y, int64_t end, Mask& mask) const {
    const Sample row = args.row(n, y);
    Rows rows{{static_cast<float>(row.weight)}, 1};
    while (rows.count < BAND && y + rows.count < end) {
      const Sample next = args.row(n, y + rows.count);
      if (next.low != row.low || next.high != row.high) break;
      rows.weight[rows.count++] = static_cast<float>(next.weight);
    }
    const float* low = line(i, n, row.low, row.high, mask);
    const float* high = line(i, n, row.high, row.low, mask);
    const int64_t plane = args.height * args.width, start = y * args.width * (last ? 3 : 1);
    const float* from = args.images + args.image_of(n) * 3 * plane + start;
    float* to = args.out + n * 3 * plane + start;
    if (last) {
      multiply<true>(from, low, high, rows, to);
    } else {
      multiply<false>(from, low, high, rows, to);
    }
    return rows.count;
  }

  template <bool LAST>
  CONVVIZ_HD void multiply(const float* from, const float* low, const float* high, const Rows& rows,
                           float* to) const {
    static_assert(BAND == 4);
    switch (rows.count) {
      case 1:
        return multiply_rows<LAST, 1>(from, low, high, rows, to);
      case 2:
        return multiply_rows<LAST, 2>(from, low, high, rows, to);
      case 3:
        return multiply_rows<LAST, 3>(from, low, high, rows, to);
      default:
        return multiply_rows<LAST, 4>(from, low, high, rows, to);
    }
  }

  template <bool LAST, int ROWS>
  CONVVIZ_HD void multiply_rows(const float* from, const float* low, const float* high, const Rows& rows,
                                float* to) const {
    const int64_t width = args.width, plane = args.height * width, whole = width / W * W;
    const int64_t step = width * (LAST ? 3 : 1);
    for (int64_t x = 0; x < whole; x += W) {
      const V begin = Vector::load(low + x), way = Vector::load(high + x) - begin;
      CONVVIZ_UNROLL
      for (int r = 0; r < ROWS; ++r) {
        const V values = begin + way * rows.weight[r];
        if (LAST) {
          pixels(from + r * step + 3 * x, values, to + r * step + 3 * x);
        } else {
          planes(from + r * step + x, values, to + r * step + x, plane);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t x = whole; x < width; ++x) {
        const float value = blend(low[x], high[x], rows.weight[r]);
        for (int64_t c = 0; c < 3; ++c) {
          const int64_t at = r * step + (LAST ? 3 * x + c : c * plane + x);
          to[at] = from[at] * value;
        }
      }
    }
  }

  // All loads before the stores: planes often are whole pages apart (224 x 224 floats are 49), where a load
  // waits for a store to the same place of another page.
  static CONVVIZ_HD void planes(const float* from, const V& values, float* to, int64_t plane) {
    const V red = Vector::load(from) * values;
    const V green = Vector::load(from + plane) * values;
    const V blue = Vector::load(from + 2 * plane) * values;
    Vector::store(to, red);
    Vector::store(to + plane, green);
    Vector::store(to + 2 * plane, blue);
  }

  static CONVVIZ_HD void pixels(const float* from, const V& values, float* to) {
    const V first = Vector::load(from) * spread<0>(values);
    const V second = Vector::load(from + W) * spread<1>(values);
    const V third = Vector::load(from + 2 * W) * spread<2>(values);
    Vector::store(to, first);
    Vector::store(to + W, second);
    Vector::store(to + 2 * W, third);
  }

  // Of each pixel's three colours the vector C of three: the pixel's number for each of them.
  template <int C>
  static CONVVIZ_HD V spread(const V& values) {
    Places places;
    CONVVIZ_UNROLL
    for (int l = 0; l < W; ++l) places[l] = (C * W + l) / 3;
    return __builtin_shuffle(values, places);
  }
};

template <int W>
void mask_colour_images(const MaskImagesArgs<float>& args, bool last, int64_t begin, int64_t end) {
  const Floats lines = floats(3 * GROUP * args.width);
  std::vector<Run> runs(static_cast<size_t>(GROUP * args.width));
  const ColourBands<W> bands{args, last, lines.get(), runs.data()};
  if (W == 16) {
    run_avx512(bands, begin, end);
  } else {
    run_avx2(bands, begin, end);
  }
}
#endif

}  // namespace

template <class T>
void mask_images_cpu(const MaskImagesArgs<T>& args, bool channels_last, int64_t begin, int64_t end) {
#if defined(CONVVIZ_COLOUR_BANDS)
  if constexpr (std::is_same_v<T, float>) {
    if (args.channels == 3 && vector_level() == 2)
      return mask_colour_images<16>(args, channels_last, begin, end);
    if (args.channels == 3 && vector_level() == 1)
      return mask_colour_images<8>(args, channels_last, begin, end);
  }
#endif
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
