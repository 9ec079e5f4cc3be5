// What one thread of each kernel of norm.cu does, on the device and, in tests/, on the host: phases of a row, with
// __syncthreads() between them.
#pragma once

#include <cmath>

#include "blocks.h"
#include "norm.h"

namespace gain_ops {

// A row's sum over threads, in a fixed tree: every thread's own, then kLanes sums of kWarps, then their sum.
struct RowSum {
  float own[kRowThreads];
  float lanes[kLanes];

  GAIN_OPS_HD void fold(int thread) {
    if (thread >= kLanes) return;
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += own[warp * kLanes + thread];
    lanes[thread] = sum;
  }

  GAIN_OPS_HD float total() const {
    float sum = 0.0f;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
  }
};

// The first of two reads of a row: it stays in the caches for the second.
template <class T, int kWidth>
GAIN_OPS_HD Pack<T, kWidth> peek(const ConstMatrix& m, int64_t row, int64_t col) {
  const T* source = static_cast<const T*>(m.data) + row * m.row_stride + col * m.col_stride;
  return *reinterpret_cast<const Pack<T, kWidth>*>(source);
}

// A block of NormRows: one row.
template <class T, int kWidth>
struct NormBlock {
  GAIN_OPS_HD static void squares(const NormRows& p, int64_t row, int thread, RowSum& shared) {
    float sum = 0.0f;
    for (int64_t col = thread * kWidth; col < p.cols; col += kRowThreads * kWidth) {
      const Pack<T, kWidth> x = peek<T, kWidth>(p.x, row, col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = to_float(x.values[i]);
        sum += value * value;
      }
    }
    shared.own[thread] = sum;
  }

  GAIN_OPS_HD static void write(const NormRows& p, int64_t row, int thread, const RowSum& shared) {
    const float r = 1.0f / sqrtf(shared.total() / static_cast<float>(p.cols) + p.eps);
    if (thread == 0) p.r[row] = r;
    for (int64_t col = thread * kWidth; col < p.cols; col += kRowThreads * kWidth) {
      const Pack<T, kWidth> x = load<T, kWidth>(p.x, row, col);
      Pack<T, kWidth> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float factor = p.weight[col + i] * (1.0f + p.delta[col + i]);
        out.values[i] = from_float<T>(to_float(x.values[i]) * r * factor);
      }
      store(p.out, row, col, out);
    }
  }
};

// A block of NormBackwardRows: kNormRows rows in turn. `columns` [cols] is the block's own, each thread's part its own.
template <class T, int kWidth>
struct NormBackwardBlock {
  GAIN_OPS_HD static int64_t blocks(const NormBackwardRows& p) { return ceil_div(p.rows, kNormRows); }

  GAIN_OPS_HD static int64_t first(int64_t block) { return block * kNormRows; }
  GAIN_OPS_HD static int64_t last(const NormBackwardRows& p, int64_t block) {
    const int64_t end = (block + 1) * kNormRows;
    return end < p.rows ? end : p.rows;
  }

  GAIN_OPS_HD static void begin(const NormBackwardRows& p, int thread, float* columns) {
    for_each(p, thread, [&](int64_t col) {
      for (int i = 0; i < kWidth; ++i) columns[col + i] = 0.0f;
    });
  }

  // sum of v * n, v = dy * weight * gain, n = r * x
  GAIN_OPS_HD static void products(const NormBackwardRows& p, int64_t row, int thread, RowSum& shared) {
    float sum = 0.0f;
    const float r = p.r[row];
    for_each(p, thread, [&](int64_t col) {
      const Pack<T, kWidth> dy = peek<T, kWidth>(p.dy, row, col), x = peek<T, kWidth>(p.x, row, col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum += to_float(dy.values[i]) * factor(p, col + i) * (r * to_float(x.values[i]));
      }
    });
    shared.own[thread] = sum;
  }

  GAIN_OPS_HD static void write(
      const NormBackwardRows& p, int64_t row, int thread, const RowSum& shared, float* columns) {
    const float r = p.r[row], mean = shared.total() / static_cast<float>(p.cols);
    for_each(p, thread, [&](int64_t col) {
      const Pack<T, kWidth> dy = load<T, kWidth>(p.dy, row, col), x = load<T, kWidth>(p.x, row, col);
      Pack<T, kWidth> dx;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float d = to_float(dy.values[i]), n = r * to_float(x.values[i]);
        columns[col + i] += d * n;
        dx.values[i] = from_float<T>(r * (d * factor(p, col + i) - n * mean));
      }
      store(p.dx, row, col, dx);
    });
  }

  GAIN_OPS_HD static void end(const NormBackwardRows& p, int64_t block, int thread, const float* columns) {
    for_each(p, thread, [&](int64_t col) {
      for (int i = 0; i < kWidth; ++i) p.partials[block * p.cols + col + i] = columns[col + i] * p.weight[col + i];
    });
  }

 private:
  GAIN_OPS_HD static float factor(const NormBackwardRows& p, int64_t col) {
    return p.weight[col] * (1.0f + p.delta[col]);
  }

  template <class Body>
  GAIN_OPS_HD static void for_each(const NormBackwardRows& p, int thread, const Body& body) {
    for (int64_t col = thread * kWidth; col < p.cols; col += kRowThreads * kWidth) body(col);
  }
};

}  // namespace gain_ops
