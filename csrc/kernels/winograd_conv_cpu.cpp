#include <cstring>

#include "kernels/isa.h"
#include "kernels/lanes.h"
#include "kernels/winograd_conv.h"

namespace convviz {

namespace {

constexpr int64_t TOGETHER = 48;            // tiles for which a block of the weight is read from memory once
constexpr int64_t MOST = int64_t{1} << 19;  // floats of their transformed input, of all channels

// Vectors of W floats; R tiles times two vectors of results are added up in registers.
template <int W, int R>
struct Convolve {
  using Vector = Lanes<W>;
  using V = typename Vector::Pack;
  static constexpr int64_t B = kResultBlock;
  static_assert(TOGETHER % R == 0 && B % (2 * W) == 0);

  WinogradConvArgs args;
  int64_t together;  // tiles, a multiple of R
  float* tiles;      // [16, together, C]
  float* products;   // [16, R, 32]

  struct Place {
    int64_t n, top, left;  // of the tile's results
  };
  CONVVIZ_HD Place place(int64_t tile) const {
    const int64_t cols = (args.out_width + 1) / 2, rows = (args.out_height + 1) / 2;
    const int64_t col = tile % cols, rest = tile / cols;
    return {rest / rows, rest % rows * 2, col * 2};
  }

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t C = args.channels;
    for (int64_t first = begin; first < end; first += together) {
      const int64_t count = min_of(together, end - first);
      for (int64_t t = 0; t < count; ++t) transform(place(first + t), tiles + t * C);
      for (int64_t t = count; t % R; ++t) {
        for (int64_t p = 0; p < 16; ++p) {
          std::memset(tiles + (p * together + t) * C, 0, static_cast<size_t>(C) * sizeof(float));
        }
      }
      for (int64_t k = 0; k < args.results; k += B) {
        const float* weight = args.weight + k * 16 * C;
        for (int64_t t = 0; t < count; t += R) {
          for (int64_t p = 0; p < 16; ++p) {
            for (int64_t column = 0; column < B; column += 2 * W) {
              multiply(tiles + (p * together + t) * C, weight + p * C * B + column,
                       products + p * R * B + column);
            }
          }
          for (int64_t r = 0; r < min_of<int64_t>(R, count - t); ++r) finish(place(first + t + r), r, k);
        }
      }
    }
  }

  CONVVIZ_HD void transform(const Place& at, float* to) const {
    const int64_t C = args.channels, top = at.top - args.pad_h, left = at.left - args.pad_w;
    const float* image = args.x + at.n * args.height * args.width * C;
    const bool inside = top >= 0 && left >= 0 && top + 4 <= args.height && left + 4 <= args.width;
    int64_t c = 0;
    if (inside) {
      for (; c + W <= C; c += W) transform<W, true>(image + c, top, left, to + c);
    } else {
      for (; c + W <= C; c += W) transform<W, false>(image + c, top, left, to + c);
    }
    for (; c < C; ++c) transform<1, false>(image + c, top, left, to + c);
  }

  template <int N, bool INSIDE>
  CONVVIZ_HD void transform(const float* image, int64_t top, int64_t left, float* to) const {
    using L = Lanes<N>;
    using T = typename L::Pack;
    const int64_t C = args.channels, step = together * C;
    T rows[4][4];
    CONVVIZ_UNROLL
    for (int y = 0; y < 4; ++y) {
      const float* from = image + ((top + y) * args.width + left) * C;
      const bool row = top + y >= 0 && top + y < args.height;
      T in[4];
      CONVVIZ_UNROLL
      for (int x = 0; x < 4; ++x) {
        in[x] = INSIDE || (row && left + x >= 0 && left + x < args.width) ? L::load(from + x * C) : T{};
      }
      rows[y][0] = in[0] - in[2];
      rows[y][1] = in[1] + in[2];
      rows[y][2] = in[2] - in[1];
      rows[y][3] = in[1] - in[3];
    }
    CONVVIZ_UNROLL
    for (int x = 0; x < 4; ++x) {
      L::store(to + (0 + x) * step, rows[0][x] - rows[2][x]);
      L::store(to + (4 + x) * step, rows[1][x] + rows[2][x]);
      L::store(to + (8 + x) * step, rows[2][x] - rows[1][x]);
      L::store(to + (12 + x) * step, rows[1][x] - rows[3][x]);
    }
  }

  // R rows of C numbers times a matrix of 2 * W columns.
  CONVVIZ_HD void multiply(const float* rows, const float* matrix, float* to) const {
    const int64_t C = args.channels;
    V sums[R][2] = {};
    for (int64_t c = 0; c < C; ++c, matrix += B) {
      const V left = Vector::load(matrix), right = Vector::load(matrix + W);
      CONVVIZ_ROWS
      for (int r = 0; r < R; ++r) {
        const float value = rows[r * C + c];
        sums[r][0] += value * left;
        sums[r][1] += value * right;
      }
    }
    CONVVIZ_ROWS
    for (int r = 0; r < R; ++r) {
      Vector::store(to + r * B, sums[r][0]);
      Vector::store(to + r * B + W, sums[r][1]);
    }
  }

  // Results k to k + 31 of a tile, the one in row r of the products.
  CONVVIZ_HD void finish(const Place& at, int64_t r, int64_t k) const {
    const int64_t count = min_of(B, args.results - k);
    int64_t i = 0;
    for (; i + W <= count; i += W) finish<W>(at, products + r * B + i, k + i);
    for (; i < count; ++i) finish<1>(at, products + r * B + i, k + i);
  }

  template <int N>
  CONVVIZ_HD void finish(const Place& at, const float* from, int64_t k) const {
    using L = Lanes<N>;
    using T = typename L::Pack;
    T rows[4][2];
    CONVVIZ_UNROLL
    for (int y = 0; y < 4; ++y) {
      T in[4];
      CONVVIZ_UNROLL
      for (int x = 0; x < 4; ++x) in[x] = L::load(from + (y * 4 + x) * R * B);
      rows[y][0] = in[0] + in[1] + in[2];
      rows[y][1] = in[1] - in[2] - in[3];
    }
    const T bias = args.bias == nullptr ? T{} : L::load(args.bias + k);
    const T low = T{} + args.low, high = T{} + args.high;
    CONVVIZ_UNROLL
    for (int y = 0; y < 2; ++y) {
      if (at.top + y >= args.out_height) break;
      float* to =
          args.out + ((at.n * args.out_height + at.top + y) * args.out_width + at.left) * args.step + k;
      CONVVIZ_UNROLL
      for (int x = 0; x < 2; ++x) {
        if (at.left + x >= args.out_width) break;
        T value = y == 0 ? rows[0][x] + rows[1][x] + rows[2][x] : rows[1][x] - rows[2][x] - rows[3][x];
        value += bias;
        L::store(to + x * args.step, clamped_lanes(value, low, high));
      }
    }
  }
};

// The loop, and what it works in.
template <int W, int R>
struct Prepared {
  Floats tiles, products;
  Convolve<W, R> loop;

  Prepared(const WinogradConvArgs& args, int64_t count) : loop{args, R, nullptr, nullptr} {
    const int64_t most = min_of(TOGETHER, MOST / (16 * max_of<int64_t>(1, args.channels)));
    loop.together = max_of<int64_t>(R, min_of(most / R * R, ceil_div(count, R) * R));
    tiles = floats(16 * loop.together * args.channels);
    products = floats(16 * R * kResultBlock);
    loop.tiles = tiles.get();
    loop.products = products.get();
  }
};

constexpr int64_t CHANNELS =
    8;  // packed together, so that memory is read and written in pieces of some lines

// The filters of 32 results for eight channels, in float64: they are rounded once.
struct Filters {
  WinogradPackArgs args;

  CONVVIZ_HD void operator()(int64_t i) const {
    constexpr int64_t B = kResultBlock, MOST = CHANNELS * B;
    const int64_t groups = ceil_div(args.channels, CHANNELS), block = i / groups,
                  first = i % groups * CHANNELS;
    const int64_t results = min_of(B, args.results - block * B),
                  channels = min_of(CHANNELS, args.channels - first);
    const float* from = args.weight + block * B * args.result_stride + first * args.channel_stride;
    double filter[9][MOST] = {}, half[4][3][MOST];
    for (int64_t l = 0; l < results; ++l) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t y = 0; y < 3; ++y) {
          for (int64_t x = 0; x < 3; ++x) {
            const int64_t place = args.flipped ? 8 - 3 * y - x : 3 * y + x;
            filter[place][c * B + l] = from[l * args.result_stride + c * args.channel_stride +
                                            y * args.row_stride + x * args.col_stride];
          }
        }
      }
    }
    const int64_t count = channels * B, step = args.channels * B;
    for (int x = 0; x < 3; ++x) {
      along(filter[x], filter[3 + x], filter[6 + x], half[0][x], half[1][x], half[2][x], half[3][x], count);
    }
    float* to = args.out + (block * 16 * args.channels + first) * B;
    for (int y = 0; y < 4; ++y, to += 4 * step) {
      along(half[y][0], half[y][1], half[y][2], to, to + step, to + 2 * step, to + 3 * step, count);
    }
  }

  template <class T>
  static CONVVIZ_HD void along(const double* a, const double* b, const double* c, T* first, T* sum,
                               T* difference, T* last, int64_t count) {
    for (int64_t i = 0; i < count; ++i) first[i] = static_cast<T>(a[i]);
    for (int64_t i = 0; i < count; ++i) sum[i] = static_cast<T>(0.5 * (a[i] + c[i] + b[i]));
    for (int64_t i = 0; i < count; ++i) difference[i] = static_cast<T>(0.5 * (a[i] + c[i] - b[i]));
    for (int64_t i = 0; i < count; ++i) last[i] = static_cast<T>(c[i]);
  }
};

}  // namespace

int64_t winograd_pack_items(const WinogradPackArgs& args) {
  return ceil_div(args.results, kResultBlock) * ceil_div(args.channels, CHANNELS);
}

void winograd_pack_cpu(const WinogradPackArgs& args, int64_t begin, int64_t end) {
  run_widest(EachItem<Filters>{{args}}, begin, end);
}

void winograd_conv_cpu(const WinogradConvArgs& args, int64_t begin, int64_t end) {
#if defined(__x86_64__) && defined(__GNUC__)
  // Sums for the registers that there are: 32 of 16 floats, 16 of 8.
  if (vector_level() == 2) return run_avx512(Prepared<16, 12>(args, end - begin).loop, begin, end);
  if (vector_level() == 1) return run_avx2(Prepared<8, 6>(args, end - begin).loop, begin, end);
#endif
  Prepared<4, 6>(args, end - begin).loop(begin, end);
}

}  // namespace convviz
