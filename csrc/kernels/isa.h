// Runs a loop with the widest vectors that this processor has: one portable build, fast everywhere.
#pragma once

#include "kernels/types.h"

namespace convviz {

// The loop that calls a functor for each item.
template <class Item>
struct EachItem {
  Item item;
  CONVVIZ_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) item(i);
  }
};

// The loop is a functor without a target of its own. `flatten` inlines it and all it calls into each wrapper
// below, and the vectoriser, which runs after inlining, then uses that wrapper's instructions.
#if defined(__x86_64__) && defined(__GNUC__)

// Registers of 32 bytes: 64 gain nothing where memory is the limit, and GCC mixes both widths to its own
// harm.
#if defined(__clang__)
#define CONVVIZ_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2,f16c"
#else
#define CONVVIZ_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2,f16c,prefer-vector-width=256"
#endif

template <class Loop>
__attribute__((target(CONVVIZ_AVX512), flatten)) void run_avx512(const Loop& loop, int64_t begin,
                                                                 int64_t end) {
  loop(begin, end);
}

template <class Loop>
__attribute__((target("avx2,fma,bmi,bmi2,f16c"), flatten)) void run_avx2(const Loop& loop, int64_t begin,
                                                                         int64_t end) {
  loop(begin, end);
}

inline int vector_level() {
  static const int level = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
      return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
               ? 2
               : 1;
  }();
  return level;
}

template <class Loop>
void run_widest(const Loop& loop, int64_t begin, int64_t end) {
  switch (vector_level()) {
    case 2:
      return run_avx512(loop, begin, end);
    case 1:
      return run_avx2(loop, begin, end);
    default:
      return loop(begin, end);
  }
}

#else

template <class Loop>
void run_widest(const Loop& loop, int64_t begin, int64_t end) {
  loop(begin, end);
}

#endif

}  // namespace convviz
