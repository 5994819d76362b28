// 3x3 convolutions with stride 1 by Winograd's minimal filtering F(2x2, 3x3): 2x2 outputs of a tile take 16
// multiplications instead of 36 (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2015,
// section 4.1). A tile of 4x4 inputs becomes 16 values a channel, the values of one kind of all tiles are the
// rows of a matrix, and 16 matrix products with the transformed weights are left for a library. A tile's
// values lie together: 16 planes a power of two apart would fall into the same lines of a cache.
#pragma once

#include "kernels/types.h"

namespace convviz {

// Rows and columns of tiles; `padding` before the first row and column of the input.
template <class T>
struct WinogradInputArgs {
  const T* x;  // [N, H, W, C]: channels_last
  T* out;      // [tiles, 16, C]
  int64_t tiles, channels, height, width, pad_h, pad_w;
  Divider cols, rows;
};

template <class T>
struct WinogradOutputArgs {
  const T* products;  // [tiles, 16, C]
  const T* bias;      // [C] or null
  T* out;             // [N, H, W, C]: channels_last
  int64_t tiles, channels, height, width;
  Divider cols, rows;
  acc_t<T> low, high;
};

// Channels V*j ... V*j + V - 1 of one tile: item i = tile * groups + j. `packed`: every pack lies where the
// GPU may read it at once, and there is no tail.
template <class T, int V>
struct WinogradInput {
  WinogradInputArgs<T> args;
  Divider groups;
  bool packed;

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t tile = i;
    const int64_t channel = groups.split(tile) * V;
    int64_t n = tile;
    const int64_t left = args.cols.split(n) * 2 - args.pad_w, top = args.rows.split(n) * 2 - args.pad_h;
    const T* image = args.x + n * args.height * args.width * args.channels + channel;
    T* out = args.out + tile * 16 * args.channels + channel;
    if (packed || channel + V <= args.channels) {
      if (packed)
        transform<true>(image, out, top, left, V);
      else
        transform<false>(image, out, top, left, V);
    } else {
      transform<false>(image, out, top, left, static_cast<int>(args.channels - channel));
    }
  }

  template <bool PACKED>
  CONVVIZ_HD void read(const T* from, acc_t<T> (&to)[V], int count) const {
    T values[V];
    if (PACKED) {
      load_pack(from, values);
    } else if (count == V) {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) values[l] = from[l];
    } else {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) values[l] = l < count ? from[l] : static_cast<T>(acc_t<T>(0));
    }
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) to[l] = to_acc(values[l]);
  }

  template <bool PACKED>
  CONVVIZ_HD void write(const acc_t<T> (&from)[V], T* to, int count) const {
    T values[V];
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) values[l] = static_cast<T>(from[l]);
    if (PACKED) {
      store_pack(to, values);
    } else if (count == V) {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) to[l] = values[l];
    } else {
      for (int l = 0; l < count; ++l) to[l] = values[l];
    }
  }

  template <bool PACKED>
  CONVVIZ_HD void transform(const T* image, T* out, int64_t top, int64_t left, int count) const {
    using A = acc_t<T>;
    A rows[4][4][V];
    CONVVIZ_UNROLL
    for (int y = 0; y < 4; ++y) {
      A in[4][V];
      const bool row = top + y >= 0 && top + y < args.height;
      CONVVIZ_UNROLL
      for (int x = 0; x < 4; ++x) {
        if (row && left + x >= 0 && left + x < args.width) {
          read<PACKED>(image + ((top + y) * args.width + left + x) * args.channels, in[x], count);
        } else {
          CONVVIZ_LANES
          for (int l = 0; l < V; ++l) in[x][l] = A(0);
        }
      }
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) {
        rows[y][0][l] = in[0][l] - in[2][l];
        rows[y][1][l] = in[1][l] + in[2][l];
        rows[y][2][l] = in[2][l] - in[1][l];
        rows[y][3][l] = in[1][l] - in[3][l];
      }
    }
    CONVVIZ_UNROLL
    for (int x = 0; x < 4; ++x) {
      A result[4][V];
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) {
        result[0][l] = rows[0][x][l] - rows[2][x][l];
        result[1][l] = rows[1][x][l] + rows[2][x][l];
        result[2][l] = rows[2][x][l] - rows[1][x][l];
        result[3][l] = rows[1][x][l] - rows[3][x][l];
      }
      CONVVIZ_UNROLL
      for (int y = 0; y < 4; ++y) write<PACKED>(result[y], out + (y * 4 + x) * args.channels, count);
    }
  }
};

template <class T, int V>
struct WinogradOutput {
  WinogradOutputArgs<T> args;
  Divider groups;
  bool packed;

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t tile = i;
    const int64_t channel = groups.split(tile) * V;
    int64_t n = tile;
    const int64_t left = args.cols.split(n) * 2, top = args.rows.split(n) * 2;
    const T* products = args.products + tile * 16 * args.channels + channel;
    T* image = args.out + n * args.height * args.width * args.channels + channel;
    const T* bias = args.bias == nullptr ? nullptr : args.bias + channel;
    const int count = static_cast<int>(min_of<int64_t>(V, args.channels - channel));
    if (packed)
      transform<true>(products, bias, image, top, left, V);
    else if (count == V)
      transform<false>(products, bias, image, top, left, V);
    else
      transform<false>(products, bias, image, top, left, count);
  }

  template <bool PACKED>
  CONVVIZ_HD void transform(const T* products, const T* bias, T* image, int64_t top, int64_t left,
                            int count) const {
    using A = acc_t<T>;
    const WinogradInput<T, V> move{};
    A rows[4][2][V];
    CONVVIZ_UNROLL
    for (int y = 0; y < 4; ++y) {
      A in[4][V];
      CONVVIZ_UNROLL
      for (int x = 0; x < 4; ++x)
        move.template read<PACKED>(products + (y * 4 + x) * args.channels, in[x], count);
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) {
        rows[y][0][l] = in[0][l] + in[1][l] + in[2][l];
        rows[y][1][l] = in[1][l] - in[2][l] - in[3][l];
      }
    }
    A offset[V];
    if (bias != nullptr) {
      move.template read<false>(bias, offset, count);
    } else {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) offset[l] = A(0);
    }
    CONVVIZ_UNROLL
    for (int x = 0; x < 2; ++x) {
      A result[2][V];
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) {
        A upper = rows[0][x][l] + rows[1][x][l] + rows[2][x][l] + offset[l];
        A lower = rows[1][x][l] - rows[2][x][l] - rows[3][x][l] + offset[l];
        // One choice at a time, which becomes a vector's; NaN stays NaN.
        upper = upper <= args.low ? args.low : upper;
        lower = lower <= args.low ? args.low : lower;
        result[0][l] = upper >= args.high ? args.high : upper;
        result[1][l] = lower >= args.high ? args.high : lower;
      }
      CONVVIZ_UNROLL
      for (int y = 0; y < 2; ++y) {
        if (top + y < args.height && left + x < args.width)
          move.template write<PACKED>(result[y], image + ((top + y) * args.width + left + x) * args.channels,
                                      count);
      }
    }
  }
};

// Items of so many channels, tiles first: sixteen values of a lane must fit into the registers.
template <class T>
constexpr int kWinogradLanes = kCpuLanes<T> / 2;
template <class T>
void winograd_input_cpu(const WinogradInputArgs<T>& args, int64_t begin, int64_t end);
template <class T>
void winograd_output_cpu(const WinogradOutputArgs<T>& args, int64_t begin, int64_t end);

// Enqueue on the CUDA stream and return CUDA's error code.
template <class T>
int winograd_input_cuda(const WinogradInputArgs<T>& args, void* stream);
template <class T>
int winograd_output_cuda(const WinogradOutputArgs<T>& args, void* stream);

}  // namespace convviz
