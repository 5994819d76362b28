// A convolution without padding over channels_last images, as it is defined, for the CPU in float32: the sums
// of some pixels and some results stay in registers until they are complete.
#pragma once

#include "kernels/lanes.h"

namespace convviz {

struct DirectConvArgs {
  const float* x;       // [N, H, W, C]: channels_last
  const float* weight;  // [ceil(K / 32), kernel_h * kernel_w * C, 32]
  const float* bias;    // [K] or null
  float* out;           // [N, h, w, K], pixels `step` apart
  int64_t channels, results, height, width, out_height, out_width, kernel_h, kernel_w, stride_h, stride_w,
      step;
  float low, high;
};

// The result in segments of successive pixels.
int64_t direct_conv_segments(const DirectConvArgs& args, int64_t images);
void direct_conv_cpu(const DirectConvArgs& args, int64_t images, int64_t begin, int64_t end);

}  // namespace convviz
