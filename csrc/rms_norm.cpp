#include "rms_norm.h"

#include "device.h"
#include "ops.h"
#include "partials.h"

namespace gain_ops {

namespace {

void check_columns(const Arguments& arguments, int64_t cols) {
  check(
      cols > 0 && cols <= kRmsNormColumns, arguments.op(), ": x has ", cols, " columns, expected 1 to ",
      kRmsNormColumns);
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, const Tensor& delta, double eps) {
  const Arguments arguments("gain_ops_cuda::rms_norm", "x", x);
  const int64_t rows = x.size(0), cols = x.size(1);
  check_columns(arguments, cols);
  arguments.vector("weight", weight, cols, ScalarType::Float);
  arguments.vector("delta", delta, cols, ScalarType::Float);
  Tensor out = empty(x, {rows, cols}, arguments.scalar_type());
  Tensor r = empty(x, {rows}, ScalarType::Float);
  if (rows == 0) return {out, r};
  const RmsNormRows problem{
      const_matrix(x),
      floats(weight),
      floats(delta),
      matrix(out),
      static_cast<float*>(r.mutable_data_ptr()),
      rows,
      cols,
      static_cast<float>(eps)};
  const LaunchScope scope(arguments.device());
  const int width = vector_width(arguments.dtype(), cols, rows_aligned(x) && aligned(weight) && aligned(delta));
  launch_rms_norm_rows(problem, arguments.dtype(), width, scope.stream());
  return {out, r};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& delta, const Tensor& r) {
  const Arguments arguments("gain_ops_cuda::rms_norm_backward", "x", x);
  const int64_t rows = x.size(0), cols = x.size(1);
  check_columns(arguments, cols);
  arguments.matrix("dy", dy, rows, cols);
  arguments.vector("weight", weight, cols, ScalarType::Float);
  arguments.vector("delta", delta, cols, ScalarType::Float);
  arguments.vector("r", r, rows, ScalarType::Float);
  Tensor dx = empty(x, {rows, cols}, arguments.scalar_type());
  if (rows == 0) return {dx, zeros(x, {cols}, ScalarType::Float)};
  const PartialLayout layout = rms_norm_partials(rows, cols);
  const Tensor partials = empty(x, {layout.rows, layout.width}, ScalarType::Float);
  Tensor sums = empty(x, {cols}, ScalarType::Float);
  const RmsNormBackwardRows problem{
      const_matrix(dy),
      const_matrix(x),
      floats(weight),
      floats(delta),
      floats(r),
      matrix(dx),
      static_cast<float*>(partials.mutable_data_ptr()),
      rows,
      cols};
  const LaunchScope scope(arguments.device());
  const bool all = rows_aligned(x) && rows_aligned(dy) && aligned(weight) && aligned(delta);
  const int width = vector_width(arguments.dtype(), cols, all);
  launch_rms_norm_backward_rows(problem, arguments.dtype(), width, scope.stream());
  launch_sum_partials(problem.partials, layout, cols, static_cast<float*>(sums.mutable_data_ptr()), scope.stream());
  return {dx, sums};
}

}  // namespace gain_ops
