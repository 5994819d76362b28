// Between torch's stable tensors and the kernels' pointers: checks, allocation, dispatch by dtype and device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels/types.h"

namespace convviz {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) with the storage type T of a floating dtype.
template <class F>
void with_dtype(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(Tag<double>{});
    case ScalarType::Float:
      return f(Tag<float>{});
    case ScalarType::Half:
      return f(Tag<Half>{});
    case ScalarType::BFloat16:
      return f(Tag<BFloat16>{});
    default:
      STD_TORCH_CHECK(false, op, " serves float64, float32, float16 and bfloat16, not dtype code ",
                      static_cast<int>(dtype), ".");
  }
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType dtype, const Tensor& like) {
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, device_type, device_index,
                                                         &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}
inline std::vector<int64_t> strides_of(const Tensor& t) {
  return {t.strides().begin(), t.strides().end()};
}

inline int64_t product(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

// Dimensions from the outermost in memory to the innermost. Those of size 1 are left out: their stride means
// nothing.
inline std::vector<size_t> memory_order(const std::vector<int64_t>& sizes,
                                        const std::vector<int64_t>& strides) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

// Whether the elements fill their memory, each place once.
inline bool is_dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (product(sizes) == 0) return true;
  const std::vector<size_t> order = memory_order(sizes, strides);
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (strides[order[i]] != expected) return false;
    expected *= sizes[order[i]];
  }
  return true;
}

// The two layouts of an image batch. Where sizes of 1 make a tensor both, it is contiguous.
enum class ImageLayout { kContiguous, kChannelsLast };

inline std::vector<int64_t> image_strides(const std::vector<int64_t>& size, ImageLayout layout) {
  const int64_t c = size[1], h = size[2], w = size[3];
  if (layout == ImageLayout::kContiguous) return {c * h * w, h * w, w, 1};
  return {h * w * c, 1, w * c, c};
}

inline ImageLayout image_layout(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must have 4 dimensions, got ", t.dim(), ".");
  const std::vector<int64_t> size = sizes_of(t), stride = strides_of(t);
  if (product(size) == 0) {
    return t.is_contiguous() ? ImageLayout::kContiguous : ImageLayout::kChannelsLast;
  }
  for (const ImageLayout layout : {ImageLayout::kContiguous, ImageLayout::kChannelsLast}) {
    const std::vector<int64_t> expected = image_strides(size, layout);
    bool same = true;
    for (size_t d = 0; d < 4; ++d) same = same && (size[d] == 1 || stride[d] == expected[d]);
    if (same) return layout;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be contiguous or channels_last.");
  return ImageLayout::kContiguous;
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Runs f(begin, end) over [0, count) on torch's threads; `work` is about how many elements one item moves.
template <class F>
void parallel(int64_t count, int64_t work, const F& f) {
  constexpr int64_t kWorthAThread = 32768;
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, work)), f);
}

// Runs f(stream) on the tensor's device, with its current stream, and turns a launch error into an exception.
template <class F>
void on_cuda(const Tensor& t, const char* op, const F& f) {
#if defined(CONVVIZ_WITH_CUDA)
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  const int code = f(stream);
  STD_TORCH_CHECK(code == 0, op, ": the CUDA launch failed with error code ", code, ".");
#else
  static_cast<void>(t);
  static_cast<void>(f);
  STD_TORCH_CHECK(false, op, ": this build has no CUDA kernels.");
#endif
}

// A launcher's call, in builds that have launchers.
#if defined(CONVVIZ_WITH_CUDA)
#define CONVVIZ_CUDA_CALL(call) (call)
#else
#define CONVVIZ_CUDA_CALL(call) (static_cast<void>(stream), 0)
#endif

// Registers a file's ops for the devices of this build, through its function on the library.
#if defined(CONVVIZ_WITH_CUDA)
#define CONVVIZ_IMPLEMENT(implement)            \
  STABLE_TORCH_LIBRARY_IMPL(convviz, CPU, m) {  \
    implement(m);                               \
  }                                             \
  STABLE_TORCH_LIBRARY_IMPL(convviz, CUDA, m) { \
    implement(m);                               \
  }
#else
#define CONVVIZ_IMPLEMENT(implement)           \
  STABLE_TORCH_LIBRARY_IMPL(convviz, CPU, m) { \
    implement(m);                              \
  }
#endif

inline void check_same_device(const Tensor& a, const Tensor& b, const char* op) {
  STD_TORCH_CHECK(a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(), op,
                  ": all tensors must be on the same device.");
}

}  // namespace convviz
