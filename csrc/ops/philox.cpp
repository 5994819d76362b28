#include "kernels/philox.h"

#include "ops/tensor.h"

namespace convviz {
namespace {

// seed and block are unsigned numbers of 64 bits, given by those bits.
Tensor philox(Tensor streams, int64_t words, int64_t seed, int64_t block) {
  const char* op = "philox";
  STD_TORCH_CHECK(streams.scalar_type() == ScalarType::Long && streams.dim() == 1 && streams.is_contiguous(),
                  op, ": streams must be contiguous int64 of 1 dimension.");
  STD_TORCH_CHECK(words >= 0, op, ": words must be at least 0.");
  const int64_t count = streams.size(0);
  const Tensor out = empty_strided({count, words}, {words, 1}, ScalarType::Long, streams);
  if (out.numel() == 0) return out;
  const int64_t blocks = ceil_div(words, 4);
  const Philox args{read<int64_t>(streams), write<int64_t>(out),         words,
                    Divider(blocks),        static_cast<uint64_t>(seed), static_cast<uint64_t>(block)};
  if (out.is_cuda()) {
    on_cuda(out, op,
            [&](void* stream) { return CONVVIZ_CUDA_CALL(philox_cuda(args, count * blocks, stream)); });
  } else {
    parallel(count * blocks, 32, [&](int64_t begin, int64_t end) { philox_cpu(args, begin, end); });
  }
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("philox", TORCH_BOX(&philox));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
