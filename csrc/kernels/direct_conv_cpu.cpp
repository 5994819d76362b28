#include "kernels/direct_conv.h"

#include "kernels/isa.h"

namespace convviz {

namespace {

constexpr int64_t TOGETHER =
    48;  // pixels, at least, for which a block of the weight is read from memory once

// The result's pixels in lines, along which the input's pixels are equally far apart: its rows, or all of it.
struct Lines {
  int64_t length, segments;  // of a line: pixels; parts, of about TOGETHER pixels

  Lines(const DirectConvArgs& args, int64_t images) : length(args.out_width) {
    const bool one = args.kernel_h * args.kernel_w * args.stride_h * args.stride_w == 1;
    if (one) length *= args.out_height * images;
    segments = ceil_div(length, TOGETHER);
  }
};

// Vectors of W floats; up to R pixels times two vectors of results are added up in registers.
template <int W, int R>
struct DirectConvolve {
  using Vector = Lanes<W>;
  using V = typename Vector::Pack;
  static constexpr int64_t B = kResultBlock;
  static_assert(R <= 12 && B % (2 * W) == 0);

  DirectConvArgs args;
  Lines lines;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t each = max_of<int64_t>(1, TOGETHER / lines.length);  // segments of short lines go together
    for (int64_t first = begin; first < end; first += each) {
      for (int64_t k = 0; k < args.results; k += B) {
        float bias[B] = {};
        const int64_t count = min_of(B, args.results - k);
        for (int64_t i = 0; args.bias != nullptr && i < count; ++i) bias[i] = args.bias[k + i];
        for (int64_t s = first; s < min_of(first + each, end); ++s) segment(s, k, count, bias);
      }
    }
  }

  CONVVIZ_HD void segment(int64_t s, int64_t k, int64_t count, const float* bias) const {
    const int64_t line = s / lines.segments, part = s % lines.segments;
    const int64_t from = lines.length * part / lines.segments,
                  pixels = lines.length * (part + 1) / lines.segments - from;
    const int64_t n = line / args.out_height, y = line % args.out_height, C = args.channels;
    const float* x = args.x + ((n * args.height + y * args.stride_h) * args.width + from * args.stride_w) * C;
    const float* weight = args.weight + k * args.kernel_h * args.kernel_w * C;
    float* out = args.out + (line * args.out_width + from) * args.step + k;
    const int64_t tiles = ceil_div(pixels, int64_t{R});
    for (int64_t t = 0; t < tiles; ++t) {
      // Equally many in each: a few pixels that are left over would wait for their sums.
      const int64_t p = pixels * t / tiles, many = pixels * (t + 1) / tiles - p;
      const float* at = x + p * args.stride_w * C;
      for (int64_t column = 0; column < count; column += 2 * W) {
        choose(many, at, weight + column, bias + column, out + p * args.step + column, count - column);
      }
    }
  }

  CONVVIZ_HD void choose(int64_t pixels, const float* x, const float* weight, const float* bias, float* out,
                         int64_t count) const {
    switch (pixels) {
#define CONVVIZ_CASE(N)                                              \
  case N:                                                            \
    if constexpr (N <= R) {                                          \
      if (count > W) return tile<N, 2>(x, weight, bias, out, count); \
      return tile<N, 1>(x, weight, bias, out, count);                \
    }                                                                \
    return;
      CONVVIZ_CASE(1)
      CONVVIZ_CASE(2)
      CONVVIZ_CASE(3)
      CONVVIZ_CASE(4)
      CONVVIZ_CASE(5)
      CONVVIZ_CASE(6)
      CONVVIZ_CASE(7)
      CONVVIZ_CASE(8)
      CONVVIZ_CASE(9)
      CONVVIZ_CASE(10)
      CONVVIZ_CASE(11)
      CONVVIZ_CASE(12)
#undef CONVVIZ_CASE
      default:
        return;
    }
  }

  // N pixels and `count` results, at most M vectors of them.
  template <int N, int M>
  CONVVIZ_HD void tile(const float* x, const float* weight, const float* bias, float* out,
                       int64_t count) const {
    // In channels_last the taps of a row of the kernel follow each other.
    const int64_t taps = args.kernel_w * args.channels, row = args.width * args.channels,
                  step = args.stride_w * args.channels;
    V sums[N][M];
    CONVVIZ_ROWS
    for (int n = 0; n < N; ++n) {
      CONVVIZ_UNROLL
      for (int m = 0; m < M; ++m) sums[n][m] = Vector::load(bias + m * W);
    }
    for (int64_t y = 0; y < args.kernel_h; ++y, x += row) {
      for (int64_t c = 0; c < taps; ++c, weight += B) {
        V factor[M];
        CONVVIZ_UNROLL
        for (int m = 0; m < M; ++m) factor[m] = Vector::load(weight + m * W);
        CONVVIZ_ROWS
        for (int n = 0; n < N; ++n) {
          const float value = x[n * step + c];
          CONVVIZ_UNROLL
          for (int m = 0; m < M; ++m) sums[n][m] += value * factor[m];
        }
      }
    }
    const V low = V{} + args.low, high = V{} + args.high;
    CONVVIZ_ROWS
    for (int n = 0; n < N; ++n) {
      CONVVIZ_UNROLL
      for (int m = 0; m < M; ++m) {
        const V value = clamped_lanes(sums[n][m], low, high);
        float* to = out + n * args.step + m * W;
        if (count >= (m + 1) * W) {
          Vector::store(to, value);
        } else {
          for (int i = 0; i < W && m * W + i < count; ++i) to[i] = value[i];
        }
      }
    }
  }
};

}  // namespace

int64_t direct_conv_segments(const DirectConvArgs& args, int64_t images) {
  const Lines lines(args, images);
  return images * args.out_height * args.out_width / max_of<int64_t>(1, lines.length) * lines.segments;
}

void direct_conv_cpu(const DirectConvArgs& args, int64_t images, int64_t begin, int64_t end) {
  const Lines lines(args, images);
#if defined(__x86_64__) && defined(__GNUC__)
  // Sums for the registers that there are: 32 of 16 floats, 16 of 8.
  if (vector_level() == 2) return run_avx512(DirectConvolve<16, 12>{args, lines}, begin, end);
  if (vector_level() == 1) return run_avx2(DirectConvolve<8, 6>{args, lines}, begin, end);
#endif
  DirectConvolve<4, 6>{args, lines}(begin, end);
}

}  // namespace convviz
