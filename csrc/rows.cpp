#include "rows.h"

#include "device.h"
#include "ops.h"
#include "partials.h"

namespace gain_ops {

namespace {

Tensor scaled(
    const Arguments& arguments, const Tensor& x, const Tensor& delta, const std::optional<Tensor>& bias, bool by_row) {
  Tensor out = empty(x, {x.size(0), x.size(1)}, arguments.scalar_type());
  if (out.numel() == 0) return out;
  const ScaleRows problem{
      const_matrix(x),
      static_cast<const float*>(delta.const_data_ptr()),
      bias ? bias->const_data_ptr() : nullptr,
      matrix(out),
      x.size(0),
      x.size(1),
      by_row};
  const LaunchScope scope(arguments.device());
  const bool all = rows_aligned(x) && rows_aligned(out) && (by_row || aligned(delta)) && (!bias || aligned(*bias));
  const int width = vector_width(arguments.dtype(), problem.cols, all);
  launch_scale_rows(problem, arguments.dtype(), width, scope.stream());
  return out;
}

// ddelta, and dz written where it is given
Tensor reduced(const Arguments& arguments, const Tensor& dy, const Tensor& z, const Tensor* delta, const Tensor* dz) {
  const int64_t rows = dy.size(0), cols = dy.size(1);
  if (rows == 0 || cols == 0) return zeros(dy, {cols}, ScalarType::Float);
  const PartialLayout layout = row_partials(rows, cols);
  const Tensor partials = empty(dy, {layout.rows, layout.width}, ScalarType::Float);
  const Tensor sums = empty(dy, {cols}, ScalarType::Float);
  const BackwardRows problem{
      const_matrix(dy),
      const_matrix(z),
      delta ? static_cast<const float*>(delta->const_data_ptr()) : nullptr,
      dz ? matrix(*dz) : Matrix{nullptr, 0, 0},
      static_cast<float*>(partials.mutable_data_ptr()),
      rows,
      cols};
  const LaunchScope scope(arguments.device());
  const bool all = rows_aligned(dy) && rows_aligned(z) && (!dz || rows_aligned(*dz)) && (!delta || aligned(*delta));
  launch_backward_rows(problem, arguments.dtype(), vector_width(arguments.dtype(), cols, all), scope.stream());
  launch_sum_partials(problem.partials, layout, cols, static_cast<float*>(sums.mutable_data_ptr()), scope.stream());
  return sums;
}

}  // namespace

Tensor scale(const Tensor& x, const Tensor& delta, const std::optional<Tensor>& bias) {
  const Arguments arguments("gain_ops_cuda::scale", "x", x);
  arguments.vector("delta", delta, x.size(1), ScalarType::Float);
  if (bias) arguments.vector("bias", *bias, x.size(1), arguments.scalar_type());
  return scaled(arguments, x, delta, bias, false);
}

Tensor scale_rows(const Tensor& x, const Tensor& delta) {
  const Arguments arguments("gain_ops_cuda::scale_rows", "x", x);
  arguments.vector("delta", delta, x.size(0), ScalarType::Float);
  return scaled(arguments, x, delta, std::nullopt, true);
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& z, const Tensor& delta) {
  const Arguments arguments("gain_ops_cuda::backward", "dy", dy);
  arguments.matrix("z", z, dy.size(0), dy.size(1));
  arguments.vector("delta", delta, dy.size(1), ScalarType::Float);
  Tensor dz = empty(dy, {dy.size(0), dy.size(1)}, arguments.scalar_type());
  Tensor sums = reduced(arguments, dy, z, &delta, &dz);
  return {dz, sums};
}

Tensor ddelta(const Tensor& dy, const Tensor& z) {
  const Arguments arguments("gain_ops_cuda::ddelta", "dy", dy);
  arguments.matrix("z", z, dy.size(0), dy.size(1));
  return reduced(arguments, dy, z, nullptr, nullptr);
}

}  // namespace gain_ops
