// Launchers of the fused GEMMs. No torch here: the .cu files and the host tests include this alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace gain_ops {

// One GEMM acc = a @ b^T and its epilogue. All row-major with 16-byte aligned rows and bases.
struct LinearProblem {
  const void* a;       // [m, k], rows a_stride elements apart
  const void* b;       // [n, k] rows b_stride apart; [k, n] when b_is_kn
  const void* c;       // [m, n], rows c_stride apart; read by the reductions only
  const float* delta;  // [n]
  const void* bias;    // [n] in the dtype of a, or null
  void* out;           // [m, n] contiguous: y, dz or dx
  void* z;             // [m, n] contiguous; written by Epilogue::linear_z only
  float* partials;     // PartialLayout{rows, width}; written by the reductions only
  int64_t m, n, k;
  int64_t a_stride, b_stride, c_stride;
  bool b_is_kn;
  int device;
  int multiprocessors;  // that the grid takes
};

// What the epilogue makes of acc; the lines are those of gain_ops/reference.py.
enum class Epilogue {
  linear,     // out = gain * acc + bias                                            (1), (2)
  linear_z,   // the same, and z = acc                                              (1), (2)
  recompute,  // out = gain * c,     partials of sum_m acc * c      acc = z, c = dy  (1), (3), (4)
  input,      // out = gain * acc,   partials of sum_m acc * c      acc = dy @ W     (6), (7)
};

// The functions of one compiled kernel.
struct LinearKernel {
  size_t (*workspace)(const LinearProblem&);  // bytes of device memory that run wants, 16-byte aligned
  bool (*can_run)(const LinearProblem&);      // whether it takes these sizes
  // Enqueue on the stream. Throws std::runtime_error with CUTLASS's or CUDA's reason.
  void (*run)(const LinearProblem&, void* workspace, cudaStream_t);
};

// The kernel of sm90/ for these; float32 has none.
LinearKernel sm90_kernel(Epilogue epilogue, Dtype dtype, Tile tile, bool b_is_kn);

}  // namespace gain_ops
