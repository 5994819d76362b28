// The data gradient of a convolution with few input channels: a network's first layer, where libraries are
// slow because the few input channels leave most of their vectors empty. Here the vectors hold output
// channels or pixels.
#pragma once

#include "kernels/types.h"
#include "kernels/window.h"

namespace convviz {

template <class T>
struct InputGradArgs {
  const T* grad;
  const acc_t<T>* weight;  // packed, see PackWeight
  T* out;
  int64_t batch, channels, in_channels;  // channels: the gradient's
  WindowAxis h, w;                       // `in` is the result's size, `out` the gradient's
};

// The kernels are compiled for 1, 3 and 4 input channels; 2 are taken as 3, with weights 0.
CONVVIZ_HD int64_t padded_in_channels(int64_t in_channels) {
  return in_channels == 2 ? 3 : in_channels;
}

// Copies the weight into the order that the kernels read, in the type that sums are kept in: [tap][ci][co]
// for channels_last gradients, [co][tap][ci] for contiguous ones, ci up to `in_channels_out`. Item i is an
// element of the copy.
template <class T>
struct PackWeight {
  const T* weight;
  acc_t<T>* packed;
  int64_t stride_co, stride_ci, stride_kh, stride_kw;
  int64_t in_channels;
  Divider in_channels_out, channels, kernel_w, taps;
  bool channels_last;

  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t rest = i, co, ci, tap;
    if (channels_last) {
      co = channels.split(rest);
      ci = in_channels_out.split(rest);
      tap = rest;
    } else {
      ci = in_channels_out.split(rest);
      tap = taps.split(rest);
      co = rest;
    }
    const int64_t kw = kernel_w.split(tap);
    packed[i] = ci < in_channels
                    ? to_acc(weight[co * stride_co + ci * stride_ci + tap * stride_kh + kw * stride_kw])
                    : acc_t<T>(0);
  }
};

// Pixels of one row that are one stride apart belong to the same taps of neighbouring windows: P of them
// share each weight that is read. L is the number of output channels taken at once, SUMS (L or 1) that of the
// sums kept for them.
template <class T, int CI, int P, int L, int SUMS>
struct InputGradChannelsLast {
  using A = acc_t<T>;
  InputGradArgs<T> args;
  Divider stride_h, stride_w, height, groups;  // groups of P pixels in one phase of a row
  int64_t back_h, back_w;

  // Item i is a group of P pixels: groups fastest, then phases, rows, images.
  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t j = groups.split(n) * P, phase = stride_w.split(n), h = height.split(n);
    pixels<P, true>(n, cover_of(args.h, stride_h, back_h, h), h, phase + j * args.w.stride);
  }

  // N pixels from w on. CHECK: they, and windows of theirs, may lie outside.
  template <int N, bool CHECK>
  CONVVIZ_HD void pixels(int64_t n, const Cover& h, int64_t row, int64_t w) const {
    A sum[N][CI][SUMS];
    CONVVIZ_UNROLL
    for (int p = 0; p < N; ++p) {
      CONVVIZ_UNROLL
      for (int ci = 0; ci < CI; ++ci) {
        CONVVIZ_LANES
        for (int l = 0; l < SUMS; ++l) sum[p][ci][l] = A(0);
      }
    }
    Cover cover;
    cover.offset = w + args.w.padding;
    cover.last = stride_w.quotient(cover.offset);
    cover.first = cover.last - back_w + 1;
    if (CHECK) {  // some lane's window may still exist
      cover.first = max_of<int64_t>(cover.first, 1 - N);
      cover.last = min_of(cover.last, args.w.out - 1);
    }
    for (int64_t oh = h.first; oh <= h.last; ++oh) {
      const int64_t kh = tap_on(args.h, h, oh);
      if (kh < 0) continue;
      for (int64_t ow = cover.first; ow <= cover.last; ++ow) {
        const int64_t kw = tap_on(args.w, cover, ow);
        if (kw < 0) continue;
        const T* grad = args.grad + ((n * args.h.out + oh) * args.w.out + ow) * args.channels;
        const A* weight = args.weight + (kh * args.w.kernel + kw) * CI * args.channels;
        int64_t co = 0;
        for (; co + L <= args.channels; co += L) add<L, N, CHECK>(grad + co, weight + co, ow, sum);
        for (; co < args.channels; ++co) add<1, N, CHECK>(grad + co, weight + co, ow, sum);
      }
    }
    T* out = args.out + ((n * args.h.in + row) * args.w.in + w) * args.in_channels;
    CONVVIZ_UNROLL
    for (int p = 0; p < N; ++p) {
      if (CHECK && w + p * args.w.stride >= args.w.in) break;
      CONVVIZ_UNROLL
      for (int ci = 0; ci < CI; ++ci) {
        A total = sum[p][ci][0];
        for (int l = 1; l < SUMS; ++l) total += sum[p][ci][l];
        if (ci < args.in_channels) out[p * args.w.stride * args.in_channels + ci] = static_cast<T>(total);
      }
    }
  }

  // M output channels of one tap.
  template <int M, int N, bool CHECK>
  CONVVIZ_HD void add(const T* grad, const A* weight, int64_t ow, A (&sum)[N][CI][SUMS]) const {
    A signal[N][M];
    CONVVIZ_UNROLL
    for (int p = 0; p < N; ++p) {
      if (CHECK && (ow + p < 0 || ow + p >= args.w.out)) {
        CONVVIZ_LANES
        for (int l = 0; l < M; ++l) signal[p][l] = A(0);
      } else {
        T values[M];
        load_pack(grad + p * args.channels, values);
        CONVVIZ_LANES
        for (int l = 0; l < M; ++l) signal[p][l] = to_acc(values[l]);
      }
    }
    CONVVIZ_UNROLL
    for (int ci = 0; ci < CI; ++ci) {
      A factor[M];
      load_pack(weight + ci * args.channels, factor);
      CONVVIZ_UNROLL
      for (int p = 0; p < N; ++p) {
        CONVVIZ_LANES
        for (int l = 0; l < M; ++l) sum[p][ci][SUMS == 1 ? 0 : l] += signal[p][l] * factor[l];
      }
    }
  }
};

// V pixels of one row and phase, for a contiguous gradient: the lanes are pixels, the weight is the same for
// all of them.
template <class T, int CI, int V>
struct InputGradContiguous {
  using A = acc_t<T>;
  InputGradArgs<T> args;
  Divider stride_h, stride_w, height, groups;  // groups of V pixels in one phase of a row
  int64_t back_h, back_w;

  // Item i is a group of V pixels: groups fastest, then phases, rows, images.
  CONVVIZ_HD void operator()(int64_t i) const {
    int64_t n = i;
    const int64_t j = groups.split(n) * V, phase = stride_w.split(n), h = height.split(n);
    pixels(n, cover_of(args.h, stride_h, back_h, h), h, phase + j * args.w.stride);
  }

  CONVVIZ_HD void pixels(int64_t n, const Cover& h, int64_t row, int64_t w) const {
    A sum[CI][V];
    CONVVIZ_UNROLL
    for (int ci = 0; ci < CI; ++ci) {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) sum[ci][l] = A(0);
    }
    Cover cover;
    cover.offset = w + args.w.padding;
    cover.last = stride_w.quotient(cover.offset);
    cover.first = max_of<int64_t>(cover.last - back_w + 1, 1 - V);
    cover.last = min_of(cover.last, args.w.out - 1);
    const int64_t plane = args.h.out * args.w.out, taps = args.h.kernel * args.w.kernel;
    const T* grad = args.grad + n * args.channels * plane;
    const A* weight = args.weight;
    for (int64_t co = 0; co < args.channels; ++co, grad += plane, weight += taps * CI) {
      for (int64_t oh = h.first; oh <= h.last; ++oh) {
        const int64_t kh = tap_on(args.h, h, oh);
        if (kh < 0) continue;
        for (int64_t ow = cover.first; ow <= cover.last; ++ow) {
          const int64_t kw = tap_on(args.w, cover, ow);
          if (kw < 0) continue;
          add(grad + oh * args.w.out + ow, weight + (kh * args.w.kernel + kw) * CI, ow, sum);
        }
      }
    }
    T* out = args.out + (n * args.in_channels * args.h.in + row) * args.w.in + w;
    const int64_t left = ceil_div(args.w.in - w, args.w.stride);
    CONVVIZ_UNROLL
    for (int ci = 0; ci < CI; ++ci) {
      if (ci >= args.in_channels) break;
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) {
        if (l < left) out[ci * args.h.in * args.w.in + l * args.w.stride] = static_cast<T>(sum[ci][l]);
      }
    }
  }

  CONVVIZ_HD void add(const T* grad, const A* weight, int64_t ow, A (&sum)[CI][V]) const {
    A signal[V];
    if (ow >= 0 && ow + V <= args.w.out) {
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) signal[l] = to_acc(grad[l]);
    } else {
      const int low = static_cast<int>(max_of<int64_t>(0, -ow));
      const int high = static_cast<int>(min_of<int64_t>(V, args.w.out - ow));
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) signal[l] = (l >= low) & (l < high) ? to_acc(grad[l]) : A(0);
    }
    CONVVIZ_UNROLL
    for (int ci = 0; ci < CI; ++ci) {
      const A factor = weight[ci];
      CONVVIZ_LANES
      for (int l = 0; l < V; ++l) sum[ci][l] += signal[l] * factor;
    }
  }
};

// Makes the item of either layout.
template <class Item, class T>
Item make_input_grad(const InputGradArgs<T>& args, int group) {
  return {args,
          Divider(args.h.stride),
          Divider(args.w.stride),
          Divider(args.h.in),
          Divider(ceil_div(ceil_div(args.w.in, args.w.stride), group)),
          windows_back(args.h),
          windows_back(args.w)};
}

// Calls f with std::integral_constant<int, CI>-like tags; in_channels is 1 ... 4.
template <int CI>
struct InChannels {
  static constexpr int value = CI;
};
template <class F>
auto with_in_channels(int64_t in_channels, const F& f) {
  switch (padded_in_channels(in_channels)) {
    case 1:
      return f(InChannels<1>{});
    case 3:
      return f(InChannels<3>{});
    default:
      return f(InChannels<4>{});
  }
}

template <class T>
void pack_weight_cpu(const PackWeight<T>& item, int64_t count);

// Rows of the result, begin <= row < end: n * height + h.
template <class T>
void input_grad_channels_last_cpu(const InputGradArgs<T>& args, int64_t begin, int64_t end);
template <class T>
void input_grad_contiguous_cpu(const InputGradArgs<T>& args, int64_t begin, int64_t end);

// Enqueue on the CUDA stream and return CUDA's error code.
template <class T>
int pack_weight_cuda(const PackWeight<T>& item, int64_t count, void* stream);
template <class T>
int input_grad_channels_last_cuda(const InputGradArgs<T>& args, void* stream);
template <class T>
int input_grad_contiguous_cuda(const InputGradArgs<T>& args, void* stream);

}  // namespace convviz
