// Saliency's reduction: the largest magnitude over the channels of each pixel.
#pragma once

#include "kernels/types.h"

namespace convviz {

template <class T>
struct MaxAbsArgs {
  const T* x;
  T* out;
  int64_t batch, channels, pixels;  // pixels of one image
};

// NaN wins, whichever channel it is in.
template <class A>
CONVVIZ_HD A larger_magnitude(A best, A value) {
  const A magnitude = value < A(0) ? -value : value;
  return (magnitude > best) | (value != value) ? magnitude : best;
}

// Pixels V*i ... V*i + V - 1 of a contiguous batch: item i, `groups` items an image.
template <class T, int V>
struct MaxAbsContiguous {
  MaxAbsArgs<T> args;
  Divider groups;
  bool packed;  // all packs of V lie where the GPU may read them at once

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t first = groups.split(n) * V;
    const T* x = args.x + n * args.channels * args.pixels + first;
    T* out = args.out + n * args.pixels + first;
    if (packed && first + V <= args.pixels) {
      pixels<true>(x, out, V);
    } else {
      pixels<false>(x, out, static_cast<int>(min_of<int64_t>(V, args.pixels - first)));
    }
  }

  template <bool FULL>
  CONVVIZ_HD void pixels(const T* x, T* out, int count) const {
    acc_t<T> best[V];
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) best[l] = acc_t<T>(0);
    for (int64_t c = 0; c < args.channels; ++c, x += args.pixels) {
      T values[V];
      if (FULL) {
        load_pack(x, values);
      } else {
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) values[l] = l < count ? x[l] : static_cast<T>(acc_t<T>(0));
      }
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) best[l] = larger_magnitude(best[l], to_acc(values[l]));
    }
    T result[V];
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) result[l] = static_cast<T>(best[l]);
    if (FULL) {
      store_pack(out, result);
    } else {
      for (int64_t l = 0; l < count; ++l) out[l] = result[l];
    }
  }
};

// Pixel i of a channels_last batch. C, where it is not 0, is the number of channels known to the compiler.
template <class T, int C>
struct MaxAbsChannelsLast {
  MaxAbsArgs<T> args;

  CONVVIZ_HD void operator()(int64_t i) const {
    const int64_t channels = C == 0 ? args.channels : C;
    const T* x = args.x + i * channels;
    acc_t<T> best(0);
    if (C == 0) {
      // Several maxima side by side: one would be a chain of dependent steps.
      constexpr int V = 16;
      acc_t<T> lane[V];
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) lane[l] = acc_t<T>(0);
      int64_t c = 0;
      for (; c + V <= channels; c += V) {
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) lane[l] = larger_magnitude(lane[l], to_acc(x[c + l]));
      }
      for (; c < channels; ++c) best = larger_magnitude(best, to_acc(x[c]));
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) best = larger_magnitude(best, lane[l]);
    } else {
      for (int c = 0; c < C; ++c) best = larger_magnitude(best, to_acc(x[c]));
    }
    args.out[i] = static_cast<T>(best);
  }
};

// Contiguous: blocks of kMaxAbsBlock pixels, images first. channels_last: pixels of the batch.
constexpr int kMaxAbsBlock = 32;
template <class T>
void max_abs_contiguous_cpu(const MaxAbsArgs<T>& args, int64_t begin, int64_t end);
template <class T>
void max_abs_channels_last_cpu(const MaxAbsArgs<T>& args, int64_t begin, int64_t end);

// Enqueue on the CUDA stream and return CUDA's error code.
template <class T>
int max_abs_contiguous_cuda(const MaxAbsArgs<T>& args, void* stream);
template <class T>
int max_abs_channels_last_cuda(const MaxAbsArgs<T>& args, void* stream);

}  // namespace convviz
