// Images in which the pixels of a range of ranks show a fill: the masked images of insertion and deletion.
#pragma once

#include "kernels/types.h"

namespace convviz {

// Elements are moved, never computed with: bits of the storage's width.
template <int Bytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};

// The ranks that a variant hides, both ends included; none where the first is above the last.
struct RankRange {
  int32_t first, last;
  CONVVIZ_HD bool holds(int32_t rank) const { return rank >= first && rank <= last; }
};

template <class B>
struct ReplaceRankedArgs {
  const B* images;            // [batch, channels, height, width] or, in channels_last, [batch, height, width,
                              // channels]
  const B* fills;             // of the images' shape, at the strides below: 0 where one value serves all
  const int32_t* ranks;       // [batch, height, width]
  const int64_t* image;       // [count]; beyond the batch: the nearest
  const int64_t *low, *high;  // [count]: ranks in [low, high) show the fill
  B* out;                     // as the images, count of them
  int64_t batch, count, channels, height, width;
  int64_t fill_n, fill_c, fill_y, fill_x;

  CONVVIZ_HD int64_t image_of(int64_t n) const { return max_of(int64_t{0}, min_of(image[n], batch - 1)); }
  CONVVIZ_HD RankRange range_of(int64_t n) const {
    constexpr int64_t least = INT32_MIN, most = INT32_MAX;
    const int64_t from = max_of(low[n], least), to = min_of(high[n], most + 1);
    if (from >= to) return {1, 0};
    return {static_cast<int32_t>(from), static_cast<int32_t>(to - 1)};
  }
  CONVVIZ_HD const B* fill_at(int64_t image, int64_t c, int64_t y, int64_t x) const {
    return fills + image * fill_n + c * fill_c + y * fill_y + x * fill_x;
  }
};

// V pixels of a row in all channels of a contiguous result. For the GPU: item i, `groups` items a row.
template <class B, int V>
struct ReplacePlanes {
  ReplaceRankedArgs<B> args;
  Divider groups, height;
  bool packed, fill_packed;  // packs of V pixels lie where the GPU may move them at once

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t first = groups.split(n) * V, y = height.split(n), left = args.width - first;
    const int64_t image = args.image_of(n), plane = args.height * args.width, place = y * args.width + first;
    const RankRange range = args.range_of(n);
    const int32_t* rank = args.ranks + image * plane + place;
    const bool whole = packed && left >= V;
    int32_t ranks[V];
    if (whole) load_pack(rank, ranks);
    bool hidden[V], any = false;
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) {
      hidden[l] = l < left && range.holds(whole ? ranks[l] : rank[l]);
      any = any || hidden[l];
    }
    const B* from = args.images + image * args.channels * plane + place;
    const B* fill = args.fill_at(image, 0, y, first);
    B* to = args.out + n * args.channels * plane + place;
    for (int64_t c = 0; c < args.channels; ++c, from += plane, to += plane, fill += args.fill_c) {
      if (whole) {
        B values[V];
        load_pack(from, values);
        if (any) {
          B shown[V];
          if (fill_packed) {
            load_pack(fill, shown);
          } else {
            CONVVIZ_LANES
            for (int l = 0; l < V; ++l) shown[l] = fill[l * args.fill_x];
          }
          CONVVIZ_LANES
          for (int l = 0; l < V; ++l) values[l] = hidden[l] ? shown[l] : values[l];
        }
        store_pack(to, values);
      } else {
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) {
          if (l < left) to[l] = hidden[l] ? fill[l * args.fill_x] : from[l];
        }
      }
    }
  }
};

// V elements that follow each other in a row of a channels_last result. For the GPU: item i, `groups` items a
// row.
template <class B, int V>
struct ReplacePixels {
  ReplaceRankedArgs<B> args;
  Divider groups, height, channels;
  bool packed;

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t first = groups.split(n) * V, y = height.split(n);
    const int64_t length = args.width * args.channels, left = length - first;
    int64_t x = first;
    int64_t c = channels.split(x);
    const int64_t image = args.image_of(n), line = image * args.height + y;
    const RankRange range = args.range_of(n);
    const int32_t* rank = args.ranks + line * args.width;
    const B* from = args.images + line * length + first;
    B* to = args.out + (n * args.height + y) * length + first;
    const bool whole = packed && left >= V;
    bool hidden = range.holds(rank[x]);
    B values[V];
    if (whole) load_pack(from, values);
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) {
      if (l < left) {
        if (hidden) {
          values[l] = *args.fill_at(image, c, y, x);
        } else if (!whole) {
          values[l] = from[l];
        }
        if (!whole) to[l] = values[l];
        if (++c == args.channels && l + 1 < left) {
          c = 0;
          hidden = range.holds(rank[++x]);
        }
      }
    }
    if (whole) store_pack(to, values);
  }
};

// Rows of the result, n * height + y.
template <class B>
void replace_ranked_cpu(const ReplaceRankedArgs<B>& args, bool channels_last, int64_t begin, int64_t end);

// Enqueues on the CUDA stream and returns CUDA's error code.
template <class B>
int replace_ranked_cuda(const ReplaceRankedArgs<B>& args, bool channels_last, void* stream);

}  // namespace convviz
