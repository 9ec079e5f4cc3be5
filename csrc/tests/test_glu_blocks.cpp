// glu_blocks.h on the host: the activations against their formulas in double, the rest bit by bit against a loop.
#include <random>

#include "../glu_blocks.h"
#include "harness.h"

namespace gain_ops {
namespace {

constexpr Activation kAll[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu2};

ActivationAt activated(Activation activation, float x) {
  switch (activation) {
    case Activation::silu: return activate<Activation::silu>(x);
    case Activation::gelu: return activate<Activation::gelu>(x);
    case Activation::gelu_tanh: return activate<Activation::gelu_tanh>(x);
    default: return activate<Activation::relu2>(x);
  }
}

struct Truth {
  double value, slope, slope_terms;  // slope_terms: what is added to get the slope, by magnitude
};

// act and act' as the literature writes them.
Truth exact(Activation activation, double x) {
  const double pi = std::acos(-1.0);
  switch (activation) {
    case Activation::silu: {
      const double s = 1 / (1 + std::exp(-x));
      return {x * s, s * (1 + x * (1 - s)), s * (1 + std::fabs(x))};
    }
    case Activation::gelu: {
      const double cdf = std::erfc(-x / std::sqrt(2.0)) / 2, density = std::exp(-x * x / 2) / std::sqrt(2 * pi);
      return {x * cdf, cdf + x * density, 1 + std::fabs(x) * (1 + x * x) * density};
    }
    case Activation::gelu_tanh: {
      const double v = std::sqrt(2 / pi) * (x + 0.044715 * x * x * x), t = std::tanh(v);
      const double inner = std::sqrt(2 / pi) * (1 + 3 * 0.044715 * x * x);
      // 1 - sigmoid has the rounding of a sigmoid near 1; from 8 on it is 0
      const double cancelling = std::fabs(x) < 8 ? std::fabs(x) * inner * (1 + t) : 0;
      return {x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * inner, 1 + cancelling};
    }
    default: return {x > 0 ? x * x : 0, x > 0 ? 2 * x : 0, std::fabs(x)};
  }
}

TEST_CASE_TEMPLATE("activations and their slopes are right to some fp32 roundings", T, __half, __nv_bfloat16) {
  constexpr double kRoundings = 16 * 0x1p-24, kVanished = 0x1p-120;  // where expf(-x) overflows, silu is 0
  for (Activation activation : kAll) {
    CAPTURE(static_cast<int>(activation));
    int64_t wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const T number = from_bits<T>(bits);
      if (!is_finite<T>(bits) || std::fabs(decode(number)) > 60000) continue;  // relu2 stays finite in fp32
      const float x = to_float(number);
      const ActivationAt found = activated(activation, x);
      const Truth truth = exact(activation, x);
      const double magnitude = activation == Activation::relu2 ? truth.value : std::fabs(x);
      wrong += !(std::fabs(found.value - truth.value) <= kRoundings * magnitude + kVanished);
      wrong += !(std::fabs(found.slope - truth.slope) <= kRoundings * truth.slope_terms + kVanished);
    }
    CHECK(wrong == 0);
    CHECK(std::isnan(activated(activation, NAN).value));
    CHECK(std::isnan(activated(activation, NAN).slope));
  }
}

// One set of operands, and out, dgate and dup as a loop gives them.
template <class T>
struct Data {
  int64_t rows, cols;
  std::vector<T> gate, up, dh, out, dgate, dup;
  std::vector<float> delta;
  std::vector<Sum> partials;

  Data(int64_t rows, int64_t cols, Activation activation, bool gated) : rows(rows), cols(cols) {
    std::mt19937 bits(static_cast<uint32_t>(rows * 1000 + cols));
    const auto random = [&] { return static_cast<double>(bits()) * 0x1p-30 - 2; };
    for (auto* values : {&gate, &up, &dh}) {
      for (int64_t i = 0; i < rows * cols; ++i) values->push_back(encode<T>(random()));
    }
    for (int64_t i = 0; i < cols; ++i) delta.push_back(static_cast<float>(random()));
    partials.resize(row_partials(rows, cols).elements());
    for (int64_t i = 0; i < rows * cols; ++i) {
      const ActivationAt act = activated(activation, static_cast<float>(decode(gate[i])));
      const float gain = 1.0f + delta[i % cols], d = static_cast<float>(decode(dh[i]));
      const float other = gated ? static_cast<float>(decode(up[i])) : 1.0f;
      out.push_back(encode<T>(act.value * other * gain));
      dgate.push_back(encode<T>(d * gain * other * act.slope));
      dup.push_back(encode<T>(d * act.value * gain));
      partials[i / cols / rows_per_chunk(rows) * cols + i % cols].add(static_cast<double>(d) * act.value * other);
    }
  }
};

struct Kinds {
  Kind gate, up, dh, out;
};

template <class T, int kWidth>
void check_forward(const Data<T>& d, Activation activation, bool gated, const Kinds& kinds, Order order) {
  using Block = GluBlock<T, kWidth>;
  struct None {};
  Placed<T> gate(kinds.gate, d.rows, d.cols, 0, d.gate), up(kinds.up, d.rows, d.cols, 0, d.up);
  Placed<T> out(kinds.out, d.rows, d.cols, kGuard), expected(kinds.out, d.rows, d.cols, kGuard, d.out);
  const GluRows p{gate,      gated ? ConstMatrix(up) : ConstMatrix{nullptr, 0, 0}, d.delta.data(), out, d.rows, d.cols,
                  activation};
  execute<None>(
      0, Block::blocks(p), kRowThreads, order, [&](int64_t block, int thread, None&) { Block::run(p, block, thread); });
  CHECK(first_difference(out.memory, expected.memory) == -1);
}

template <class T, int kWidth, bool kWrites>
void check_backward(const Data<T>& d, Activation activation, bool gated, const Kinds& kinds) {
  using Block = GluBackwardBlock<T, kWidth, kWrites>;
  CAPTURE(kWrites);
  Placed<T> gate(kinds.gate, d.rows, d.cols, 0, d.gate), up(kinds.up, d.rows, d.cols, 0, d.up);
  Placed<T> dh(kinds.dh, d.rows, d.cols, 0, d.dh);
  std::vector<float> first;
  for (Order order : {Order::forward, Order::backward}) {
    Placed<T> dgate(kinds.out, d.rows, d.cols, kGuard), dup(kinds.out, d.rows, d.cols, kGuard);
    std::vector<float> partials = poisoned<float>(row_partials(d.rows, d.cols).elements() + 2 * kGuard);
    const ConstMatrix no_input{nullptr, 0, 0};
    const Matrix none{nullptr, 0, 0};
    const GluBackwardRows p{
        dh,
        gate,
        gated ? ConstMatrix(up) : no_input,
        kWrites ? d.delta.data() : nullptr,
        kWrites ? Matrix(dgate) : none,
        kWrites && gated ? Matrix(dup) : none,
        partials.data() + kGuard,
        d.rows,
        d.cols,
        activation};
    execute<typename Block::Shared>(
        0, Block::blocks(p), kRowThreads, order,
        [&](int64_t block, int thread, auto& shared) { Block::accumulate(p, block, thread, shared); },
        [&](int64_t block, int thread, const auto& shared) { Block::finish(p, block, thread, shared); });
    if constexpr (kWrites) {
      const Placed<T> expected(kinds.out, d.rows, d.cols, kGuard, d.dgate);
      CHECK(first_difference(dgate.memory, expected.memory) == -1);
    }
    if (kWrites && gated) {
      const Placed<T> expected(kinds.out, d.rows, d.cols, kGuard, d.dup);
      CHECK(first_difference(dup.memory, expected.memory) == -1);
    }
    CHECK(guards_hold(partials));
    CHECK(count_wrong(p.partials, d.partials, rows_per_chunk(d.rows) + 2) == 0);  // a term has two roundings itself
    if (first.empty()) {
      first = partials;
    } else {
      CHECK(first_difference(partials, first) == -1);
    }
  }
}

template <class T, int kWidth>
void check(const Data<T>& d, Activation activation, bool gated, const Kinds& kinds) {
  CAPTURE(kWidth);
  check_forward<T, kWidth>(d, activation, gated, kinds, Order::forward);
  check_forward<T, kWidth>(d, activation, gated, kinds, Order::backward);
  check_backward<T, kWidth, true>(d, activation, gated, kinds);
  check_backward<T, kWidth, false>(d, activation, gated, kinds);
}

TEST_CASE_TEMPLATE("glu rows: out, dgate, dup and ddelta in every layout", T, float, __half, __nv_bfloat16) {
  for (int64_t rows : {1, 31, 33, 129, 2049}) {
    for (int64_t cols : {1, 29, 256, 264}) {
      if (rows > 300 && cols > 29) continue;  // long chunks and wide rows are each enough
      for (Activation activation : kAll) {
        for (bool gated : {true, false}) {
          CAPTURE(rows);
          CAPTURE(cols);
          CAPTURE(static_cast<int>(activation));
          CAPTURE(gated);
          const Data<T> d(rows, cols, activation, gated);
          check<T, 1>(d, activation, gated, {Kind::padded, Kind::transposed, Kind::reversed, Kind::wide});
          if (vector_width(Format<T>::kDtype, cols, true) == kWide<T>) {
            check<T, kWide<T>>(d, activation, gated, {Kind::wide, Kind::padded, Kind::contiguous, Kind::padded});
          }
        }
      }
    }
  }
}

TEST_CASE("glu rows: the halves of a packed projection") {
  constexpr int64_t kRows = 33, kCols = 264;
  const Data<__half> d(kRows, kCols, Activation::silu, true);
  std::vector<__half> packed, written = poisoned<__half>(kRows * 2 * kCols), expected;
  for (int64_t row = 0; row < kRows; ++row) {
    for (const auto* half : {&d.gate, &d.up}) {
      packed.insert(packed.end(), half->begin() + row * kCols, half->begin() + (row + 1) * kCols);
    }
    for (const auto* half : {&d.dgate, &d.dup}) {
      expected.insert(expected.end(), half->begin() + row * kCols, half->begin() + (row + 1) * kCols);
    }
  }
  std::vector<float> partials(row_partials(kRows, kCols).elements());
  using Block = GluBackwardBlock<__half, 8, true>;
  const GluBackwardRows p{
      {d.dh.data(), kCols, 1},
      {packed.data(), 2 * kCols, 1},
      {packed.data() + kCols, 2 * kCols, 1},
      d.delta.data(),
      {written.data(), 2 * kCols, 1},
      {written.data() + kCols, 2 * kCols, 1},
      partials.data(),
      kRows,
      kCols,
      Activation::silu};
  execute<Block::Shared>(
      0, Block::blocks(p), kRowThreads, Order::forward,
      [&](int64_t block, int thread, auto& shared) { Block::accumulate(p, block, thread, shared); },
      [&](int64_t block, int thread, const auto& shared) { Block::finish(p, block, thread, shared); });
  CHECK(first_difference(written, expected) == -1);
}

}  // namespace
}  // namespace gain_ops
