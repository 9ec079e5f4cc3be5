#include "launch.h"
#include "rms_norm_blocks.h"

namespace gain_ops {

namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, 2) norm_rows_kernel(const RmsNormRows problem) {
  using Block = RmsNormBlock<T, kWidth>;
  __shared__ RowSum shared;
  Block::squares(problem, blockIdx.x, threadIdx.x, shared);
  __syncthreads();
  shared.fold(threadIdx.x);
  __syncthreads();
  Block::write(problem, blockIdx.x, threadIdx.x, shared);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kRowThreads, 3) norm_backward_rows_kernel(const RmsNormBackwardRows problem) {
  using Block = RmsNormBackwardBlock<T, kWidth>;
  __shared__ RowSum shared;
  extern __shared__ __align__(16) float columns[];
  Block::begin(problem, threadIdx.x, columns);
  for (int64_t row = Block::first(problem, blockIdx.x); row < Block::last(problem, blockIdx.x); ++row) {
    Block::products(problem, row, threadIdx.x, shared);
    __syncthreads();
    shared.fold(threadIdx.x);
    __syncthreads();
    Block::write(problem, row, threadIdx.x, shared, columns);
  }
  __syncthreads();
  Block::end(problem, blockIdx.x, threadIdx.x, columns);
}

template <class T, int kWidth>
void rms_norm_rows(const RmsNormRows& problem, cudaStream_t stream) {
  const unsigned grid = grid_size(problem.rows, "norm_rows_kernel");
  norm_rows_kernel<T, kWidth><<<grid, kRowThreads, 0, stream>>>(problem);
  check_launch("norm_rows_kernel");
}

template <class T, int kWidth>
void rms_norm_backward_rows(const RmsNormBackwardRows& problem, cudaStream_t stream) {
  const unsigned grid = grid_size(RmsNormBackwardBlock<T, kWidth>::blocks(problem), "norm_backward_rows_kernel");
  using Places = typename RmsNormBackwardBlock<T, kWidth>::Places;
  constexpr int kMost = Places::size(kRmsNormColumns) * sizeof(float);
  static_assert(kMost + sizeof(RowSum) <= 99 * 1024, "a block of sm_86, sm_89 and sm_120 has 99 KiB");
  const auto kernel = norm_backward_rows_kernel<T, kWidth>;
  // Past 48 KiB only for the asking. Always the most: another thread may launch between this and the launch below.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost);
  kernel<<<grid, kRowThreads, Places::size(static_cast<int>(problem.cols)) * sizeof(float), stream>>>(problem);
  check_launch("norm_backward_rows_kernel");
}

}  // namespace

void launch_rms_norm_rows(const RmsNormRows& problem, Dtype dtype, int width, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return width == 1 ? rms_norm_rows<float, 1>(problem, stream) : rms_norm_rows<float, 4>(problem, stream);
    case Dtype::float16:
      return width == 1 ? rms_norm_rows<__half, 1>(problem, stream) : rms_norm_rows<__half, 8>(problem, stream);
    case Dtype::bfloat16:
      return width == 1 ? rms_norm_rows<__nv_bfloat16, 1>(problem, stream)
                        : rms_norm_rows<__nv_bfloat16, 8>(problem, stream);
  }
}

void launch_rms_norm_backward_rows(const RmsNormBackwardRows& problem, Dtype dtype, int width, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float32:
      return width == 1 ? rms_norm_backward_rows<float, 1>(problem, stream)
                        : rms_norm_backward_rows<float, 4>(problem, stream);
    case Dtype::float16:
      return width == 1 ? rms_norm_backward_rows<__half, 1>(problem, stream)
                        : rms_norm_backward_rows<__half, 8>(problem, stream);
    case Dtype::bfloat16:
      return width == 1 ? rms_norm_backward_rows<__nv_bfloat16, 1>(problem, stream)
                        : rms_norm_backward_rows<__nv_bfloat16, 8>(problem, stream);
  }
}

}  // namespace gain_ops
