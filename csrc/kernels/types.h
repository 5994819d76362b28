// What every kernel shares: the host-device macro, storage types, the type sums are kept in, packs of
// elements.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(CONVVIZ_CUDA_ON_HOST)
#include "cuda_on_host.h"
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__CUDACC__)
#define CONVVIZ_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Forced, so that a functor is compiled again, with wider vectors, inside each clone of isa.h.
#define CONVVIZ_HD inline __attribute__((always_inline))
#else
#define CONVVIZ_HD inline
#endif

// CONVVIZ_LANES stands before a loop over lanes, CONVVIZ_UNROLL before other short loops. On the GPU an array
// that is indexed by a loop counter must not end up in local memory, so both are unrolled. GCC must not
// unroll a loop that it is to make vectors of, but then has to unroll those around it to keep the vectors in
// registers.
#if defined(__CUDA_ARCH__)
#define CONVVIZ_LANES _Pragma("unroll")
#define CONVVIZ_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define CONVVIZ_LANES _Pragma("GCC unroll 1")
#define CONVVIZ_UNROLL _Pragma("GCC unroll 8")
#else
#define CONVVIZ_LANES
#define CONVVIZ_UNROLL
#endif

namespace convviz {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

template <class T>
struct Acc {
  using type = float;
  using index = int32_t;  // an integer as wide as the accumulator: lanes of both fill the same registers
};
template <>
struct Acc<double> {
  using type = double;
  using index = int64_t;
};
template <class T>
using acc_t = typename Acc<T>::type;
template <class T>
using lane_index_t = typename Acc<T>::index;

template <class T>
CONVVIZ_HD acc_t<T> to_acc(T value) {
  return static_cast<acc_t<T>>(value);
}

CONVVIZ_HD int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
template <class T>
CONVVIZ_HD T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
CONVVIZ_HD T max_of(T a, T b) {
  return a < b ? b : a;
}

// Division by a number that is known before the kernel starts. Processors divide integers by a long routine;
// for indices below 2^31, which is nearly every tensor, a multiplication does (Granlund and Montgomery, PLDI
// 1994, figure 4.1).
struct Divider {
  int64_t divisor;
  uint32_t multiplier, shift;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(d), multiplier(0), shift(0) {
    if (d < 1 || d > INT32_MAX) return;
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

  // index >= 0
  CONVVIZ_HD int64_t quotient(int64_t index) const {
    if ((static_cast<uint64_t>(index | divisor) >> 31) == 0) {
      const uint32_t i = static_cast<uint32_t>(index);
      const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(i) * multiplier) >> 32);
      return (high + i) >> shift;
    }
    return index / divisor;
  }

  // index becomes its quotient; returns the remainder.
  CONVVIZ_HD int64_t split(int64_t& index) const {
    const int64_t q = quotient(index), remainder = index - q * divisor;
    index = q;
    return remainder;
  }
};

// V elements, moved at once. Vectors of at most 16 bytes on the GPU, which is its widest load; the CPU's
// compiler takes the width of the instruction set it compiles for and needs no alignment.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T lane[V];
};

// Whether a pack may start at this address, as the GPU sees it.
template <int V, class T>
CONVVIZ_HD bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T, V>) == 0;
}

// Whether packs go through one aligned vector access: on the GPU, and where the host stands in for it in the
// tests.
#if defined(__CUDA_ARCH__) || defined(CONVVIZ_CUDA_ON_HOST)
#define CONVVIZ_ALIGNED_PACKS 1
#else
#define CONVVIZ_ALIGNED_PACKS 0
#endif

// The tests' stand-in for the GPU refuses a vector access that the GPU would refuse.
#if !defined(CONVVIZ_CUDA_ON_HOST)
#define CONVVIZ_CHECK_ALIGNED(pointer, alignment)
#endif

// On the CPU. A block that fills several registers is copied as the loops around it are vectorised: with
// memcpy GCC takes its widest registers, and a wide load of what was just written by narrow stores has to
// wait for all of them.
template <int V, class T>
CONVVIZ_HD void copy_lanes(const T* from, T* to) {
  if (sizeof(T) * V <= 64) {
    std::memcpy(to, from, sizeof(T) * V);
  } else {
    CONVVIZ_LANES
    for (int l = 0; l < V; ++l) to[l] = from[l];
  }
}

template <int V, class T>
CONVVIZ_HD void load_pack(const T* from, T (&to)[V]) {
#if CONVVIZ_ALIGNED_PACKS
  CONVVIZ_CHECK_ALIGNED(from, alignof(Pack<T, V>));
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
  CONVVIZ_LANES
  for (int l = 0; l < V; ++l) to[l] = pack.lane[l];
#else
  copy_lanes<V>(from, to);
#endif
}

template <int V, class T>
CONVVIZ_HD void store_pack(T* to, const T (&from)[V]) {
#if CONVVIZ_ALIGNED_PACKS
  CONVVIZ_CHECK_ALIGNED(to, alignof(Pack<T, V>));
  Pack<T, V> pack;
  CONVVIZ_LANES
  for (int l = 0; l < V; ++l) pack.lane[l] = from[l];
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
#else
  copy_lanes<V>(from, to);
#endif
}

// Lanes of one GPU vector: 16 bytes.
template <class T>
constexpr int kGpuLanes = static_cast<int>(16 / sizeof(T));

// Lanes of one CPU block: one 64-byte register of accumulators.
template <class T>
constexpr int kCpuLanes = static_cast<int>(64 / sizeof(acc_t<T>));

}  // namespace convviz
