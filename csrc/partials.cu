#include "blocks.h"
#include "launch.h"

namespace gain_ops {

namespace {

__global__ void __launch_bounds__(PartialsBlock::kThreads)
    sum_partials_kernel(const float* partials, PartialLayout layout, int64_t cols, float* sums) {
  __shared__ PartialsBlock::Shared shared;
  PartialsBlock::accumulate(partials, layout, cols, blockIdx.x, threadIdx.x, shared);
  __syncthreads();
  PartialsBlock::finish(cols, blockIdx.x, threadIdx.x, shared, sums);
}

}  // namespace

void launch_sum_partials(const float* partials, PartialLayout layout, int64_t cols, float* sums, cudaStream_t stream) {
  const unsigned grid = grid_size(PartialsBlock::blocks(cols), "sum_partials_kernel");
  sum_partials_kernel<<<grid, PartialsBlock::kThreads, 0, stream>>>(partials, layout, cols, sums);
  check_launch("sum_partials_kernel");
}

}  // namespace gain_ops
