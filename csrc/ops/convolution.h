// What the CPU's convolutions check alike, and where their results lie.
#pragma once

#include <optional>

#include "kernels/lanes.h"
#include "ops/tensor.h"

namespace convviz {

inline void check_float32(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32.");
}

inline const float* bias_of(const std::optional<Tensor>& bias, int64_t results, const char* op) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == results && bias->is_contiguous() &&
                      bias->scalar_type() == ScalarType::Float,
                  op, ": bias must be contiguous, one a result, float32.");
  return read<float>(*bias);
}

// A single channel or pixel makes a tensor both contiguous and channels_last, which is then the same memory.
inline void check_channels_last(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(image_layout(t, op, name) == ImageLayout::kChannelsLast || t.size(1) == 1 ||
                      t.size(2) * t.size(3) == 1 || t.numel() == 0,
                  op, ": ", name, " must be channels_last.");
}

// A new result, channels_last.
inline Tensor empty_result(const Tensor& x, int64_t results, int64_t height, int64_t width) {
  const std::vector<int64_t> shape{x.size(0), results, height, width};
  return empty_strided(shape, image_strides(shape, ImageLayout::kChannelsLast), x.scalar_type(), x);
}

// The first of the channels `channel` to `channel + results` of a result that is there.
inline float* channels_of(const Tensor& out, const Tensor& x, int64_t channel, int64_t results,
                          int64_t height, int64_t width, const char* op) {
  check_float32(out, op, "out");
  check_channels_last(out, op, "out");
  STD_TORCH_CHECK(out.size(0) == x.size(0) && out.size(2) == height && out.size(3) == width && channel >= 0 &&
                      results >= 0 && channel + results <= out.size(1),
                  op, ": out must have the result's size, and the channels in which it is to lie.");
  return write<float>(out) + channel;
}

}  // namespace convviz
