#include "kernels/philox.h"

#include "kernels/isa.h"

namespace convviz {

void philox_cpu(const Philox& args, int64_t begin, int64_t end) {
  run_widest(EachItem<Philox>{args}, begin, end);
}

}  // namespace convviz
