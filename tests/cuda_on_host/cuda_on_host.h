// Stands in for the CUDA runtime, so that g++ compiles the .cu files and a kernel's threads run one after the
// other.
#pragma once

#include <cstdint>
#include <stdexcept>

#define __global__
#define __launch_bounds__(threads)

struct ThreadCoordinates {
  unsigned x;
};
inline thread_local ThreadCoordinates threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

namespace convviz {
// So small that ordinary inputs have short last blocks and make every thread take several steps.
constexpr int kBlockSize = 4;
constexpr int64_t kMaxBlocks = 3;
}  // namespace convviz

namespace cuda_on_host {

inline int64_t launches = 0, threads = 0;

template <class Kernel>
void run(unsigned blocks, unsigned block_size, const Kernel& kernel) {
  ++launches;
  gridDim.x = blocks;
  blockDim.x = block_size;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < block_size; ++threadIdx.x) {
      ++threads;
      kernel();
    }
  }
}

// A GPU stops with an error at a vector access to an address that is no multiple of the vector's size.
inline void check_aligned(const void* pointer, uintptr_t alignment) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    throw std::runtime_error("misaligned vector access");
}

}  // namespace cuda_on_host

#define CONVVIZ_CHECK_ALIGNED(pointer, alignment) cuda_on_host::check_aligned(pointer, alignment)
