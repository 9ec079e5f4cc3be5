// What one thread of each row kernel does, as functions of (block, thread) that run on the device and, in tests/, on
// the host: index arithmetic, vector accesses, tails and summation order are proven where no GPU is. A kernel is its
// phases with __syncthreads() between them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "partials.h"
#include "rows.h"

#define GAIN_OPS_HD __host__ __device__ __forceinline__

namespace gain_ops {

GAIN_OPS_HD float to_float(float value) { return value; }
GAIN_OPS_HD float to_float(__half value) { return __half2float(value); }
GAIN_OPS_HD float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// One rounding, to nearest even.
template <class T>
GAIN_OPS_HD T from_float(float value);
template <>
GAIN_OPS_HD float from_float<float>(float value) {
  return value;
}
template <>
GAIN_OPS_HD __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
GAIN_OPS_HD __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// kWidth neighbours of a row, moved in one access.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// Of kWidth floats those that are moved in one access.
template <int kWidth>
constexpr int kGroup = kWidth < 4 ? kWidth : 4;

// What is read is read once: it leaves the caches to what is written, which the next kernel reads.
template <class T, int kWidth>
GAIN_OPS_HD Pack<T, kWidth> load(const ConstMatrix& m, int64_t row, int64_t col) {
  const T* source = static_cast<const T*>(m.data) + row * m.row_stride + col * m.col_stride;
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Pack<T, kWidth>) == 16) {
    const int4 bits = __ldcs(reinterpret_cast<const int4*>(source));
    Pack<T, kWidth> pack;
    memcpy(&pack, &bits, sizeof(pack));
    return pack;
  }
#endif
  return *reinterpret_cast<const Pack<T, kWidth>*>(source);
}

template <class T, int kWidth>
GAIN_OPS_HD void store(const Matrix& m, int64_t row, int64_t col, const Pack<T, kWidth>& pack) {
  *reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(m.data) + row * m.row_stride + col * m.col_stride) = pack;
}

// kWidth neighbours of a vector over the columns, 16 bytes an access.
template <int kWidth>
GAIN_OPS_HD Pack<float, kWidth> load(const float* source) {
  using Group = Pack<float, kGroup<kWidth>>;
  Pack<float, kWidth> pack;
#pragma unroll
  for (int i = 0; i < kWidth; i += kGroup<kWidth>) {
    const Group group = *reinterpret_cast<const Group*>(source + i);
    for (int j = 0; j < kGroup<kWidth>; ++j) pack.values[i + j] = group.values[j];
  }
  return pack;
}

// fp32 columns in shared memory, of which a thread has kWidth neighbours: its first 16 bytes lie beside the first of
// the next thread, its second, half of the banks on, beside the second. So the threads' own and a row of neighbours are
// both free of bank conflicts, 16 bytes an access.
template <int kWidth>
struct Spread {
  static constexpr int kEach = kGroup<kWidth>;

  // Floats from the first 16 bytes of all to the second.
  GAIN_OPS_HD static constexpr int step(int cols) { return (cols / kWidth * kEach + 31) / 32 * 32 + 16; }
  // Floats that hold `cols`.
  GAIN_OPS_HD static constexpr int size(int cols) {
    return kWidth == kEach ? cols : step(cols) + cols / kWidth * kEach;
  }
  GAIN_OPS_HD static constexpr int place(int col, int cols) {
    return col % kWidth / kEach * step(cols) + col / kWidth * kEach + col % kEach;
  }
};

// Blocks side by side in memory are side by side in the grid.
template <int kColumns>
struct BlockPlace {
  int64_t chunk, col;
  GAIN_OPS_HD BlockPlace(int64_t block, int64_t cols) {
    const int64_t across = ceil_div(cols, kColumns);
    chunk = block / across;
    col = block % across * kColumns;
  }
};

// Each column's sum over a chunk of rows: every warp's own rows first, then the warps in their order.
template <int kWidth>
struct WarpSums {
  static constexpr int kColumns = kLanes * kWidth;
  using Places = Spread<kWidth>;

  alignas(16) float sums[kWarps][Places::size(kColumns)];

  GAIN_OPS_HD void put(int thread, const float (&running)[kWidth]) {
    using Group = Pack<float, kGroup<kWidth>>;
#pragma unroll
    for (int i = 0; i < kWidth; i += kGroup<kWidth>) {
      Group group;
      for (int j = 0; j < kGroup<kWidth>; ++j) group.values[j] = running[i + j];
      const int place = Places::place(thread % kLanes * kWidth + i, kColumns);
      *reinterpret_cast<Group*>(&sums[thread / kLanes][place]) = group;
    }
  }

  GAIN_OPS_HD void write(const BlockPlace<kColumns>& place, int64_t cols, int thread, float* partials) const {
    for (int i = thread; i < kColumns && place.col + i < cols; i += kRowThreads) {
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][Places::place(i, kColumns)];
      partials[place.chunk * cols + place.col + i] = sum;
    }
  }
};

// A block of BackwardRows: one chunk of rows of kColumns columns, a warp a row.
template <class T, int kWidth, bool kWrites>
struct BackwardBlock {
  static constexpr int kColumns = kLanes * kWidth;
  static constexpr int kUnroll = 4;  // rows in flight a warp: 2 x 4 x 16 bytes a thread cover the latency of HBM

  using Shared = WarpSums<kWidth>;

  GAIN_OPS_HD static int64_t blocks(const BackwardRows& p) {
    return ceil_div(p.cols, kColumns) * ceil_div(p.rows, p.chunk);
  }

  // Each warp sums every kWarps-th row of the chunk, in order, and writes out.
  GAIN_OPS_HD static void accumulate(const BackwardRows& p, int64_t block, int thread, Shared& shared) {
    const BlockPlace<kColumns> place(block, p.cols);
    const int warp = thread / kLanes;
    const int64_t col = place.col + thread % kLanes * kWidth;
    const int64_t first = place.chunk * p.chunk;
    const int rows = static_cast<int>(first + p.chunk < p.rows ? p.chunk : p.rows - first);
    float running[kWidth] = {};
    if (col < p.cols) {
      float gain[kWidth];
      if constexpr (kWrites) {
        const auto delta = load<kWidth>(p.delta + col);
        for (int i = 0; i < kWidth; ++i) gain[i] = 1.0f + delta.values[i];
      }
      for (int start = warp; start < rows; start += kWarps * kUnroll) {
        Pack<T, kWidth> in[kUnroll], other[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int row = start + u * kWarps;
          if (row < rows) {
            in[u] = load<T, kWidth>(p.in, first + row, col);
            other[u] = load<T, kWidth>(p.other, first + row, col);
          }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int row = start + u * kWarps;
          if (row < rows) {
            Pack<T, kWidth> written;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              const float value = to_float(in[u].values[i]);
              running[i] += value * to_float(other[u].values[i]);
              if constexpr (kWrites) written.values[i] = from_float<T>(gain[i] * value);
            }
            if constexpr (kWrites) store(p.out, first + row, col, written);
          }
        }
      }
    }
    shared.put(thread, running);
  }

  GAIN_OPS_HD static void finish(const BackwardRows& p, int64_t block, int thread, const Shared& shared) {
    shared.write(BlockPlace<kColumns>(block, p.cols), p.cols, thread, p.partials);
  }
};

// A block of ScaleRows: kRows rows of kColumns columns, a warp a row.
template <class T, int kWidth>
struct ScaleBlock {
  static constexpr int kColumns = kLanes * kWidth;
  static constexpr int kUnroll = 4;
  static constexpr int kRows = kWarps * kUnroll;

  GAIN_OPS_HD static int64_t blocks(const ScaleRows& p) { return ceil_div(p.cols, kColumns) * ceil_div(p.rows, kRows); }

  GAIN_OPS_HD static void run(const ScaleRows& p, int64_t block, int thread) {
    const BlockPlace<kColumns> place(block, p.cols);
    const int64_t col = place.col + thread % kLanes * kWidth;
    if (col >= p.cols) return;
    const int64_t start = place.chunk * kRows + thread / kLanes;
    Pack<T, kWidth> in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = start + u * kWarps;
      if (row < p.rows) in[u] = load<T, kWidth>(p.in, row, col);
    }
    float gain[kWidth] = {}, bias[kWidth];
    for (int i = 0; i < kWidth; ++i) bias[i] = -0.0f;  // which changes no sum, not even -0
    if (!p.by_row) {
      const auto delta = load<kWidth>(p.delta + col);
      for (int i = 0; i < kWidth; ++i) gain[i] = 1.0f + delta.values[i];
    }
    if (p.bias != nullptr) {
      const auto given = *reinterpret_cast<const Pack<T, kWidth>*>(static_cast<const T*>(p.bias) + col);
      for (int i = 0; i < kWidth; ++i) bias[i] = to_float(given.values[i]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = start + u * kWarps;
      if (row < p.rows) {
        const float row_gain = p.by_row ? 1.0f + p.delta[row] : 0.0f;
        Pack<T, kWidth> out;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          out.values[i] = from_float<T>((p.by_row ? row_gain : gain[i]) * to_float(in[u].values[i]) + bias[i]);
        }
        store(p.out, row, col, out);
      }
    }
  }
};

// A block of the second stage: kLanes columns, kStrands interleaved sums of each.
struct PartialsBlock {
  static constexpr int kStrands = 16;
  static constexpr int kThreads = kLanes * kStrands;

  struct Shared {
    float sums[kStrands][kLanes];
  };

  GAIN_OPS_HD static int64_t blocks(int64_t cols) { return ceil_div(cols, kLanes); }

  GAIN_OPS_HD static void accumulate(
      const float* partials, PartialLayout layout, int64_t cols, int64_t block, int thread, Shared& shared) {
    const int64_t col = block * kLanes + thread % kLanes;
    float running = 0.0f;
    if (col < cols) {
#pragma unroll 4
      for (int64_t row = thread / kLanes; row < layout.rows; row += kStrands)
        running += partials[row * layout.width + col];
    }
    shared.sums[thread / kLanes][thread % kLanes] = running;
  }

  GAIN_OPS_HD static void finish(int64_t cols, int64_t block, int thread, const Shared& shared, float* sums) {
    const int64_t col = block * kLanes + thread;
    if (thread >= kLanes || col >= cols) return;
    float sum = 0.0f;
    for (int strand = 0; strand < kStrands; ++strand) sum += shared.sums[strand][thread];
    sums[col] = sum;
  }
};

}  // namespace gain_ops
