// Tensors to what the window kernels read: checks of all that a kernel relies on, views and tables.
#pragma once

#include <limits>
#include <optional>

#include "kernels/window_sources.h"
#include "ops/tensor.h"

namespace convviz {

inline bool has_layout(const Tensor& t, ImageLayout layout) {
  const std::vector<int64_t> size = sizes_of(t), stride = strides_of(t),
                             expected = image_strides(size, layout);
  for (size_t d = 0; d < 4; ++d) {
    if (size[d] != 1 && stride[d] != expected[d]) return false;
  }
  return true;
}

// The layout of `first`, or of `second` where both are true of it: of one pixel, of one channel, of nothing.
inline ImageLayout layout_of(const Tensor& first, const Tensor& second) {
  for (const Tensor* t : {&first, &second}) {
    if (t->numel() == 0) continue;
    const bool contiguous = has_layout(*t, ImageLayout::kContiguous);
    const bool channels_last = has_layout(*t, ImageLayout::kChannelsLast);
    if (contiguous != channels_last) {
      return contiguous ? ImageLayout::kContiguous : ImageLayout::kChannelsLast;
    }
    if (!contiguous) break;
  }
  return ImageLayout::kContiguous;
}

inline void check_images(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must have 4 dimensions, got ", t.dim(), ".");
}

inline void check_same_kind(const Tensor& a, const Tensor& b, const char* op) {
  check_same_device(a, b, op);
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), op, ": all maps must have the same dtype.");
}

// The strides of sizes of 1 mean nothing; of one channel, they are those of channels that follow each other.
template <class T>
MapView<T> view(T* data, const Tensor& t) {
  return {data, t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), t.stride(2), t.stride(3)};
}

inline WindowTables make_tables(const Tensor& variants, const Tensor& rows, const Tensor& cols,
                                int64_t columns, const Tensor& base, const char* op) {
  for (const Tensor* table : {&variants, &rows, &cols}) {
    check_same_device(*table, base, op);
    STD_TORCH_CHECK(table->scalar_type() == ScalarType::Long && table->dim() == 2 && table->is_contiguous() &&
                        table->size(1) == (table == &variants ? 3 : columns),
                    op, ": variants must be int64 of 3 columns, rows and cols of ", columns,
                    ", all of them contiguous.");
  }
  STD_TORCH_CHECK(variants.size(0) == 0 || (base.size(0) > 0 && rows.size(0) > 0 && cols.size(0) > 0), op,
                  ": there are variants, but no images, rows or columns.");
  return {read<int64_t>(variants),
          read<int64_t>(rows),
          read<int64_t>(cols),
          base.size(0),
          rows.size(0),
          cols.size(0),
          columns};
}

inline void check_sources(const Tensor& base, const Tensor& patch, const Tensor& variants, const char* op) {
  check_images(base, op, "base");
  check_images(patch, op, "patch");
  check_same_kind(base, patch, op);
  STD_TORCH_CHECK(patch.size(0) == variants.size(0) && patch.size(1) == base.size(1), op,
                  ": patch must have as many variants as the table and as many channels as base.");
}

template <class T>
WindowSources<T> make_sources(const Tensor& base, const Tensor& patch, const WindowTables& tables) {
  return {view(read<T>(base), base),
          view(read<T>(patch), patch),
          base.size(2),
          base.size(3),
          patch.size(2),
          patch.size(3),
          tables};
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& patch, const char* op) {
  if (!bias) return;
  check_same_kind(*bias, patch, op);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == patch.size(1) && bias->is_contiguous(), op,
                  ": bias must have one number for each channel, contiguous.");
}

template <class T>
Activation<T> make_activation(const Tensor* bias, double low, double high) {
  using A = acc_t<T>;
  constexpr A inf = std::numeric_limits<A>::infinity();
  const A a = static_cast<A>(low), b = static_cast<A>(high);
  return {bias == nullptr ? nullptr : read<T>(*bias), a, b, bias == nullptr && a == -inf && b == inf};
}

inline void check_size(const std::vector<int64_t>& size, const char* op) {
  STD_TORCH_CHECK(size.size() == 2 && size[0] >= 0 && size[1] >= 0, op,
                  ": size must be two integers of at least 0.");
}

inline Tensor empty_images(const std::vector<int64_t>& size, ImageLayout layout, const Tensor& like) {
  return empty_strided(size, image_strides(size, layout), like.scalar_type(), like);
}

}  // namespace convviz
