// A whole 3x3 convolution with stride 1 by F(2x2, 3x3) (winograd.h), for the CPU in float32: some tiles at a
// time are transformed, multiplied and brought back while they are in the nearest caches. The matrix products
// are done here, because a library's would have to write all products to memory: four times the bytes of the
// result.
#pragma once

#include "kernels/lanes.h"

namespace convviz {

struct WinogradConvArgs {
  const float* x;       // [N, H, W, C]: channels_last
  const float* weight;  // [ceil(K / 32), 16, C, 32]
  const float* bias;    // [K] or null
  float* out;           // [N, h, w, K], pixels `step` apart
  int64_t channels, results, height, width, out_height, out_width, pad_h, pad_w, step;
  float low, high;
};

// Weights in Winograd's domain, packed; also those of the convolution's data gradient (`flipped`), which is a
// convolution with the filters turned around and the channels' roles exchanged.
struct WinogradPackArgs {
  const float* weight;  // of `results` filters of `channels` planes, with these strides
  float* out;           // [ceil(results / 32), 16, channels, 32]
  int64_t channels, results, result_stride, channel_stride, row_stride, col_stride;
  bool flipped;
};

int64_t winograd_pack_items(const WinogradPackArgs& args);
void winograd_pack_cpu(const WinogradPackArgs& args, int64_t begin, int64_t end);

// Tiles n * rows * cols + row * cols + col of the result.
void winograd_conv_cpu(const WinogradConvArgs& args, int64_t begin, int64_t end);

}  // namespace convviz
