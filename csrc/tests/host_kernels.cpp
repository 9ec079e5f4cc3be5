// The launchers on a CPU, for tests. The row kernels are the functions that the device runs (blocks.h), a block and a
// thread at a time; the GEMMs are loops over what `LinearProblem` says, with sums that fall where CUTLASS puts them.
#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "../blocks.h"
#include "../glu_blocks.h"
#include "../linear.h"
#include "../rms_norm_blocks.h"

// The last GEMM's tile and multiprocessors, for tests.
extern "C" {
__attribute__((visibility("default"))) int host_gemm_columns = 0;
__attribute__((visibility("default"))) int host_gemm_multiprocessors = 0;
}

namespace gain_ops {

namespace {

// what a device asks of 16-byte accesses to vectors over the columns
void check_vectors(int width, std::initializer_list<const void*> vectors) {
  for (const void* vector : vectors) {
    if (width > 1 && !aligned(vector))
      throw std::runtime_error("a vector that is not aligned is read 16 bytes at once");
  }
}

template <class Block, class Problem>
void run_reduction(const Problem& problem) {
  for (int64_t block = 0; block < Block::blocks(problem); ++block) {
    typename Block::Shared shared;
    for (int thread = 0; thread < kRowThreads; ++thread) Block::accumulate(problem, block, thread, shared);
    for (int thread = 0; thread < kRowThreads; ++thread) Block::finish(problem, block, thread, shared);
  }
}

template <class T, int kWidth>
void backward_rows(const BackwardRows& problem) {
  if (problem.out.data != nullptr) {
    run_reduction<BackwardBlock<T, kWidth, true>>(problem);
  } else {
    run_reduction<BackwardBlock<T, kWidth, false>>(problem);
  }
}

template <class T, int kWidth>
void scale_rows(const ScaleRows& problem) {
  using Block = ScaleBlock<T, kWidth>;
  for (int64_t block = 0; block < Block::blocks(problem); ++block) {
    for (int thread = 0; thread < kRowThreads; ++thread) Block::run(problem, block, thread);
  }
}

template <class T, int kWidth>
void glu_rows(const GluRows& problem) {
  using Block = GluBlock<T, kWidth>;
  for (int64_t block = 0; block < Block::blocks(problem); ++block) {
    for (int thread = 0; thread < kRowThreads; ++thread) Block::run(problem, block, thread);
  }
}

template <class T, int kWidth>
void glu_backward_rows(const GluBackwardRows& problem) {
  if (problem.dgate.data != nullptr) {
    run_reduction<GluBackwardBlock<T, kWidth, true>>(problem);
  } else {
    run_reduction<GluBackwardBlock<T, kWidth, false>>(problem);
  }
}

void fold(RowSum& shared) {
  for (int thread = 0; thread < kRowThreads; ++thread) shared.fold(thread);
}

template <class T, int kWidth>
void rms_norm_rows(const RmsNormRows& problem) {
  using Block = RmsNormBlock<T, kWidth>;
  for (int64_t row = 0; row < problem.rows; ++row) {
    RowSum shared;
    for (int thread = 0; thread < kRowThreads; ++thread) Block::squares(problem, row, thread, shared);
    fold(shared);
    for (int thread = 0; thread < kRowThreads; ++thread) Block::write(problem, row, thread, shared);
  }
}

template <class T, int kWidth>
void rms_norm_backward_rows(const RmsNormBackwardRows& problem) {
  using Block = RmsNormBackwardBlock<T, kWidth>;
  for (int64_t block = 0; block < Block::blocks(problem); ++block) {
    RowSum shared;
    std::vector<float> columns(Block::Places::size(static_cast<int>(problem.cols)), std::nanf(""));
    for (int thread = 0; thread < kRowThreads; ++thread) Block::begin(problem, thread, columns.data());
    for (int64_t row = Block::first(problem, block); row < Block::last(problem, block); ++row) {
      for (int thread = 0; thread < kRowThreads; ++thread) Block::products(problem, row, thread, shared);
      fold(shared);
      for (int thread = 0; thread < kRowThreads; ++thread) Block::write(problem, row, thread, shared, columns.data());
    }
    for (int thread = 0; thread < kRowThreads; ++thread) Block::end(problem, block, thread, columns.data());
  }
}

}  // namespace

void launch_glu_rows(const GluRows& problem, Dtype dtype, int width, cudaStream_t) {
  check_vectors(width, {problem.delta});
  switch (dtype) {
    case Dtype::float32: return width == 1 ? glu_rows<float, 1>(problem) : glu_rows<float, 4>(problem);
    case Dtype::float16: return width == 1 ? glu_rows<__half, 1>(problem) : glu_rows<__half, 8>(problem);
    case Dtype::bfloat16: return width == 1 ? glu_rows<__nv_bfloat16, 1>(problem) : glu_rows<__nv_bfloat16, 8>(problem);
  }
}

void launch_glu_backward_rows(const GluBackwardRows& problem, Dtype dtype, int width, cudaStream_t) {
  check_vectors(width, {problem.delta});
  switch (dtype) {
    case Dtype::float32:
      return width == 1 ? glu_backward_rows<float, 1>(problem) : glu_backward_rows<float, 4>(problem);
    case Dtype::float16:
      return width == 1 ? glu_backward_rows<__half, 1>(problem) : glu_backward_rows<__half, 8>(problem);
    case Dtype::bfloat16:
      return width == 1 ? glu_backward_rows<__nv_bfloat16, 1>(problem) : glu_backward_rows<__nv_bfloat16, 8>(problem);
  }
}

void launch_rms_norm_rows(const RmsNormRows& problem, Dtype dtype, int width, cudaStream_t) {
  check_vectors(width, {problem.weight, problem.delta});
  switch (dtype) {
    case Dtype::float32: return width == 1 ? rms_norm_rows<float, 1>(problem) : rms_norm_rows<float, 4>(problem);
    case Dtype::float16: return width == 1 ? rms_norm_rows<__half, 1>(problem) : rms_norm_rows<__half, 8>(problem);
    case Dtype::bfloat16:
      return width == 1 ? rms_norm_rows<__nv_bfloat16, 1>(problem) : rms_norm_rows<__nv_bfloat16, 8>(problem);
  }
}

void launch_rms_norm_backward_rows(const RmsNormBackwardRows& problem, Dtype dtype, int width, cudaStream_t) {
  check_vectors(width, {problem.weight, problem.delta});
  switch (dtype) {
    case Dtype::float32:
      return width == 1 ? rms_norm_backward_rows<float, 1>(problem) : rms_norm_backward_rows<float, 4>(problem);
    case Dtype::float16:
      return width == 1 ? rms_norm_backward_rows<__half, 1>(problem) : rms_norm_backward_rows<__half, 8>(problem);
    case Dtype::bfloat16:
      return width == 1 ? rms_norm_backward_rows<__nv_bfloat16, 1>(problem)
                        : rms_norm_backward_rows<__nv_bfloat16, 8>(problem);
  }
}

void launch_backward_rows(const BackwardRows& problem, Dtype dtype, int width, cudaStream_t) {
  check_vectors(width, {problem.delta});
  switch (dtype) {
    case Dtype::float32: return width == 1 ? backward_rows<float, 1>(problem) : backward_rows<float, 4>(problem);
    case Dtype::float16: return width == 1 ? backward_rows<__half, 1>(problem) : backward_rows<__half, 8>(problem);
    case Dtype::bfloat16:
      return width == 1 ? backward_rows<__nv_bfloat16, 1>(problem) : backward_rows<__nv_bfloat16, 8>(problem);
  }
}

void launch_scale_rows(const ScaleRows& problem, Dtype dtype, int width, cudaStream_t) {
  check_vectors(width, {problem.by_row ? nullptr : problem.delta, problem.bias});
  switch (dtype) {
    case Dtype::float32: return width == 1 ? scale_rows<float, 1>(problem) : scale_rows<float, 4>(problem);
    case Dtype::float16: return width == 1 ? scale_rows<__half, 1>(problem) : scale_rows<__half, 8>(problem);
    case Dtype::bfloat16:
      return width == 1 ? scale_rows<__nv_bfloat16, 1>(problem) : scale_rows<__nv_bfloat16, 8>(problem);
  }
}

void launch_sum_partials(const float* partials, PartialLayout layout, int64_t cols, float* sums, cudaStream_t) {
  for (int64_t block = 0; block < PartialsBlock::blocks(cols); ++block) {
    PartialsBlock::Shared shared;
    for (int thread = 0; thread < PartialsBlock::kThreads; ++thread) {
      PartialsBlock::accumulate(partials, layout, cols, block, thread, shared);
    }
    for (int thread = 0; thread < PartialsBlock::kThreads; ++thread) {
      PartialsBlock::finish(cols, block, thread, shared, sums);
    }
  }
}

namespace {

template <class T>
struct HostLinear {
  static float at(const void* data, int64_t offset) { return to_float(static_cast<const T*>(data)[offset]); }

  static float accumulator(const LinearProblem& p, int64_t row, int64_t col) {
    float sum = 0.0f;
    for (int64_t k = 0; k < p.k; ++k) {
      sum += at(p.a, row * p.a_stride + k) * at(p.b, p.b_is_kn ? k * p.b_stride + col : col * p.b_stride + k);
    }
    return sum;
  }

  template <Epilogue kEpilogue, Tile kTile>
  static void run(const LinearProblem& p, void*, cudaStream_t) {
    host_gemm_columns = static_cast<int>(tile_shape(kTile).n);
    host_gemm_multiprocessors = p.multiprocessors;
    // what cuTensorMapEncodeTiled asks for
    for (const int64_t stride : {p.a_stride, p.b_stride, p.c_stride, p.n}) {
      if (stride % 8 != 0) throw std::runtime_error("a stride of " + std::to_string(stride) + " elements");
    }
    constexpr TileShape shape = tile_shape(kTile);
    const int64_t width = round_up(p.n, shape.n);
    constexpr bool reduces = kEpilogue == Epilogue::recompute || kEpilogue == Epilogue::input;
    if constexpr (reduces) {
      // CUTLASS stores whole tiles: what is past n is written too
      std::fill_n(p.partials, ceil_div(p.m, shape.m) * width, 0.0f);
    }
    for (int64_t row = 0; row < p.m; ++row) {
      for (int64_t col = 0; col < p.n; ++col) {
        const float acc = accumulator(p, row, col);
        const float gain = 1.0f + p.delta[col];
        float out = gain * acc;
        if constexpr (reduces) {
          const float c = at(p.c, row * p.c_stride + col);
          if (kEpilogue == Epilogue::recompute) out = gain * c;
          p.partials[row / shape.m * width + col] += acc * c;
        } else {
          out += p.bias ? at(p.bias, col) : -0.0f;
          if (kEpilogue == Epilogue::linear_z) static_cast<T*>(p.z)[row * p.n + col] = from_float<T>(acc);
        }
        static_cast<T*>(p.out)[row * p.n + col] = from_float<T>(out);
      }
    }
  }

  static size_t workspace(const LinearProblem&) { return 16; }

  static bool can_run(const LinearProblem& p) { return p.n % 8 == 0 && p.k % 8 == 0; }

  template <Epilogue kEpilogue>
  static LinearKernel kernel(Tile tile) {
    return {
        workspace, can_run,
        tile == Tile::large_128x256 ? run<kEpilogue, Tile::large_128x256> : run<kEpilogue, Tile::small_128x128>};
  }

  static LinearKernel kernel(Epilogue epilogue, Tile tile) {
    switch (epilogue) {
      case Epilogue::linear: return kernel<Epilogue::linear>(tile);
      case Epilogue::linear_z: return kernel<Epilogue::linear_z>(tile);
      case Epilogue::recompute: return kernel<Epilogue::recompute>(tile);
      case Epilogue::input: return kernel<Epilogue::input>(tile);
    }
    return {};
  }
};

}  // namespace

LinearKernel sm90_kernel(Epilogue epilogue, Dtype dtype, Tile tile, bool) {
  return dtype == Dtype::float16 ? HostLinear<__half>::kernel(epilogue, tile)
                                 : HostLinear<__nv_bfloat16>::kernel(epilogue, tile);
}

}  // namespace gain_ops
