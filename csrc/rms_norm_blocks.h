// What one thread of each kernel of rms_norm.cu does, on the device and, in tests/, on the host: phases of a row, with
// __syncthreads() between them.
#pragma once

#include <cmath>

#include "blocks.h"
#include "rms_norm.h"

namespace gain_ops {

// A row's sum over threads, in a fixed tree: every thread's own, then kLanes sums of kWarps, then their sum.
struct RowSum {
  float own[kRowThreads];
  alignas(16) float lanes[kLanes];

  GAIN_OPS_HD void fold(int thread) {
    if (thread >= kLanes) return;
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += own[warp * kLanes + thread];
    lanes[thread] = sum;
  }

  GAIN_OPS_HD float total() const {
    float sum = 0.0f;
#pragma unroll
    for (int lane = 0; lane < kLanes; lane += 4) {
      for (float value : load<4>(lanes + lane).values) sum += value;
    }
    return sum;
  }
};

// The first of two reads of a row: it stays in the caches for the second.
template <class T, int kWidth>
GAIN_OPS_HD Pack<T, kWidth> peek(const ConstMatrix& m, int64_t row, int64_t col) {
  const T* source = static_cast<const T*>(m.data) + row * m.row_stride + col * m.col_stride;
  return *reinterpret_cast<const Pack<T, kWidth>*>(source);
}

// weight * gain of kWidth columns
template <int kWidth>
GAIN_OPS_HD Pack<float, kWidth> load_factor(const float* weight, const float* delta) {
  Pack<float, kWidth> factor = load<kWidth>(weight);
  const Pack<float, kWidth> d = load<kWidth>(delta);
  for (int i = 0; i < kWidth; ++i) factor.values[i] *= 1.0f + d.values[i];
  return factor;
}

// A block of RmsNormRows: one row.
template <class T, int kWidth>
struct RmsNormBlock {
  GAIN_OPS_HD static void squares(const RmsNormRows& p, int64_t row, int thread, RowSum& shared) {
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

  GAIN_OPS_HD static void write(const RmsNormRows& p, int64_t row, int thread, const RowSum& shared) {
    const float r = 1.0f / sqrtf(shared.total() / static_cast<float>(p.cols) + p.eps);
    if (thread == 0) p.r[row] = r;
    for (int64_t col = thread * kWidth; col < p.cols; col += kRowThreads * kWidth) {
      const Pack<T, kWidth> x = load<T, kWidth>(p.x, row, col);
      const Pack<float, kWidth> factor = load_factor<kWidth>(p.weight + col, p.delta + col);
      Pack<T, kWidth> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out.values[i] = from_float<T>(to_float(x.values[i]) * r * factor.values[i]);
      store(p.out, row, col, out);
    }
  }
};

// A block of RmsNormBackwardRows: one chunk of rows in turn. `columns` is the block's own, spread over the banks;
// until end() each thread's part is its own.
template <class T, int kWidth>
struct RmsNormBackwardBlock {
  using Places = Spread<kWidth>;
  static constexpr int kEach = Places::kEach;
  using Group = Pack<float, kEach>;

  GAIN_OPS_HD static int64_t blocks(const RmsNormBackwardRows& p) { return ceil_div(p.rows, p.chunk); }

  GAIN_OPS_HD static int64_t first(const RmsNormBackwardRows& p, int64_t block) { return block * p.chunk; }
  GAIN_OPS_HD static int64_t last(const RmsNormBackwardRows& p, int64_t block) {
    const int64_t end = first(p, block + 1);
    return end < p.rows ? end : p.rows;
  }

  GAIN_OPS_HD static void begin(const RmsNormBackwardRows& p, int thread, float* columns) {
    for_each(p, thread, [&](int64_t col) {
      for (int i = 0; i < kWidth; i += kEach) at(p, columns, col + i) = Group{};
    });
  }

  // sum of v * n, v = dy * weight * gain, n = r * x
  GAIN_OPS_HD static void products(const RmsNormBackwardRows& p, int64_t row, int thread, RowSum& shared) {
    float sum = 0.0f;
    const float r = p.r[row];
    for_each(p, thread, [&](int64_t col) {
      const Pack<T, kWidth> dy = peek<T, kWidth>(p.dy, row, col), x = peek<T, kWidth>(p.x, row, col);
      const Pack<float, kWidth> factor = load_factor<kWidth>(p.weight + col, p.delta + col);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sum += to_float(dy.values[i]) * factor.values[i] * (r * to_float(x.values[i]));
      }
    });
    shared.own[thread] = sum;
  }

  GAIN_OPS_HD static void write(
      const RmsNormBackwardRows& p, int64_t row, int thread, const RowSum& shared, float* columns) {
    const float r = p.r[row], mean = shared.total() / static_cast<float>(p.cols);
    for_each(p, thread, [&](int64_t col) {
      const Pack<T, kWidth> dy = load<T, kWidth>(p.dy, row, col), x = load<T, kWidth>(p.x, row, col);
      const Pack<float, kWidth> factor = load_factor<kWidth>(p.weight + col, p.delta + col);
      Pack<T, kWidth> dx;
#pragma unroll
      for (int group = 0; group < kWidth; group += kEach) {
        Group sums = at(p, columns, col + group);
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const int i = group + j;
          const float d = to_float(dy.values[i]), n = r * to_float(x.values[i]);
          sums.values[j] += d * n;
          dx.values[i] = from_float<T>(r * (d * factor.values[i] - n * mean));
        }
        at(p, columns, col + group) = sums;
      }
      store(p.dx, row, col, dx);
    });
  }

  // In the order of memory, whoever summed.
  GAIN_OPS_HD static void end(const RmsNormBackwardRows& p, int64_t block, int thread, float* columns) {
    for (int64_t col = thread * kEach; col < p.cols; col += kRowThreads * kEach) {
      Group sums = at(p, columns, col);
      const Group weight = load<kEach>(p.weight + col);
      for (int j = 0; j < kEach; ++j) sums.values[j] *= weight.values[j];
      *reinterpret_cast<Group*>(p.partials + block * p.cols + col) = sums;
    }
  }

 private:
  GAIN_OPS_HD static Group& at(const RmsNormBackwardRows& p, float* columns, int64_t col) {
    return *reinterpret_cast<Group*>(columns + Places::place(static_cast<int>(col), static_cast<int>(p.cols)));
  }

  template <class Body>
  GAIN_OPS_HD static void for_each(const RmsNormBackwardRows& p, int thread, const Body& body) {
    for (int64_t col = thread * kWidth; col < p.cols; col += kRowThreads * kWidth) body(col);
  }
};

}  // namespace gain_ops
