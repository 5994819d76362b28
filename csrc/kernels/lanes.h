// Vectors of floats for the CPU's convolutions, whose sums stay in registers.
#pragma once

#include <memory>
#include <new>

#include "kernels/types.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are returned by functions that are inlined
#endif

// All sums of a product must stay in registers.
#if defined(__GNUC__) && !defined(__clang__)
#define CONVVIZ_ROWS _Pragma("GCC unroll 16")
#else
#define CONVVIZ_ROWS _Pragma("unroll")
#endif

namespace convviz {

// Results whose weights lie together in a packed weight; what is beyond the last result is 0.
constexpr int64_t kResultBlock = 32;

// A vector of W floats, at any address.
template <int W>
struct Lanes {
  typedef float Pack __attribute__((vector_size(W * sizeof(float))));
  typedef float Loose __attribute__((vector_size(W * sizeof(float)), aligned(sizeof(float)), may_alias));
  static CONVVIZ_HD Pack load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
  static CONVVIZ_HD void store(float* to, const Pack& value) { *reinterpret_cast<Loose*>(to) = value; }
};

// One float, of what is left over.
template <>
struct Lanes<1> {
  using Pack = float;
  static CONVVIZ_HD float load(const float* from) { return *from; }
  static CONVVIZ_HD void store(float* to, float value) { *to = value; }
};

// Scratch that begins where a vector of any width may: an unaligned one is in two lines of the cache.
struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], Free>;
inline Floats floats(int64_t count) {
  return Floats(static_cast<float*>(
      ::operator new[](static_cast<size_t>(count) * sizeof(float), std::align_val_t{64})));
}

// Choices of a kind that leaves NaN as it is.
template <class V>
CONVVIZ_HD V clamped_lanes(V value, V low, V high) {
  value = value <= low ? low : value;
  return value >= high ? high : value;
}

}  // namespace convviz
