// The ops of the dispatcher's namespace gain_ops_cuda; the functions of gain_ops/reference.py that a kernel computes
// whole. gain_ops/backends/cuda.py composes the rest. Activations [T, in] or [T, out], delta fp32 contiguous; results
// are contiguous.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "tensor.h"

namespace gain_ops {

// rows.cpp: any strides, every card from sm_80 on
Tensor scale(
    const Tensor& x, const Tensor& delta, const std::optional<Tensor>& bias);  // gain * x + b: [T, n], [n], [n]
Tensor scale_rows(const Tensor& x, const Tensor& delta);                       // gain[:, None] * x: [n, k], [n]
std::tuple<Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& z, const Tensor& delta);  // dz [T, out], ddelta [out]
Tensor ddelta(const Tensor& dy, const Tensor& z);             // [out]

// glu.cpp: any strides; activation is the index in reference.py's ACTIVATIONS
Tensor glu(const Tensor& gate, const std::optional<Tensor>& up, const Tensor& delta, int64_t activation);  // [T, n]
std::tuple<Tensor, Tensor> glu_backward(
    const Tensor& dh,
    const Tensor& gate,
    const std::optional<Tensor>& up,
    const Tensor& delta,
    int64_t activation);  // dg and du side by side [T, 2n], without up dg [T, n]; ddelta [n]
Tensor glu_ddelta(const Tensor& dh, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation);  // [n]

// rms_norm.cpp: any strides, at most kRmsNormColumns columns, weight fp32 contiguous
std::tuple<Tensor, Tensor> rms_norm(
    const Tensor& x, const Tensor& weight, const Tensor& delta, double eps);  // y [T, n], r [T]
std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& delta,
    const Tensor& r);  // dx [T, n], ddelta [n]

// linear.cpp: sm_90, 16 bits, 16-byte aligned rows, weight [out, in] or a transposed view of [in, out]
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& bias);
std::tuple<Tensor, Tensor> linear_z(
    const Tensor& x, const Tensor& weight, const Tensor& delta, const std::optional<Tensor>& bias);
std::tuple<Tensor, Tensor> backward_recompute(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& delta);  // dz [T, out], ddelta [out]
std::tuple<Tensor, Tensor> backward_input(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& delta);  // dx [T, in], ddelta [in]

// Schemas and functions of all of these that were compiled, into a library of the dispatcher.
void define_ops(torch::stable::detail::StableLibrary& library);
void implement_ops(torch::stable::detail::StableLibrary& library);

}  // namespace gain_ops
