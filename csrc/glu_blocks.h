// What one thread of each kernel of glu.cu does, on the device and, in tests/, on the host.
#pragma once

#include <cmath>

#include "blocks.h"
#include "glu.h"

namespace gain_ops {

struct ActivationAt {
  float value, slope;
};

GAIN_OPS_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// act(x) and act'(x); NaN stays NaN.
template <Activation kActivation>
GAIN_OPS_HD ActivationAt activate(float x) {
  if constexpr (kActivation == Activation::silu) {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (kActivation == Activation::gelu) {
    const float cdf = 0.5f * (1.0f + erff(x * 0.70710678f));
    return {x * cdf, cdf + x * 0.39894228f * expf(-0.5f * x * x)};
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    // 1/2 (1 + tanh(v)) = sigmoid(2 v)
    const float square = x * x;
    const float s = sigmoid(1.59576912f * x * (1.0f + 0.044715f * square));
    return {x * s, s + x * s * (1.0f - s) * (1.59576912f * (1.0f + 0.134145f * square))};
  } else {
    const float r = x < 0.0f ? 0.0f : x;
    return {r * r, 2.0f * r};
  }
}

// A block of GluRows: kRows rows of kColumns columns, a warp a row.
template <class T, int kWidth>
struct GluBlock {
  static constexpr int kColumns = kLanes * kWidth;
  static constexpr int kUnroll = 4;
  static constexpr int kRows = kWarps * kUnroll;

  GAIN_OPS_HD static int64_t blocks(const GluRows& p) { return ceil_div(p.cols, kColumns) * ceil_div(p.rows, kRows); }

  GAIN_OPS_HD static void run(const GluRows& p, int64_t block, int thread) {
    switch (p.activation) {
      case Activation::silu: return run_as<Activation::silu>(p, block, thread);
      case Activation::gelu: return run_as<Activation::gelu>(p, block, thread);
      case Activation::gelu_tanh: return run_as<Activation::gelu_tanh>(p, block, thread);
      case Activation::relu2: return run_as<Activation::relu2>(p, block, thread);
    }
  }

 private:
  template <Activation kActivation>
  GAIN_OPS_HD static void run_as(const GluRows& p, int64_t block, int thread) {
    const BlockPlace<kColumns> place(block, p.cols);
    const int64_t col = place.col + thread % kLanes * kWidth;
    if (col >= p.cols) return;
    const int64_t start = place.chunk * kRows + thread / kLanes;
    const bool gated = p.up.data != nullptr;
    Pack<T, kWidth> gate[kUnroll], up[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = start + u * kWarps;
      if (row < p.rows) {
        gate[u] = load<T, kWidth>(p.gate, row, col);
        if (gated) up[u] = load<T, kWidth>(p.up, row, col);
      }
    }
    const auto delta = load<kWidth>(p.delta + col);
    float gain[kWidth];
    for (int i = 0; i < kWidth; ++i) gain[i] = 1.0f + delta.values[i];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = start + u * kWarps;
      if (row < p.rows) {
        Pack<T, kWidth> out;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float act = activate<kActivation>(to_float(gate[u].values[i])).value;
          out.values[i] = from_float<T>((gated ? act * to_float(up[u].values[i]) : act) * gain[i]);
        }
        store(p.out, row, col, out);
      }
    }
  }
};

// A block of GluBackwardRows: one chunk of rows of kColumns columns, a warp a row.
template <class T, int kWidth, bool kWrites>
struct GluBackwardBlock {
  static constexpr int kColumns = kLanes * kWidth;
  static constexpr int kUnroll = 1;  // rows in flight a warp: 3 x 16 bytes a thread; two rows spill on sm_100

  using Shared = WarpSums<kWidth>;

  GAIN_OPS_HD static int64_t blocks(const GluBackwardRows& p) {
    return ceil_div(p.cols, kColumns) * ceil_div(p.rows, p.chunk);
  }

  // Each warp sums every kWarps-th row of the chunk, in order, and writes dgate and dup.
  GAIN_OPS_HD static void accumulate(const GluBackwardRows& p, int64_t block, int thread, Shared& shared) {
    switch (p.activation) {
      case Activation::silu: return accumulate_as<Activation::silu>(p, block, thread, shared);
      case Activation::gelu: return accumulate_as<Activation::gelu>(p, block, thread, shared);
      case Activation::gelu_tanh: return accumulate_as<Activation::gelu_tanh>(p, block, thread, shared);
      case Activation::relu2: return accumulate_as<Activation::relu2>(p, block, thread, shared);
    }
  }

  GAIN_OPS_HD static void finish(const GluBackwardRows& p, int64_t block, int thread, const Shared& shared) {
    shared.write(BlockPlace<kColumns>(block, p.cols), p.cols, thread, p.partials);
  }

 private:
  template <Activation kActivation>
  GAIN_OPS_HD static void accumulate_as(const GluBackwardRows& p, int64_t block, int thread, Shared& shared) {
    const BlockPlace<kColumns> place(block, p.cols);
    const int warp = thread / kLanes;
    const int64_t col = place.col + thread % kLanes * kWidth;
    const int64_t first = place.chunk * p.chunk;
    const int64_t end = first + p.chunk;
    const int64_t last = end < p.rows ? end : p.rows;
    const bool gated = p.up.data != nullptr;
    float running[kWidth] = {};
    if (col < p.cols) {
      float gain[kWidth];
      if constexpr (kWrites) {
        const auto delta = load<kWidth>(p.delta + col);
        for (int i = 0; i < kWidth; ++i) gain[i] = 1.0f + delta.values[i];
      }
      for (int64_t start = first + warp; start < last; start += kWarps * kUnroll) {
        Pack<T, kWidth> dh[kUnroll], gate[kUnroll], up[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t row = start + u * kWarps;
          if (row < last) {
            dh[u] = load<T, kWidth>(p.dh, row, col);
            gate[u] = load<T, kWidth>(p.gate, row, col);
            if (gated) up[u] = load<T, kWidth>(p.up, row, col);
          }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t row = start + u * kWarps;
          if (row < last) {
            Pack<T, kWidth> dgate, dup;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              const ActivationAt act = activate<kActivation>(to_float(gate[u].values[i]));
              const float d = to_float(dh[u].values[i]);
              const float through = d * act.value;
              const float other = gated ? to_float(up[u].values[i]) : 1.0f;
              running[i] += through * other;
              if constexpr (kWrites) {
                dgate.values[i] = from_float<T>(d * gain[i] * other * act.slope);
                dup.values[i] = from_float<T>(through * gain[i]);
              }
            }
            if constexpr (kWrites) {
              store(p.dgate, row, col, dgate);
              if (gated) store(p.dup, row, col, dup);
            }
          }
        }
      }
    }
    shared.put(thread, running);
  }
};

}  // namespace gain_ops
