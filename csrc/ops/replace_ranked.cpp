#include "kernels/replace_ranked.h"

#include "ops/window_sources.h"

namespace convviz {
namespace {

void check_table(const Tensor& t, int64_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == count, op, ": ",
                  name, " must be contiguous int64, one for each of ", count, " variants.");
}

void run(const Tensor& out, const Tensor& images, const Tensor& fills, const Tensor& ranks,
         const Tensor& image, const Tensor& low, const Tensor& high, const char* op) {
  STD_TORCH_CHECK(images.dim() == 4 && out.dim() == 4 && fills.dim() == 4, op,
                  ": images, fills and out must have 4 dimensions.");
  const int64_t count = image.numel();
  check_table(image, count, op, "image");
  check_table(low, count, op, "low");
  check_table(high, count, op, "high");
  for (const Tensor* t : {&out, &fills, &ranks, &image, &low, &high}) check_same_device(*t, images, op);
  STD_TORCH_CHECK(out.scalar_type() == images.scalar_type() && fills.scalar_type() == images.scalar_type(),
                  op, ": out, images and fills must have one dtype.");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(fills.size(d) == images.size(d) && out.size(d) == (d == 0 ? count : images.size(d)), op,
                    ": fills must have the images' shape, and out one image for each variant.");
  }
  STD_TORCH_CHECK(ranks.dim() == 3 && ranks.is_contiguous() && ranks.scalar_type() == ScalarType::Int &&
                      ranks.size(0) == images.size(0) && ranks.size(1) == images.size(2) &&
                      ranks.size(2) == images.size(3),
                  op, ": ranks must be contiguous int32, one for each pixel of the images.");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(images.size(0) > 0, op, ": there are variants, but no images.");
  const bool contiguous =
      has_layout(out, ImageLayout::kContiguous) && has_layout(images, ImageLayout::kContiguous);
  STD_TORCH_CHECK(contiguous || (has_layout(out, ImageLayout::kChannelsLast) &&
                                 has_layout(images, ImageLayout::kChannelsLast)),
                  op, ": out and images must both be contiguous or both channels_last.");
  // Strides of sizes of 1 mean nothing: they are what they would be in the images' layout.
  std::vector<int64_t> step =
      image_strides(sizes_of(images), contiguous ? ImageLayout::kContiguous : ImageLayout::kChannelsLast);
  for (size_t d = 0; d < 4; ++d) {
    if (fills.size(static_cast<int64_t>(d)) != 1) step[d] = fills.stride(static_cast<int64_t>(d));
  }
  with_dtype(out.scalar_type(), op, [&](auto tag) {
    using B = typename BitsOf<sizeof(typename decltype(tag)::type)>::type;
    const ReplaceRankedArgs<B> args{read<B>(images),
                                    read<B>(fills),
                                    read<int32_t>(ranks),
                                    read<int64_t>(image),
                                    read<int64_t>(low),
                                    read<int64_t>(high),
                                    write<B>(out),
                                    images.size(0),
                                    count,
                                    out.size(1),
                                    out.size(2),
                                    out.size(3),
                                    step[0],
                                    step[1],
                                    step[2],
                                    step[3]};
    if (out.is_cuda()) {
      on_cuda(out, op, [&](void* stream) {
        return CONVVIZ_CUDA_CALL(replace_ranked_cuda(args, !contiguous, stream));
      });
    } else {
      parallel(count * args.height, 2 * args.channels * args.width,
               [&](int64_t begin, int64_t end) { replace_ranked_cpu(args, !contiguous, begin, end); });
    }
  });
}

Tensor replace_ranked(Tensor images, Tensor fills, Tensor ranks, Tensor image, Tensor low, Tensor high) {
  const char* op = "replace_ranked";
  check_images(images, op, "images");
  std::vector<int64_t> size = sizes_of(images);
  size[0] = image.numel();
  const Tensor out = empty_images(size, layout_of(images, images), images);
  run(out, images, fills, ranks, image, low, high, op);
  return out;
}

void replace_ranked_(Tensor out, Tensor images, Tensor fills, Tensor ranks, Tensor image, Tensor low,
                     Tensor high) {
  run(out, images, fills, ranks, image, low, high, "replace_ranked_");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("replace_ranked", TORCH_BOX(&replace_ranked));
  m.impl("replace_ranked_", TORCH_BOX(&replace_ranked_));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
