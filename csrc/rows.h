// Launchers of the one-pass kernels over [rows, cols]. No torch here: the .cu files and the host tests include this
// alone.
#pragma once

#include <cuda_runtime_api.h>

#include "matrix.h"
#include "plan.h"

namespace gain_ops {

// out = gain * in (+ bias); partials of sum over rows of in * other. The backward reads in = dy, other = z and writes
// dz: lines (3), (4) of gain_ops/reference.py; without out, line (4) alone.
struct BackwardRows {
  ConstMatrix in;      // [rows, cols]
  ConstMatrix other;   // [rows, cols]
  const float* delta;  // [cols]; unread where out is null
  Matrix out;          // [rows, cols], or null data
  float* partials;     // [chunks, cols]
  int64_t rows, cols;
  int64_t chunk = rows_per_chunk(rows);  // rows that one block sums
};

// out = (1 + delta) * in + bias: line (2), and the operand of line (5).
struct ScaleRows {
  ConstMatrix in;      // [rows, cols]
  const float* delta;  // [cols], or [rows] when by_row
  const void* bias;    // [cols] in the dtype of in, or null
  Matrix out;          // [rows, cols]
  int64_t rows, cols;
  bool by_row;
};

// width: elements a thread moves at once, vector_width() of plan.h. rows and cols are positive.
void launch_backward_rows(const BackwardRows& problem, Dtype dtype, int width, cudaStream_t stream);
void launch_scale_rows(const ScaleRows& problem, Dtype dtype, int width, cudaStream_t stream);

}  // namespace gain_ops
