// Launchers of the one-pass kernels of an FFN's activation over [rows, cols]. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "matrix.h"
#include "plan.h"

namespace gain_ops {

// In the order of ACTIVATIONS in gain_ops/reference.py.
enum class Activation : int64_t { silu, gelu, gelu_tanh, relu2 };
constexpr int64_t kActivations = 4;

// out = act(gate) * up * gain: line (8) of gain_ops/reference.py; without up, act(gate) * gain.
struct GluRows {
  ConstMatrix gate;    // [rows, cols]
  ConstMatrix up;      // [rows, cols], or null data
  const float* delta;  // [cols]
  Matrix out;          // [rows, cols]
  int64_t rows, cols;
  Activation activation;
};

// Lines (9) and (10); without dgate, line (10) alone.
struct GluBackwardRows {
  ConstMatrix dh, gate;  // [rows, cols]
  ConstMatrix up;        // [rows, cols], or null data
  const float* delta;    // [cols]; unread where dgate is null
  Matrix dgate;          // [rows, cols], or null data
  Matrix dup;            // [rows, cols], or null data; null where up or dgate is
  float* partials;       // [chunks, cols]
  int64_t rows, cols;
  Activation activation;
  int64_t chunk = rows_per_chunk(rows);  // rows that one block sums
};

// width: elements a thread moves at once, vector_width() of plan.h. rows and cols are positive.
void launch_glu_rows(const GluRows& problem, Dtype dtype, int width, cudaStream_t stream);
void launch_glu_backward_rows(const GluBackwardRows& problem, Dtype dtype, int width, cudaStream_t stream);

}  // namespace gain_ops
