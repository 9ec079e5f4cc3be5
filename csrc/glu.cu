#include "glu_blocks.h"
#include "launch.h"

namespace gain_ops {

namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, 2) glu_rows_kernel(const GluRows problem) {
  GluBlock<T, kWidth>::run(problem, blockIdx.x, threadIdx.x);
}

template <class T, int kWidth, bool kWrites>
__global__ void __launch_bounds__(kRowThreads, 2) glu_backward_rows_kernel(const GluBackwardRows problem) {
  using Block = GluBackwardBlock<T, kWidth, kWrites>;
  __shared__ typename Block::Shared shared;
  Block::accumulate(problem, blockIdx.x, threadIdx.x, shared);
  __syncthreads();
  Block::finish(problem, blockIdx.x, threadIdx.x, shared);
}

template <class T, int kWidth>
void glu_rows(const GluRows& problem, cudaStream_t stream) {
  const unsigned grid = grid_size(GluBlock<T, kWidth>::blocks(problem), "glu_rows_kernel");
  glu_rows_kernel<T, kWidth><<<grid, kRowThreads, 0, stream>>>(problem);
  check_launch("glu_rows_kernel");
}

template <class T, int kWidth>
void glu_backward_rows(const GluBackwardRows& problem, cudaStream_t stream) {
  const unsigned grid = grid_size(GluBackwardBlock<T, kWidth, true>::blocks(problem), "glu_backward_rows_kernel");
  if (problem.dgate.data != nullptr) {
    glu_backward_rows_kernel<T, kWidth, true><<<grid, kRowThreads, 0, stream>>>(problem);
  } else {
    glu_backward_rows_kernel<T, kWidth, false><<<grid, kRowThreads, 0, stream>>>(problem);
  }
  check_launch("glu_backward_rows_kernel");
}

}  // namespace

void launch_glu_rows(const GluRows& problem, Dtype dtype, int width, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32: return width == 1 ? glu_rows<float, 1>(problem, stream) : glu_rows<float, 4>(problem, stream);
    case Dtype::float16:
      return width == 1 ? glu_rows<__half, 1>(problem, stream) : glu_rows<__half, 8>(problem, stream);
    case Dtype::bfloat16:
      return width == 1 ? glu_rows<__nv_bfloat16, 1>(problem, stream) : glu_rows<__nv_bfloat16, 8>(problem, stream);
  }
}

void launch_glu_backward_rows(const GluBackwardRows& problem, Dtype dtype, int width, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return width == 1 ? glu_backward_rows<float, 1>(problem, stream) : glu_backward_rows<float, 4>(problem, stream);
    case Dtype::float16:
      return width == 1 ? glu_backward_rows<__half, 1>(problem, stream) : glu_backward_rows<__half, 8>(problem, stream);
    case Dtype::bfloat16:
      return width == 1 ? glu_backward_rows<__nv_bfloat16, 1>(problem, stream)
                        : glu_backward_rows<__nv_bfloat16, 8>(problem, stream);
  }
}

}  // namespace gain_ops
