// The second stage of every sum over rows.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace gain_ops {

// sums[j] = sum_i partials[i * layout.width + j] for j < cols, i ascending within a strand, strands in order: no
// atomics, so the same bits on every run and device. partials [rows, width] fp32, sums [cols] fp32.
void launch_sum_partials(const float* partials, PartialLayout layout, int64_t cols, float* sums, cudaStream_t stream);

}  // namespace gain_ops
