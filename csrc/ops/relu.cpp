#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "kernels/relu.h"
#include "ops/tensor.h"

namespace convviz {
namespace {

Tensor forward(const Tensor& x, const Tensor& out, double lower, std::optional<double> upper) {
  const int64_t numel = x.numel();
  Tensor mask = empty_strided({ceil_div(numel, 8)}, {1}, ScalarType::Byte, x);
  if (numel == 0) return mask;
  STD_TORCH_CHECK(is_dense(sizes_of(x), strides_of(x)), "relu: x must be non-overlapping and dense.");
  with_dtype(x.scalar_type(), "relu", [&](auto tag) {
    using T = typename decltype(tag)::type;
    // The bounds as the accumulator holds them, which is what PyTorch compares with; the output takes them
    // rounded to the dtype.
    const acc_t<T> none = std::numeric_limits<acc_t<T>>::quiet_NaN();
    const ReluArgs<T> args{read<T>(x),
                           write<T>(out),
                           write<uint8_t>(mask),
                           numel,
                           static_cast<acc_t<T>>(lower),
                           upper ? static_cast<acc_t<T>>(*upper) : none};
    if (x.is_cuda()) {
      on_cuda(x, "relu", [&](void* stream) { return CONVVIZ_CUDA_CALL(relu_cuda(args, stream)); });
    } else {
      parallel(ceil_div(numel, kReluBlock), kReluBlock,
               [&](int64_t begin, int64_t end) { relu_cpu(args, begin, end); });
    }
  });
  return mask;
}

std::tuple<Tensor, Tensor> relu(Tensor x, double lower, std::optional<double> upper) {
  Tensor out = empty_strided(sizes_of(x), strides_of(x), x.scalar_type(), x);
  Tensor mask = forward(x, out, lower, upper);
  return {out, mask};
}

Tensor relu_(Tensor x, double lower, std::optional<double> upper) {
  return forward(x, x, lower, upper);
}

// Describes the gradient's elements in the memory order of the forward's output. False if that takes more
// dimensions than the kernel has.
template <class T>
bool set_geometry(ReluBackwardArgs<T>& args, const std::vector<int64_t>& size,
                  const std::vector<int64_t>& order_stride, const std::vector<int64_t>& grad_stride) {
  std::vector<int64_t> sizes, strides;
  for (const size_t d : memory_order(size, order_stride)) {
    if (!sizes.empty() && strides.back() == size[d] * grad_stride[d]) {
      sizes.back() *= size[d];
      strides.back() = grad_stride[d];
    } else {
      sizes.push_back(size[d]);
      strides.push_back(grad_stride[d]);
    }
  }
  if (sizes.empty()) {
    sizes.push_back(1);
    strides.push_back(1);
  }
  if (sizes.size() > kMaxRank) return false;
  args.rank = static_cast<int>(sizes.size());
  for (int d = 0; d < args.rank; ++d) {
    args.size[d] = Divider(sizes[d]);
    args.stride[d] = strides[d];
  }
  return true;
}

Tensor relu_backward(Tensor grad, Tensor mask, std::vector<int64_t> size, std::vector<int64_t> stride,
                     int64_t rule) {
  const std::vector<int64_t> grad_size = sizes_of(grad);
  STD_TORCH_CHECK(size.size() == stride.size() && size.size() == grad_size.size(),
                  "relu_backward: grad, size and stride must have the same number of dimensions.");
  STD_TORCH_CHECK(rule >= 0 && rule <= 3, "relu_backward: the rule must be 0, 1, 2 or 3, got ", rule, ".");
  const int64_t mask_numel = product(size), numel = grad.numel();
  STD_TORCH_CHECK(is_dense(size, stride),
                  "relu_backward: the forward's output must be non-overlapping and dense.");

  // With several gradients for one forward, the batch dimension repeats and everything in memory beyond it
  // does not.
  const bool repeats = grad_size != size;
  std::vector<int64_t> out_stride = stride;
  if (repeats) {
    STD_TORCH_CHECK(!size.empty(), "relu_backward: a scalar cannot repeat.");
    for (size_t d = 1; d < size.size(); ++d) {
      STD_TORCH_CHECK(grad_size[d] == size[d], "relu_backward: grad and size differ in dimension ", d, ".");
      STD_TORCH_CHECK(size[0] <= 1 || size[d] <= 1 || stride[0] >= stride[d],
                      "relu_backward: the batch dimension must be outermost in memory.");
    }
    STD_TORCH_CHECK(size[0] > 0 ? grad_size[0] % size[0] == 0 : grad_size[0] == 0,
                    "relu_backward: grad's batch must be a multiple of ", size[0], ", got ", grad_size[0],
                    ".");
    out_stride[0] = size[0] > 0 ? mask_numel / size[0] : 1;
  }
  Tensor out = empty_strided(grad_size, out_stride, grad.scalar_type(), grad);
  if (numel == 0) return out;
  check_same_device(grad, mask, "relu_backward");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      mask.numel() == ceil_div(mask_numel, 8),
                  "relu_backward: the mask must be contiguous uint8 with one bit an element.");
  with_dtype(grad.scalar_type(), "relu_backward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    ReluBackwardArgs<T> args{};
    args.grad = read<T>(grad);
    args.mask = read<uint8_t>(mask);
    args.out = write<T>(out);
    args.numel = numel;
    args.mask_numel = Divider(mask_numel);
    args.rule = make_rule<acc_t<T>>(static_cast<RuleCode>(rule));
    if (!set_geometry(args, grad_size, out_stride, strides_of(grad))) {
      // Strides as wild as these are nobody's hot path: put the gradient in order, then gate it in place.
      torch::stable::copy_(out, grad);
      args.grad = read<T>(out);
      set_geometry(args, grad_size, out_stride, out_stride);
    }
    if (grad.is_cuda()) {
      on_cuda(grad, "relu_backward",
              [&](void* stream) { return CONVVIZ_CUDA_CALL(relu_backward_cuda(args, stream)); });
    } else {
      parallel(ceil_div(numel, kReluBlock), kReluBlock,
               [&](int64_t begin, int64_t end) { relu_backward_cpu(args, begin, end); });
    }
  });
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("relu", TORCH_BOX(&relu));
  m.impl("relu_", TORCH_BOX(&relu_));
  m.impl("relu_backward", TORCH_BOX(&relu_backward));
}

}  // namespace

CONVVIZ_IMPLEMENT(implement)

}  // namespace convviz
