// ReLU, clipped or not, that keeps one bit an element, and its backward under a rule.
#pragma once

#include "kernels/rules.h"
#include "kernels/types.h"

namespace convviz {

#if !defined(__CUDACC__) && !defined(CONVVIZ_CUDA_ON_HOST) && defined(__BYTE_ORDER__) && \
    __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define CONVVIZ_BITS_BY_MULTIPLICATION 1
#else
#define CONVVIZ_BITS_BY_MULTIPLICATION 0
#endif

// Bit l of the result is alive[l], each of which is 0 or 1.
CONVVIZ_HD uint8_t pack_bits(const uint8_t* alive) {
#if CONVVIZ_BITS_BY_MULTIPLICATION
  uint64_t
      bytes;  // the product brings byte l's lowest bit to bit 56 + l; no two terms meet, so nothing carries
  std::memcpy(&bytes, alive, 8);
  return static_cast<uint8_t>((bytes * UINT64_C(0x0102040810204080)) >> 56);
#else
  unsigned bits = 0;
  CONVVIZ_LANES
  for (int l = 0; l < 8; ++l) bits |= static_cast<unsigned>(alive[l]) << l;
  return static_cast<uint8_t>(bits);
#endif
}

template <class T>
struct ReluArgs {
  const T* x;
  T* out;  // may be x
  uint8_t* mask;
  int64_t numel;
  acc_t<T> lower, upper;  // upper is NaN where there is none: no value is >= NaN
};

// Item i owns elements V*i ... V*i + V - 1 and their V/8 mask bytes. The caller has checked the alignment of
// x and out.
template <class T, int V>
struct ReluForward {
  static_assert(V % 8 == 0, "whole mask bytes");
  ReluArgs<T> args;
  bool aligned;

  CONVVIZ_HD void operator()(int64_t i) const {
    const int64_t first = i * V;
    if (aligned && first + V <= args.numel) {
      if (args.upper != args.upper) {
        block<false>(first);
      } else {
        block<true>(first);
      }
      return;
    }
    for (int64_t start = first; start < min_of(first + V, args.numel); start += 8) {
      uint8_t alive[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      for (int l = 0; l < 8; ++l) {
        if (start + l >= args.numel) break;
        T value = args.x[start + l];
        clamp<true>(value, alive[l]);
        args.out[start + l] = value;
      }
      args.mask[start / 8] = pack_bits(alive);
    }
  }

  template <bool UPPER>
  CONVVIZ_HD void block(int64_t first) const {
    T values[V];
    load_pack(args.x + first, values);
    uint8_t alive[V];
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) clamp<UPPER>(values[l], alive[l]);
    store_pack(args.out + first, values);
    uint8_t bits[V / 8];
    CONVVIZ_UNROLL
    for (int b = 0; b < V / 8; ++b) bits[b] = pack_bits(alive + 8 * b);
    uint8_t* mask = args.mask + first / 8;
    CONVVIZ_UNROLL
    for (int b = 0; b < V / 8; ++b) mask[b] = bits[b];
  }

  // NaN is neither below nor above: it stays, and stays alive. UPPER: there may be an upper bound.
  template <bool UPPER>
  CONVVIZ_HD void clamp(T& value, uint8_t& alive) const {
    const acc_t<T> v = to_acc(value);
    const bool low = v <= args.lower, high = UPPER & (v >= args.upper);
    alive = static_cast<uint8_t>(!(low | high));
    const T clipped = high ? static_cast<T>(args.upper) : value;
    value = low ? static_cast<T>(args.lower) : clipped;
  }
};

constexpr int kMaxRank = 4;

// The gradient's elements in the memory order of the forward's output, outermost dimension first; dimensions
// that can be walked as one are one. The result is written in that order too, densely.
template <class T>
struct ReluBackwardArgs {
  const T* grad;
  const uint8_t* mask;
  T* out;
  int64_t numel;       // of the gradient
  Divider mask_numel;  // elements of the forward: divides numel, several gradients share one mask
  int rank;            // 1 ... kMaxRank
  Divider size[kMaxRank];
  int64_t stride[kMaxRank];
  Rule<acc_t<T>> rule;
};

// Where an element stands in the gradient. The CPU steps it along; a GPU thread computes its own.
struct StridedPosition {
  int64_t index[kMaxRank];
  int64_t offset;

  template <class T>
  CONVVIZ_HD void set(const ReluBackwardArgs<T>& args, int64_t element) {
    offset = 0;
    CONVVIZ_LANES
    for (int d = kMaxRank - 1; d >= 0; --d) {
      if (d >= args.rank) continue;
      index[d] = d == 0 ? element : args.size[d].split(element);
      offset += index[d] * args.stride[d];
    }
  }

  // Moves by `count` elements, at most to the end of the innermost row, which is the start of the next.
  template <class T>
  CONVVIZ_HD void advance(const ReluBackwardArgs<T>& args, int64_t count) {
    int d = args.rank - 1;
    index[d] += count;
    offset += count * args.stride[d];
    while (d > 0 && index[d] == args.size[d].divisor) {
      offset += args.stride[d - 1] - args.size[d].divisor * args.stride[d];
      index[d] = 0;
      index[--d] += 1;
    }
  }
};

// Item i owns elements V*i ... V*i + V - 1 of the result.
template <class T, int V>
struct ReluBackward {
  ReluBackwardArgs<T> args;
  bool aligned;  // grad and out start at an address that a pack may have; matters to the GPU only

  CONVVIZ_HD void operator()(int64_t i) const {
    StridedPosition position;
    position.set(args, i * V);
    (*this)(i, position);
  }

  // Leaves the position at the next item's first element.
  CONVVIZ_HD void operator()(int64_t i, StridedPosition& position) const {
    const int64_t first = i * V, left = args.numel - first;
    const int inner = args.rank - 1;
    const int64_t stride = args.stride[inner];
    if (aligned && left >= V && (stride == 0 || stride == 1) &&
        position.index[inner] + V <= args.size[inner].divisor &&
        (!CONVVIZ_ALIGNED_PACKS || stride == 0 || position.offset % V == 0)) {
      T values[V];
      if (stride == 1) {
        load_pack(args.grad + position.offset, values);
      } else {
        const T value = args.grad[position.offset];
        CONVVIZ_LANES
        for (int l = 0; l < V; ++l) values[l] = value;
      }
      position.advance(args, V);
      gate(first, values);
      store_pack(args.out + first, values);
      return;
    }
    T values[V];
    const int64_t count = min_of<int64_t>(V, left);
    for (int64_t done = 0; done < count;) {
      const int64_t run = min_of(count - done, args.size[inner].divisor - position.index[inner]);
      for (int64_t l = 0; l < run; ++l) values[done + l] = args.grad[position.offset + l * stride];
      position.advance(args, run);
      done += run;
    }
    if (count == V) {
      gate(first, values);
      for (int l = 0; l < V; ++l) args.out[first + l] = values[l];
    } else {
      for (int64_t l = 0; l < count; ++l) args.out[first + l] = gated(bit(first + l), values[l]);
    }
  }

  CONVVIZ_HD int bit(int64_t element) const {
    const int64_t at = args.numel == args.mask_numel.divisor ? element : element % args.mask_numel.divisor;
    return (args.mask[at >> 3] >> (at & 7)) & 1;
  }

  // V elements from `first` on. Their bits are whole bytes of the mask, except where a repeat starts within a
  // byte.
  CONVVIZ_HD void gate(int64_t first, T (&values)[V]) const {
    int64_t at = first;
    if (args.numel != args.mask_numel.divisor) {
      if (args.mask_numel.divisor % 8 != 0) {
        for (int l = 0; l < V; ++l) values[l] = gated(bit(first + l), values[l]);
        return;
      }
      int64_t repeat = first;
      at = args.mask_numel.split(repeat);
    }
    constexpr int kWord =
        V < 32 ? V : 32;  // bits that are handled together; a loop of 8 would not become vectors
    for (int start = 0; start < V; start += kWord) {
      uint32_t bits = 0;
      CONVVIZ_LANES
      for (int b = 0; b < kWord / 8; ++b) {
        bits |= static_cast<uint32_t>(args.mask[at >> 3]) << (8 * b);
        at = at + 8 == args.mask_numel.divisor ? 0 : at + 8;
      }
      CONVVIZ_LANES
      for (int l = 0; l < kWord; ++l) {
        values[start + l] = gated(static_cast<int>(bits & (UINT32_C(1) << l)), values[start + l]);
      }
    }
  }

  CONVVIZ_HD T gated(int alive, T signal) const {
    return args.rule.stops(alive, to_acc(signal)) ? static_cast<T>(acc_t<T>(0)) : signal;
  }
};

// Elements of a block on the CPU: enough to fill the widest vectors, of bytes too.
constexpr int kReluBlock = 64;

// Blocks of the output, begin <= block < end.
template <class T>
void relu_cpu(const ReluArgs<T>& args, int64_t begin, int64_t end);
template <class T>
void relu_backward_cpu(const ReluBackwardArgs<T>& args, int64_t begin, int64_t end);

// Enqueue on the CUDA stream and return CUDA's error code.
template <class T>
int relu_cuda(const ReluArgs<T>& args, void* stream);
template <class T>
int relu_backward_cuda(const ReluBackwardArgs<T>& args, void* stream);

}  // namespace convviz
