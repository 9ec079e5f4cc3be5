// Launchers of the one-pass kernels of an RMSNorm with a gain over [rows, cols]. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "matrix.h"
#include "plan.h"

namespace gain_ops {

// out = r * x * weight * gain, r = 1 / sqrt(mean(x^2) + eps): line (11) of gain_ops/reference.py.
struct RmsNormRows {
  ConstMatrix x;                // [rows, cols]
  const float *weight, *delta;  // [cols]
  Matrix out;                   // [rows, cols]
  float* r;                     // [rows]
  int64_t rows, cols;
  float eps;
};

// Lines (12) and (13).
struct RmsNormBackwardRows {
  ConstMatrix dy, x;                // [rows, cols]
  const float *weight, *delta, *r;  // [cols], [cols], [rows]
  Matrix dx;                        // [rows, cols]
  float* partials;                  // [chunks, cols]
  int64_t rows, cols;
  int64_t chunk = rms_norm_rows_per_chunk(rows);  // rows that one block sums
};

// The widest row whose column sums fit the shared memory of every card.
constexpr int64_t kRmsNormColumns = 24'000;

// width: elements a thread moves at once, vector_width() of plan.h. rows and cols are positive.
void launch_rms_norm_rows(const RmsNormRows& problem, Dtype dtype, int width, cudaStream_t stream);
void launch_rms_norm_backward_rows(const RmsNormBackwardRows& problem, Dtype dtype, int width, cudaStream_t stream);

}  // namespace gain_ops
