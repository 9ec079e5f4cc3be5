#include "linear.h"

#include <cstdlib>
#include <limits>

#include "device.h"
#include "ops.h"
#include "partials.h"

namespace gain_ops {

namespace {

void check_card(const Arguments& arguments) {
  const DeviceProperties& properties = device_properties(arguments.device());
  check(
      properties.major == 9 && properties.minor == 0, arguments.op(), ": cuda:", arguments.device(),
      " has compute capability ", properties.major, ".", properties.minor,
      " and the fused GEMM needs sm_90: the triton backend serves this card");
  check(
      arguments.dtype() != Dtype::float32, arguments.op(), ": the operands are ", dtype_text(arguments.scalar_type()),
      " and the fused GEMM computes in Half and BFloat16");
}

// Those that the grid takes; the environment is read once.
int multiprocessors(int device) {
  static const int margin = sm_margin(std::getenv("GAIN_OPS_SM_MARGIN"));
  return grid_multiprocessors(device_properties(device).multiprocessors, margin);
}

// From one row to the next. TMA refuses an odd one, even where there is no next row.
int64_t row_stride(const Tensor& t) { return t.size(0) == 1 ? t.size(1) : t.stride(0); }

// The operands a [m, k] and weight [n, k] (or a transposed view of [k, n]) of a GEMM that can run fused.
LinearProblem operands(
    const Arguments& arguments, const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  const int64_t m = a.size(0), k = a.size(1), n = b.size(0);
  check_card(arguments);
  arguments.matrix(b_name, b, n, k);
  check(
      m <= kMost && n <= kMost && k <= kMost, arguments.op(), ": a product of [", m, ", ", k, "] and [", k, ", ", n,
      "]; the fused GEMM counts in 32 bits");
  arguments.tma_rows(a_name, a);
  const bool b_is_kn = b.stride(0) == 1 && b.stride(1) != 1;
  const Tensor b_rows = b_is_kn ? torch::stable::transpose(b, 0, 1) : b;
  arguments.tma_rows(b_name, b_rows);
  return LinearProblem{
      .a = a.const_data_ptr(),
      .b = b.const_data_ptr(),
      .c = nullptr,
      .delta = nullptr,
      .bias = nullptr,
      .out = nullptr,
      .z = nullptr,
      .partials = nullptr,
      .m = m,
      .n = n,
      .k = k,
      .a_stride = row_stride(a),
      .b_stride = row_stride(b_rows),
      .c_stride = n,
      .b_is_kn = b_is_kn,
      .device = arguments.device(),
      .multiprocessors = multiprocessors(arguments.device()),
  };
}

void run(
    const Arguments& arguments,
    const Tensor& like,
    const LinearProblem& problem,
    Epilogue epilogue,
    Tile tile,
    cudaStream_t stream) {
  const LinearKernel kernel = sm90_kernel(epilogue, arguments.dtype(), tile, problem.b_is_kn);
  check(
      kernel.can_run(problem), arguments.op(), ": the fused GEMM cannot address a product of [", problem.m, ", ",
      problem.k, "] and [", problem.k, ", ", problem.n, "]: rows must be multiples of 8 elements");
  const auto bytes = static_cast<int64_t>(kernel.workspace(problem));
  std::optional<Tensor> workspace;
  if (bytes > 0) workspace = empty(like, {bytes}, ScalarType::Byte);
  kernel.run(problem, workspace ? workspace->mutable_data_ptr() : nullptr, stream);
}

void forward(
    const Arguments& arguments,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& delta,
    const std::optional<Tensor>& bias,
    const Tensor& y,
    const Tensor* z) {
  if (y.numel() == 0) return;
  LinearProblem problem = operands(arguments, "x", x, "weight", weight);
  problem.delta = static_cast<const float*>(delta.const_data_ptr());
  problem.bias = bias ? bias->const_data_ptr() : nullptr;
  problem.out = y.mutable_data_ptr();
  problem.z = z ? z->mutable_data_ptr() : nullptr;
  const LaunchScope scope(arguments.device());
  const Tile tile = choose_tile(problem.m, problem.n, problem.multiprocessors);
  run(arguments, x, problem, z ? Epilogue::linear_z : Epilogue::linear, tile, scope.stream());
}

Arguments forward_arguments(
    const char* op, const Tensor& x, const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& bias) {
  const Arguments arguments(op, "x", x);
  arguments.matrix("weight", weight, weight.size(0), x.size(1));
  arguments.vector("delta", delta, weight.size(0), ScalarType::Float);
  if (bias) arguments.vector("bias", *bias, weight.size(0), arguments.scalar_type());
  return arguments;
}

// The GEMM of a and b with c in the epilogue: writes out [m, n], returns ddelta [n].
Tensor reduced(
    const Arguments& arguments,
    LinearProblem problem,
    const char* c_name,
    const Tensor& c,
    const Tensor& delta,
    const Tensor& out,
    Epilogue epilogue) {
  arguments.tma_rows(c_name, c);
  const Tile tile = choose_tile(problem.m, problem.n, problem.multiprocessors);
  const PartialLayout layout = linear_partials(problem.m, problem.n, tile);
  const Tensor partials = empty(c, {layout.rows, layout.width}, ScalarType::Float);
  const Tensor sums = empty(c, {problem.n}, ScalarType::Float);
  problem.c = c.const_data_ptr();
  problem.c_stride = row_stride(c);
  problem.delta = static_cast<const float*>(delta.const_data_ptr());
  problem.out = out.mutable_data_ptr();
  problem.partials = static_cast<float*>(partials.mutable_data_ptr());
  const LaunchScope scope(arguments.device());
  run(arguments, c, problem, epilogue, tile, scope.stream());
  launch_sum_partials(
      problem.partials, layout, problem.n, static_cast<float*>(sums.mutable_data_ptr()), scope.stream());
  return sums;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& bias) {
  const Arguments arguments = forward_arguments("gain_ops_cuda::linear", x, weight, delta, bias);
  Tensor y = empty(x, {x.size(0), weight.size(0)}, arguments.scalar_type());
  forward(arguments, x, weight, delta, bias, y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> linear_z(
    const Tensor& x, const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& bias) {
  const Arguments arguments = forward_arguments("gain_ops_cuda::linear_z", x, weight, delta, bias);
  Tensor y = empty(x, {x.size(0), weight.size(0)}, arguments.scalar_type());
  Tensor z = empty(x, {x.size(0), weight.size(0)}, arguments.scalar_type());
  forward(arguments, x, weight, delta, bias, y, &z);
  return {y, z};
}

std::tuple<Tensor, Tensor> backward_recompute(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& delta) {
  const Arguments arguments("gain_ops_cuda::backward_recompute", "dy", dy);
  arguments.matrix("x", x, dy.size(0), x.size(1));
  arguments.matrix("weight", weight, dy.size(1), x.size(1));
  arguments.vector("delta", delta, dy.size(1), ScalarType::Float);
  Tensor dz = empty(dy, {dy.size(0), dy.size(1)}, arguments.scalar_type());
  if (dz.numel() == 0) return {dz, zeros(dy, {dy.size(1)}, ScalarType::Float)};
  const LinearProblem problem = operands(arguments, "x", x, "weight", weight);
  Tensor sums = reduced(arguments, problem, "dy", dy, delta, dz, Epilogue::recompute);
  return {dz, sums};
}

std::tuple<Tensor, Tensor> backward_input(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& delta) {
  const Arguments arguments("gain_ops_cuda::backward_input", "dy", dy);
  arguments.matrix("x", x, dy.size(0), x.size(1));
  arguments.matrix("weight", weight, dy.size(1), x.size(1));
  arguments.vector("delta", delta, x.size(1), ScalarType::Float);
  Tensor dx = empty(x, {x.size(0), x.size(1)}, arguments.scalar_type());
  if (dx.numel() == 0) return {dx, zeros(x, {x.size(1)}, ScalarType::Float)};
  const LinearProblem problem = operands(arguments, "dy", dy, "weight", torch::stable::transpose(weight, 0, 1));
  Tensor sums = reduced(arguments, problem, "x", x, delta, dx, Epilogue::input);
  return {dx, sums};
}

}  // namespace gain_ops
