// Blocks on the host: every thread of every block, phase by phase, on memory in which every fault shows.
//
// Outputs lie between guard zones and everything starts as NaN, so what is not written, or written beside, shows.
// Inputs are allocated to the element, so that the sanitizers see a read past them.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../blocks.h"
#include "numbers.h"

namespace gain_ops {

enum class Order { forward, backward };

// Every thread ends a phase before any begins the next. Nothing may depend on the order otherwise: a device has none.
template <class Shared, class... Phases>
void execute(int64_t first, int64_t last, int threads, Order order, const Phases&... phases) {
  const auto at = [order](int64_t begin, int64_t end, int64_t i) {
    return order == Order::forward ? i : begin + end - 1 - i;
  };
  const auto shared = std::make_unique<Shared>();
  for (int64_t i = first; i < last; ++i) {
    std::memset(static_cast<void*>(shared.get()), 0xFF, sizeof(Shared));
    const auto every_thread = [&](const auto& phase) {
      for (int t = 0; t < threads; ++t) phase(at(first, last, i), static_cast<int>(at(0, threads, t)), *shared);
    };
    (every_thread(phases), ...);
  }
}

inline void run_partials(
    const float* partials, PartialLayout layout, int64_t cols, float* sums, Order order, int64_t first, int64_t last) {
  execute<PartialsBlock::Shared>(
      first, last, PartialsBlock::kThreads, order,
      [&](int64_t block, int thread, auto& shared) {
        PartialsBlock::accumulate(partials, layout, cols, block, thread, shared);
      },
      [&](int64_t block, int thread, const auto& shared) { PartialsBlock::finish(cols, block, thread, shared, sums); });
}

constexpr int64_t kGuard = 64;

template <class T>
std::vector<T> poisoned(int64_t elements) {
  return std::vector<T>(static_cast<size_t>(elements), from_bits<T>(0xFFFFFFFF));
}

// The first element whose bits differ, or -1.
template <class T>
int64_t first_difference(const std::vector<T>& a, const std::vector<T>& b) {
  REQUIRE(a.size() == b.size());
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0) return -1;
  size_t i = 0;
  while (bits_of(a[i]) == bits_of(b[i])) ++i;
  return static_cast<int64_t>(i);
}

// Whether nothing but [kGuard, size - kGuard) was written.
inline bool guards_hold(const std::vector<float>& memory) {
  const auto untouched = [](float value) { return bits_of(value) == 0xFFFFFFFF; };
  return std::all_of(memory.begin(), memory.begin() + kGuard, untouched) &&
         std::all_of(memory.end() - kGuard, memory.end(), untouched);
}

enum class Kind { contiguous, padded, wide, transposed, reversed, expanded };

// Where the elements of a matrix lie.
struct Layout {
  int64_t origin, row_stride, col_stride, extent;

  static Layout of(Kind kind, int64_t rows, int64_t cols) {
    const int64_t stride = cols + (kind == Kind::contiguous ? 0 : kind == Kind::wide ? 24 : 8);
    const int64_t extent = (rows - 1) * stride + cols;
    switch (kind) {
      case Kind::transposed: return {0, 1, rows, rows * cols};
      case Kind::reversed: return {extent - 1, -stride, -1, extent};
      case Kind::expanded: return {0, 0, 1, cols};
      default: return {0, stride, 1, extent};
    }
  }
  int64_t operator()(int64_t row, int64_t col) const { return origin + row * row_stride + col * col_stride; }
};

// A matrix in its layout, with `guard` elements around it.
template <class T>
struct Placed {
  Layout layout;
  std::vector<T> memory;

  Placed(Kind kind, int64_t rows, int64_t cols, int64_t guard)
      : layout(Layout::of(kind, rows, cols)), memory(poisoned<T>(layout.extent + 2 * guard)) {
    layout.origin += guard;
  }
  Placed(Kind kind, int64_t rows, int64_t cols, int64_t guard, const std::vector<T>& values)
      : Placed(kind, rows, cols, guard) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) memory[layout(r, c)] = values[r * cols + c];
    }
  }
  T* data() { return memory.data() + layout.origin; }
  operator ConstMatrix() { return {data(), layout.row_stride, layout.col_stride}; }
  operator Matrix() { return {data(), layout.row_stride, layout.col_stride}; }
  bool aligned(int64_t rows) { return rows_aligned(data(), rows, layout.row_stride, layout.col_stride, sizeof(T)); }
};

// Elements that a thread moves in 16 bytes.
template <class T>
constexpr int kWide = 16 / sizeof(T);

}  // namespace gain_ops
