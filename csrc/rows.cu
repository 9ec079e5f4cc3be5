#include "blocks.h"
#include "launch.h"

namespace gain_ops {

namespace {

template <class T, int kWidth, bool kWrites>
__global__ void __launch_bounds__(kRowThreads, 2) backward_rows_kernel(const BackwardRows problem) {
  using Block = BackwardBlock<T, kWidth, kWrites>;
  __shared__ typename Block::Shared shared;
  Block::accumulate(problem, blockIdx.x, threadIdx.x, shared);
  __syncthreads();
  Block::finish(problem, blockIdx.x, threadIdx.x, shared);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, 2) scale_rows_kernel(const ScaleRows problem) {
  ScaleBlock<T, kWidth>::run(problem, blockIdx.x, threadIdx.x);
}

template <class T, int kWidth>
void backward_rows(const BackwardRows& problem, cudaStream_t stream) {
  const unsigned grid = grid_size(BackwardBlock<T, kWidth, true>::blocks(problem), "backward_rows_kernel");
  if (problem.out.data != nullptr) {
    backward_rows_kernel<T, kWidth, true><<<grid, kRowThreads, 0, stream>>>(problem);
  } else {
    backward_rows_kernel<T, kWidth, false><<<grid, kRowThreads, 0, stream>>>(problem);
  }
  check_launch("backward_rows_kernel");
}

template <class T, int kWidth>
void scale_rows(const ScaleRows& problem, cudaStream_t stream) {
  const unsigned grid = grid_size(ScaleBlock<T, kWidth>::blocks(problem), "scale_rows_kernel");
  scale_rows_kernel<T, kWidth><<<grid, kRowThreads, 0, stream>>>(problem);
  check_launch("scale_rows_kernel");
}

}  // namespace

void launch_backward_rows(const BackwardRows& problem, Dtype dtype, int width, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return width == 1 ? backward_rows<float, 1>(problem, stream) : backward_rows<float, 4>(problem, stream);
    case Dtype::float16:
      return width == 1 ? backward_rows<__half, 1>(problem, stream) : backward_rows<__half, 8>(problem, stream);
    case Dtype::bfloat16:
      return width == 1 ? backward_rows<__nv_bfloat16, 1>(problem, stream)
                        : backward_rows<__nv_bfloat16, 8>(problem, stream);
  }
}

void launch_scale_rows(const ScaleRows& problem, Dtype dtype, int width, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return width == 1 ? scale_rows<float, 1>(problem, stream) : scale_rows<float, 4>(problem, stream);
    case Dtype::float16:
      return width == 1 ? scale_rows<__half, 1>(problem, stream) : scale_rows<__half, 8>(problem, stream);
    case Dtype::bfloat16:
      return width == 1 ? scale_rows<__nv_bfloat16, 1>(problem, stream) : scale_rows<__nv_bfloat16, 8>(problem, stream);
  }
}

}  // namespace gain_ops
