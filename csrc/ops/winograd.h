// What the ops of Winograd's convolutions check alike.
#pragma once

#include "ops/convolution.h"

namespace convviz {

// Height and width of the result of a 3x3 convolution with stride 1 over x, which must be channels_last.
inline std::pair<int64_t, int64_t> convolved_size(const Tensor& x, const std::vector<int64_t>& padding,
                                                  const char* op) {
  check_channels_last(x, op, "x");
  STD_TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, op,
                  ": padding must be two integers.");
  const int64_t height = x.size(2) + 2 * padding[0] - 2, width = x.size(3) + 2 * padding[1] - 2;
  STD_TORCH_CHECK(height >= 1 && width >= 1, op, ": the input with its padding must be at least 3x3.");
  return {height, width};
}

}  // namespace convviz
