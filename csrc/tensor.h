// The border between torch and the kernels: what is checked of every tensor. Stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "matrix.h"
#include "plan.h"

namespace gain_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool condition, const Parts&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

std::string shape_text(const Tensor& t);
std::string device_text(const Tensor& t);
const char* dtype_text(ScalarType dtype);

// One op's arguments, checked against the first: names are what a message says. Every method throws std::runtime_error.
class Arguments {
 public:
  // `first` is a matrix on a device of device.h, in a dtype of the kernels.
  Arguments(const char* op, const char* name, const Tensor& first);

  // [rows, cols] in the first one's dtype, on its device.
  void matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) const;
  // [size] contiguous, in `dtype`, on the first one's device.
  void vector(const char* name, const Tensor& t, int64_t size, ScalarType dtype) const;
  // Rows of unit stride that do not overlap, with starts and steps at multiples of 16 bytes: what TMA can address.
  void tma_rows(const char* name, const Tensor& t) const;

  const char* op() const { return op_; }
  Dtype dtype() const { return dtype_; }
  ScalarType scalar_type() const { return scalar_type_; }
  int device() const { return device_; }

 private:
  void place(const char* name, const Tensor& t) const;

  const char* op_;
  std::string first_;
  ScalarType scalar_type_;
  Dtype dtype_;
  int device_;
};

ConstMatrix const_matrix(const Tensor& t);
Matrix matrix(const Tensor& t);
bool rows_aligned(const Tensor& t);
// A contiguous vector may still be a view that starts anywhere.
bool aligned(const Tensor& vector);

// Uninitialised, contiguous, from torch's allocator.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

}  // namespace gain_ops
