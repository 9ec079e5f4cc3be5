#include "glu.h"

#include "device.h"
#include "ops.h"
#include "partials.h"

namespace gain_ops {

namespace {

Activation checked(const Arguments& arguments, int64_t activation) {
  check(
      activation >= 0 && activation < kActivations, arguments.op(), ": activation is ", activation, ", expected 0 to ",
      kActivations - 1);
  return static_cast<Activation>(activation);
}

ConstMatrix matrix_or_null(const std::optional<Tensor>& t) { return t ? const_matrix(*t) : ConstMatrix{nullptr, 0, 0}; }

// ddelta, and the gradients written into dgate_up where it is given
Tensor reduced(
    const Arguments& arguments,
    const Tensor& dh,
    const Tensor& gate,
    const std::optional<Tensor>& up,
    const Tensor* delta,
    const Tensor* dgate_up,
    Activation activation) {
  const int64_t rows = gate.size(0), cols = gate.size(1);
  if (rows == 0 || cols == 0) return zeros(gate, {cols}, ScalarType::Float);
  const PartialLayout layout = row_partials(rows, cols);
  const Tensor partials = empty(gate, {layout.rows, layout.width}, ScalarType::Float);
  const Tensor sums = empty(gate, {cols}, ScalarType::Float);
  const Matrix dgate = dgate_up ? matrix(*dgate_up) : Matrix{nullptr, 0, 0};
  Matrix dup{nullptr, 0, 0};
  if (dgate_up && up) {
    dup = dgate;
    dup.data = static_cast<char*>(dgate.data) + cols * element_size(arguments.dtype());
  }
  const GluBackwardRows problem{
      const_matrix(dh),
      const_matrix(gate),
      matrix_or_null(up),
      delta ? static_cast<const float*>(delta->const_data_ptr()) : nullptr,
      dgate,
      dup,
      static_cast<float*>(partials.mutable_data_ptr()),
      rows,
      cols,
      activation};
  const LaunchScope scope(arguments.device());
  const bool all = rows_aligned(dh) && rows_aligned(gate) && (!up || rows_aligned(*up)) && (!delta || aligned(*delta));
  launch_glu_backward_rows(problem, arguments.dtype(), vector_width(arguments.dtype(), cols, all), scope.stream());
  launch_sum_partials(problem.partials, layout, cols, static_cast<float*>(sums.mutable_data_ptr()), scope.stream());
  return sums;
}

}  // namespace

Tensor glu(const Tensor& gate, const std::optional<Tensor>& up, const Tensor& delta, int64_t activation) {
  const Arguments arguments("gain_ops_cuda::glu", "gate", gate);
  const int64_t rows = gate.size(0), cols = gate.size(1);
  if (up) arguments.matrix("up", *up, rows, cols);
  arguments.vector("delta", delta, cols, ScalarType::Float);
  const Activation act = checked(arguments, activation);
  Tensor out = empty(gate, {rows, cols}, arguments.scalar_type());
  if (out.numel() == 0) return out;
  const GluRows problem{
      const_matrix(gate),
      matrix_or_null(up),
      static_cast<const float*>(delta.const_data_ptr()),
      matrix(out),
      rows,
      cols,
      act};
  const LaunchScope scope(arguments.device());
  const bool all = rows_aligned(gate) && (!up || rows_aligned(*up)) && aligned(delta);
  launch_glu_rows(problem, arguments.dtype(), vector_width(arguments.dtype(), cols, all), scope.stream());
  return out;
}

std::tuple<Tensor, Tensor> glu_backward(
    const Tensor& dh, const Tensor& gate, const std::optional<Tensor>& up, const Tensor& delta, int64_t activation) {
  const Arguments arguments("gain_ops_cuda::glu_backward", "gate", gate);
  const int64_t rows = gate.size(0), cols = gate.size(1);
  arguments.matrix("dh", dh, rows, cols);
  if (up) arguments.matrix("up", *up, rows, cols);
  arguments.vector("delta", delta, cols, ScalarType::Float);
  const Activation act = checked(arguments, activation);
  Tensor dgate_up = empty(gate, {rows, up ? 2 * cols : cols}, arguments.scalar_type());
  Tensor sums = reduced(arguments, dh, gate, up, &delta, &dgate_up, act);
  return {dgate_up, sums};
}

Tensor glu_ddelta(const Tensor& dh, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  const Arguments arguments("gain_ops_cuda::glu_ddelta", "gate", gate);
  arguments.matrix("dh", dh, gate.size(0), gate.size(1));
  if (up) arguments.matrix("up", *up, gate.size(0), gate.size(1));
  return reduced(arguments, dh, gate, up, nullptr, nullptr, checked(arguments, activation));
}

}  // namespace gain_ops
