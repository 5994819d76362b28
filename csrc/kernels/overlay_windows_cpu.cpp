#include <cstring>

#include "kernels/isa.h"
#include "kernels/overlay_windows.h"

namespace convviz {

namespace {

// A row of a result in pieces: padding, base, patch, base, padding.
struct Pieces {
  int64_t map_begin, patch_begin, patch_end, map_end;
};

CONVVIZ_HD Pieces pieces_of(const AxisEntry& axis, int64_t size, int64_t count) {
  Pieces p;
  p.map_begin = clamped(-axis.origin, 0, count);
  p.map_end = clamped(size - axis.origin, p.map_begin, count);
  p.patch_begin = clamped(axis.start - axis.origin, p.map_begin, p.map_end);
  p.patch_end = clamped(axis.end - axis.origin, p.patch_begin, p.map_end);
  return p;
}

// Runs of elements that follow each other in the result. One of `from`'s strides is 1 or 0, and known, where
// it matters for speed.
template <class T>
struct Runs {
  const OverlayArgs<T>& args;

  // A copy, which nothing that is written can change.
  struct Bounds {
    acc_t<T> low, high;
    CONVVIZ_HD T operator()(acc_t<T> value) const {
      return static_cast<T>(Activation<T>::clamp(value, low, high));
    }
  };
  CONVVIZ_HD Bounds bounds() const { return {args.activation.low, args.activation.high}; }

  CONVVIZ_HD void constant(T* out, T value, int64_t count) const {
    if (args.add) {
      const Bounds b = bounds();
      for (int64_t i = 0; i < count; ++i) out[i] = b(to_acc(out[i]) + to_acc(value));
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = value;
    }
  }

  CONVVIZ_HD void copy(T* out, const T* from, int64_t count) const {
    if (args.add) {
      const Bounds b = bounds();
      for (int64_t i = 0; i < count; ++i) out[i] = b(to_acc(out[i]) + to_acc(from[i]));
    } else {
      std::memcpy(out, from, sizeof(T) * count);
    }
  }

  // STEP is 1 where c counts up with the elements, 0 where it stays.
  template <int STEP>
  CONVVIZ_HD void activate(T* out, const T* from, int64_t count, int64_t c) const {
    const Bounds b = bounds();
    const T* bias = args.activation.bias;
    if (bias == nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] = b(to_acc(from[i]));
    } else if (STEP == 1) {
      bias += c;
      for (int64_t i = 0; i < count; ++i) out[i] = b(to_acc(from[i]) + to_acc(bias[i]));
    } else {
      const acc_t<T> added = to_acc(bias[c]);
      for (int64_t i = 0; i < count; ++i) out[i] = b(to_acc(from[i]) + added);
    }
  }
};

template <class T>
struct ChannelsLastLoop {
  OverlayArgs<T> args;
  Divider height;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const WindowSources<T>& from = args.from;
    const Runs<T> runs{args};
    for (int64_t r = begin; r < end; ++r) {
      int64_t n = r;
      const int64_t y = height.split(n);
      const AxisEntry rows = from.row(n), cols = from.col(n);
      const int64_t map_y = rows.origin + y;
      T* out = args.out.data + n * args.out.n + y * args.out.h;
      if (!in_map(map_y, from.height)) {
        padding(runs, out, 0, args.width);
        continue;
      }
      const auto row = from.at(n, from.tables.image(n), rows, cols, map_y);
      Pieces p = pieces_of(cols, from.width, args.width);
      if (!row.in_patch) p.patch_begin = p.patch_end = p.map_end;
      padding(runs, out, 0, p.map_begin);
      copied(runs, out, row.base, from.base.w, cols.origin, p.map_begin, p.patch_begin);
      patched(runs, out, row.patch, cols.origin, p.patch_begin, p.patch_end);
      copied(runs, out, row.base, from.base.w, cols.origin, p.patch_end, p.map_end);
      padding(runs, out, p.map_end, args.width);
    }
  }

  // Pixels begin <= x < end of a row of the result; pixel x of the result is x + origin of the source.
  CONVVIZ_HD void padding(const Runs<T>& runs, T* out, int64_t begin, int64_t end) const {
    if (args.out.w == args.channels) {
      runs.constant(out + begin * args.channels, args.pad, (end - begin) * args.channels);
    } else {
      for (int64_t x = begin; x < end; ++x) runs.constant(out + x * args.out.w, args.pad, args.channels);
    }
  }

  CONVVIZ_HD void copied(const Runs<T>& runs, T* out, const T* source, int64_t step, int64_t origin,
                         int64_t begin, int64_t end) const {
    if (begin >= end) return;
    out += begin * args.out.w;
    source += (begin + origin) * step;
    const int64_t count = (end - begin) * args.channels;
    if (args.out.w == args.channels && step == args.channels) {
      runs.copy(out, source, count);
    } else if (args.out.w == args.channels && step == 0 &&
               !args.add) {  // one colour: twice as much each time
      std::memcpy(out, source, sizeof(T) * args.channels);
      for (int64_t done = args.channels; done < count; done *= 2)
        std::memcpy(out + done, out, sizeof(T) * min_of(done, count - done));
    } else {
      for (int64_t x = begin; x < end; ++x, out += args.out.w, source += step)
        runs.copy(out, source, args.channels);
    }
  }

  CONVVIZ_HD void patched(const Runs<T>& runs, T* out, const T* source, int64_t origin, int64_t begin,
                          int64_t end) const {
    const MapView<const T>& patch = args.from.patch;
    if (begin >= end) return;
    if (patch.c == 1 && (args.add || args.activation.plain)) {
      copied(runs, out, source, patch.w, origin, begin, end);
      return;
    }
    out += begin * args.out.w;
    source += (begin + origin) * patch.w;
    if (patch.c == 0) {  // an occluder of one colour: nothing is done to it
      if (patch.w == 0 && args.out.w == args.channels) {
        runs.constant(out, *source, (end - begin) * args.channels);
      } else {
        for (int64_t x = begin; x < end; ++x, out += args.out.w, source += patch.w)
          runs.constant(out, *source, args.channels);
      }
    } else if (args.activation.bias == nullptr && args.out.w == args.channels && patch.w == args.channels) {
      runs.template activate<1>(out, source, (end - begin) * args.channels, 0);
    } else {
      for (int64_t x = begin; x < end; ++x, out += args.out.w, source += patch.w)
        runs.template activate<1>(out, source, args.channels, 0);
    }
  }
};

template <class T>
struct PlanesLoop {
  OverlayArgs<T> args;
  Divider channels;

  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    const WindowSources<T>& from = args.from;
    const Runs<T> runs{args};
    for (int64_t i = begin; i < end; ++i) {
      int64_t n = i;
      const int64_t c = channels.split(n), image = from.tables.image(n);
      const AxisEntry rows = from.row(n), cols = from.col(n);
      const Pieces whole = pieces_of(cols, from.width, args.width);
      for (int64_t y = 0; y < args.height; ++y) {
        const int64_t map_y = rows.origin + y;
        T* out = args.out.data + n * args.out.n + c * args.out.c + y * args.out.h;
        if (!in_map(map_y, from.height)) {
          padding(runs, out, 0, args.width);
          continue;
        }
        auto row = from.at(n, image, rows, cols, map_y);
        row.base += c * from.base.c;
        row.patch += c * from.patch.c;
        Pieces p = whole;
        if (!row.in_patch) p.patch_begin = p.patch_end = p.map_end;
        padding(runs, out, 0, p.map_begin);
        line(runs, out, row.base, from.base.w, cols.origin, p.map_begin, p.patch_begin, c, false);
        line(runs, out, row.patch, from.patch.w, cols.origin, p.patch_begin, p.patch_end, c, true);
        line(runs, out, row.base, from.base.w, cols.origin, p.patch_end, p.map_end, c, false);
        padding(runs, out, p.map_end, args.width);
      }
    }
  }

  CONVVIZ_HD void padding(const Runs<T>& runs, T* out, int64_t begin, int64_t end) const {
    if (args.out.w == 1) {
      runs.constant(out + begin, args.pad, end - begin);
    } else {
      for (int64_t x = begin; x < end; ++x) {
        T& place = out[x * args.out.w];
        place = args.result(args.add ? place : args.pad, args.pad, false, 0);
      }
    }
  }

  CONVVIZ_HD void line(const Runs<T>& runs, T* out, const T* source, int64_t step, int64_t origin,
                       int64_t begin, int64_t end, int64_t c, bool in_patch) const {
    if (begin >= end) return;
    const int64_t count = end - begin;
    out += begin * args.out.w;
    source += (begin + origin) * step;
    if (args.out.w == 1 && step == 1) {
      if (in_patch && !args.add && !args.activation.plain) {
        runs.template activate<0>(out, source, count, c);
      } else {
        runs.copy(out, source, count);
      }
    } else {
      for (int64_t x = 0; x < count; ++x, out += args.out.w, source += step)
        *out = args.result(args.add ? *out : *source, *source, in_patch, c);
    }
  }
};

// float64 is for checks: it is not worth three compilations.
template <class T, class Loop>
void run(const Loop& loop, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(double)) {
    loop(begin, end);
  } else {
    run_widest(loop, begin, end);
  }
}

}  // namespace

template <class T>
void overlay_channels_last_cpu(const OverlayArgs<T>& args, int64_t begin, int64_t end) {
  run<T>(ChannelsLastLoop<T>{args, Divider(args.height)}, begin, end);
}

template <class T>
void overlay_planes_cpu(const OverlayArgs<T>& args, int64_t begin, int64_t end) {
  run<T>(PlanesLoop<T>{args, Divider(args.channels)}, begin, end);
}

#define CONVVIZ_INSTANTIATE(T)                                                         \
  template void overlay_channels_last_cpu<T>(const OverlayArgs<T>&, int64_t, int64_t); \
  template void overlay_planes_cpu<T>(const OverlayArgs<T>&, int64_t, int64_t);
CONVVIZ_INSTANTIATE(double)
CONVVIZ_INSTANTIATE(float)
CONVVIZ_INSTANTIATE(Half)
CONVVIZ_INSTANTIATE(BFloat16)
#undef CONVVIZ_INSTANTIATE

}  // namespace convviz
