#include "tensor.h"

#include "device.h"

namespace gain_ops {

std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

std::string device_text(const Tensor& t) {
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return t.is_cpu() ? "cpu" : "another device";
}

const char* dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }

Arguments::Arguments(const char* op, const char* name, const Tensor& first)
    : op_(op), first_(name), scalar_type_(first.scalar_type()), device_(-1) {
  check(
      on_device(first), op_, ": ", name, " is on ", device_text(first),
      ", and the CUDA kernels take tensors on a CUDA device. Use backend='auto' or 'eager' for others.");
  switch (scalar_type_) {
    case ScalarType::Float: dtype_ = Dtype::float32; break;
    case ScalarType::Half: dtype_ = Dtype::float16; break;
    case ScalarType::BFloat16: dtype_ = Dtype::bfloat16; break;
    default:
      check(
          false, op_, ": ", name, " is ", dtype_text(scalar_type_),
          ", and the CUDA kernels compute in Float, Half and BFloat16. Use backend='eager' for others.");
  }
  check(first.dim() == 2, op_, ": ", name, " has shape ", shape_text(first), ", expected two dimensions");
  device_ = first.get_device_index();
}

void Arguments::place(const char* name, const Tensor& t) const {
  check(
      on_device(t) && t.get_device_index() == device_, op_, ": ", name, " is on ", device_text(t), " and ", first_,
      " is on device ", device_, "; move them to one device");
}

void Arguments::matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const {
  place(name, t);
  check(
      t.scalar_type() == scalar_type_, op_, ": ", name, " is ", dtype_text(t.scalar_type()), " and ", first_, " is ",
      dtype_text(scalar_type_), "; they must agree");
  check(
      t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, op_, ": ", name, " has shape ", shape_text(t),
      ", expected [", rows, ", ", cols, "]");
}

void Arguments::vector(const char* name, const Tensor& t, int64_t size, ScalarType dtype) const {
  place(name, t);
  check(
      t.scalar_type() == dtype, op_, ": ", name, " is ", dtype_text(t.scalar_type()), ", expected ", dtype_text(dtype));
  check(t.dim() == 1 && t.size(0) == size, op_, ": ", name, " has shape ", shape_text(t), ", expected [", size, "]");
  check(t.size(0) <= 1 || t.stride(0) == 1, op_, ": ", name, " has stride ", t.stride(0), ", expected contiguous");
}

void Arguments::tma_rows(const char* name, const Tensor& t) const {
  const bool apart = t.size(0) <= 1 || t.stride(0) >= t.size(1);
  check(
      rows_aligned(t) && apart, op_, ": ", name, " has strides [", t.stride(0), ", ", t.stride(1), "] and a base at ",
      reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16, " bytes past a multiple of 16",
      "; the fused GEMM reads rows of unit stride that do not overlap and start at multiples of 16 bytes");
}

ConstMatrix const_matrix(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

Matrix matrix(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1)}; }

bool rows_aligned(const Tensor& t) {
  const int64_t bytes = t.scalar_type() == ScalarType::Float ? 4 : 2;
  return rows_aligned(t.const_data_ptr(), t.size(0), t.stride(0), t.stride(1), bytes);
}

bool aligned(const Tensor& vector) { return aligned(vector.const_data_ptr()); }

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, {sizes.begin(), sizes.size()}, dtype);
}

}  // namespace gain_ops
