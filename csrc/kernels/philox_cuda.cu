#include "kernels/launch.cuh"
#include "kernels/philox.h"

namespace convviz {

int philox_cuda(const Philox& args, int64_t items, void* stream) {
  return launch(args, items, stream);
}

}  // namespace convviz
