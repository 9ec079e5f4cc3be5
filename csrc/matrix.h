// A matrix as the kernels see it: no torch, host and device.
#pragma once

#include <cstdint>

namespace gain_ops {

struct Matrix {
  void* data;
  int64_t row_stride;  // elements
  int64_t col_stride;  // elements; 1 in the vectorised kernels
};

struct ConstMatrix {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;
};

}  // namespace gain_ops
