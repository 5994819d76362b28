#include "kernels/mask_images.h"

#include "ops/window_sources.h"

namespace convviz {
namespace {

struct Sampling {
  double scale_h, scale_w, shift_h, shift_w;
};

void check_count(const Tensor& t, int64_t columns, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == columns * count,
                  op, ": ", name, " must be contiguous int64, ", columns, " for each of ", count, " masks.");
}

void run(const Tensor& out, const Tensor& images, const Tensor& grids, const Tensor& image,
         const Tensor& offsets, const Sampling& sampling, const char* op) {
  STD_TORCH_CHECK(images.dim() == 4 && out.dim() == 4 && grids.dim() == 3 && grids.is_contiguous(), op,
                  ": images must have 4 dimensions, and grids 3, contiguous.");
  const int64_t count = grids.size(0);
  check_count(image, 1, count, op, "image");
  check_count(offsets, 2, count, op, "offsets");
  for (const Tensor* t : {&out, &grids, &image, &offsets}) check_same_device(*t, images, op);
  STD_TORCH_CHECK(out.scalar_type() == images.scalar_type() && grids.scalar_type() == images.scalar_type(),
                  op, ": out, images and grids must have one dtype.");
  STD_TORCH_CHECK(out.size(0) == count && out.size(1) == images.size(1) && out.size(2) == images.size(2) &&
                      out.size(3) == images.size(3),
                  op, ": out must have one image for each mask.");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(images.size(0) > 0 && grids.numel() > 0, op, ": there must be an image and a grid's cell.");
  const bool contiguous =
      has_layout(out, ImageLayout::kContiguous) && has_layout(images, ImageLayout::kContiguous);
  STD_TORCH_CHECK(contiguous || (has_layout(out, ImageLayout::kChannelsLast) &&
                                 has_layout(images, ImageLayout::kChannelsLast)),
                  op, ": out and images must both be contiguous or both channels_last.");
  with_dtype(out.scalar_type(), op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskImagesArgs<T> args{read<T>(images),
                                 read<T>(grids),
                                 read<int64_t>(image),
                                 read<int64_t>(offsets),
                                 write<T>(out),
                                 images.size(0),
                                 count,
                                 out.size(1),
                                 out.size(2),
                                 out.size(3),
                                 {grids.size(1), sampling.scale_h, sampling.shift_h},
                                 {grids.size(2), sampling.scale_w, sampling.shift_w}};
    if (out.is_cuda()) {
      on_cuda(out, op,
              [&](void* stream) { return CONVVIZ_CUDA_CALL(mask_images_cuda(args, !contiguous, stream)); });
    } else {
      parallel(count * args.height, 2 * args.channels * args.width,
               [&](int64_t begin, int64_t end) { mask_images_cpu(args, !contiguous, begin, end); });
    }
  });
}

Tensor mask_images(Tensor images, Tensor grids, Tensor image, Tensor offsets, double scale_h, double scale_w,
                   double shift_h, double shift_w) {
  const char* op = "mask_images";
  STD_TORCH_CHECK(images.dim() == 4 && grids.dim() == 3, op, ": images must have 4 dimensions and grids 3.");
  std::vector<int64_t> size = sizes_of(images);
  size[0] = grids.size(0);
  const Tensor out =
      empty_strided(size, image_strides(size, layout_of(images, images)), images.scalar_type(), images);
  run(out, images, grids, image, offsets, {scale_h, scale_w, shift_h, shift_w}, op);
  return out;
}

void mask_images_(Tensor out, Tensor images, Tensor grids, Tensor image, Tensor offsets, double scale_h,
                  double scale_w, double shift_h, double shift_w) {
  run(out, images, grids, image, offsets, {scale_h, scale_w, shift_h, shift_w}, "mask_images_");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("mask_images", TORCH_BOX(&mask_images));
  m.impl("mask_images_", TORCH_BOX(&mask_images_));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
