// The only place that launches a kernel.
#pragma once

#if defined(CONVVIZ_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include "kernels/types.h"

namespace convviz {

#if !defined(CONVVIZ_CUDA_ON_HOST)
constexpr int kBlockSize = 256;
constexpr int64_t kMaxBlocks = int64_t{1} << 24;
#endif

// One item a thread; the step is taken only where the grid was capped.
template <class Functor>
__global__ void __launch_bounds__(kBlockSize) for_each_item(Functor functor, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    functor(i);
}

// Calls functor(0) ... functor(count - 1), each in a thread of its own, on the stream. Returns CUDA's error
// code: 0 is success. Nothing is launched for count 0, which CUDA would refuse.
template <class Functor>
int launch(const Functor& functor, int64_t count, void* stream) {
  if (count <= 0) return 0;
  const unsigned blocks = static_cast<unsigned>(min_of(ceil_div(count, kBlockSize), kMaxBlocks));
#if defined(CONVVIZ_CUDA_ON_HOST)
  static_cast<void>(stream);
  cuda_on_host::run(blocks, kBlockSize, [&] { for_each_item(functor, count); });
  return 0;
#else
  for_each_item<<<blocks, kBlockSize, 0, static_cast<cudaStream_t>(stream)>>>(functor, count);
  return static_cast<int>(cudaGetLastError());
#endif
}

}  // namespace convviz
