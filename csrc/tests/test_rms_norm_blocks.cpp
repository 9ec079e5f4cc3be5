// rms_norm_blocks.h on the host, against sums in double; what follows from the sums, bit by bit.
#include <random>

#include "../rms_norm_blocks.h"
#include "harness.h"

namespace gain_ops {
namespace {

constexpr double kRounding = 0x1p-24;
constexpr float kEps = 1e-5f;

template <class T>
struct Data {
  int64_t rows, cols;
  std::vector<T> x, dy;
  std::vector<float> weight, delta;

  Data(int64_t rows, int64_t cols) : rows(rows), cols(cols) {
    std::mt19937 bits(static_cast<uint32_t>(rows * 1000 + cols));
    const auto random = [&] { return static_cast<double>(bits()) * 0x1p-30 - 2; };
    for (int64_t i = 0; i < rows * cols; ++i) x.push_back(encode<T>(random())), dy.push_back(encode<T>(random()));
    for (int64_t i = 0; i < cols; ++i) {
      weight.push_back(static_cast<float>(random())), delta.push_back(static_cast<float>(random()));
    }
  }
  float factor(int64_t col) const { return weight[col] * (1.0f + delta[col]); }
};

void fold(int64_t, int thread, RowSum& shared) { shared.fold(thread); }

// The kernels on every row: x, dy and what is written each in its layout.
template <class T, int kWidth>
void check_forward(const Data<T>& d, Kind in, Kind written, Order order) {
  using Block = RmsNormBlock<T, kWidth>;
  Placed<T> x(in, d.rows, d.cols, 0, d.x), out(written, d.rows, d.cols, kGuard);
  std::vector<float> r = poisoned<float>(d.rows + 2 * kGuard);
  const RmsNormRows p{x, d.weight.data(), d.delta.data(), out, r.data() + kGuard, d.rows, d.cols, kEps};
  execute<RowSum>(
      0, d.rows, kRowThreads, order,
      [&](int64_t row, int thread, RowSum& shared) { Block::squares(p, row, thread, shared); }, fold,
      [&](int64_t row, int thread, RowSum& shared) { Block::write(p, row, thread, shared); });
  CHECK(guards_hold(r));
  std::vector<T> expected;
  int64_t wrong = 0;
  for (int64_t row = 0; row < d.rows; ++row) {
    double squares = 0;
    for (int64_t col = 0; col < d.cols; ++col) squares += std::pow(decode(d.x[row * d.cols + col]), 2);
    const double truth = 1 / std::sqrt(squares / static_cast<double>(d.cols) + kEps);
    // half of the relative error of the sum, and of the division, the sum, the root and its inverse one rounding each
    wrong += !(std::fabs(p.r[row] - truth) <= (static_cast<double>(d.cols + 2) / 2 + 4) * kRounding * truth);
    for (int64_t col = 0; col < d.cols; ++col) {
      const float value = static_cast<float>(decode(d.x[row * d.cols + col]));
      expected.push_back(encode<T>(value * p.r[row] * d.factor(col)));
    }
  }
  CHECK(wrong == 0);
  CHECK(first_difference(out.memory, Placed<T>(written, d.rows, d.cols, kGuard, expected).memory) == -1);
}

template <class T, int kWidth>
void run_backward(const RmsNormBackwardRows& p, Order order) {
  using Block = RmsNormBackwardBlock<T, kWidth>;
  struct None {};
  for (int64_t block = 0; block < Block::blocks(p); ++block) {
    std::vector<float> columns(Block::Places::size(static_cast<int>(p.cols)), NAN);
    const auto alone = [&](const auto& phase) {
      execute<None>(0, 1, kRowThreads, order, [&](int64_t, int thread, None&) { phase(thread); });
    };
    alone([&](int thread) { Block::begin(p, thread, columns.data()); });
    for (int64_t row = Block::first(p, block); row < Block::last(p, block); ++row) {
      execute<RowSum>(
          row, row + 1, kRowThreads, order,
          [&](int64_t i, int thread, RowSum& shared) { Block::products(p, i, thread, shared); }, fold,
          [&](int64_t i, int thread, RowSum& shared) { Block::write(p, i, thread, shared, columns.data()); });
    }
    alone([&](int thread) { Block::end(p, block, thread, columns.data()); });
  }
}

template <class T, int kWidth>
void check_backward(const Data<T>& d, Kind in, Kind other, Kind written) {
  Placed<T> x(in, d.rows, d.cols, 0, d.x), dy(other, d.rows, d.cols, 0, d.dy);
  const PartialLayout layout = rms_norm_partials(d.rows, d.cols);
  const int64_t chunk = rms_norm_rows_per_chunk(d.rows);
  std::vector<float> r;
  for (int64_t row = 0; row < d.rows; ++row) r.push_back(0.5f + static_cast<float>(row % 7));
  std::vector<float> first;
  for (Order order : {Order::forward, Order::backward}) {
    Placed<T> dx(written, d.rows, d.cols, kGuard);
    std::vector<float> partials = poisoned<float>(layout.elements() + 2 * kGuard);
    const RmsNormBackwardRows p{dy,     x,     d.weight.data(), d.delta.data(), r.data(), dx, partials.data() + kGuard,
                                d.rows, d.cols};
    run_backward<T, kWidth>(p, order);

    std::vector<Sum> sums(layout.elements());
    int64_t wrong = 0;
    for (int64_t row = 0; row < d.rows; ++row) {
      Sum products;
      for (int64_t i = row * d.cols; i < (row + 1) * d.cols; ++i) {
        const double n = r[row] * decode(d.x[i]), gradient = decode(d.dy[i]);
        products.add(gradient * d.factor(i % d.cols) * n);
        sums[row / chunk * d.cols + i % d.cols].add(gradient * n * d.weight[i % d.cols]);
      }
      const double cols = static_cast<double>(d.cols), mean = products.value / cols;
      const double mean_error = (cols + 5) * kRounding * products.magnitude / cols;
      for (int64_t col = 0; col < d.cols; ++col) {
        const double n = r[row] * decode(d.x[row * d.cols + col]);
        const double through = decode(d.dy[row * d.cols + col]) * d.factor(col), truth = r[row] * (through - n * mean);
        const double error =
            r[row] * (std::fabs(n) * mean_error + 4 * kRounding * (std::fabs(through) + std::fabs(n * mean)));
        const double computed = decode(dx.memory[dx.layout(row, col)]);
        wrong += !(computed >= decode(encode<T>(truth - error)) && computed <= decode(encode<T>(truth + error)));
        dx.memory[dx.layout(row, col)] = from_bits<T>(0xFFFFFFFF);
      }
    }
    CHECK(wrong == 0);
    CHECK(first_difference(dx.memory, poisoned<T>(static_cast<int64_t>(dx.memory.size()))) == -1);  // nothing beside
    CHECK(guards_hold(partials));
    CHECK(count_wrong(p.partials, sums, chunk + 3) == 0);  // a term has three roundings itself
    if (first.empty()) {
      first = partials;
    } else {
      CHECK(first_difference(partials, first) == -1);
    }
  }
}

TEST_CASE_TEMPLATE("rms_norm rows: out, r, dx and ddelta in every layout", T, float, __half, __nv_bfloat16) {
  for (int64_t rows : {1, 16, 300, 515, 4100}) {  // chunks of 1, 2, 4 and 32
    for (int64_t cols : {1, 29, 256, 264, 2056}) {
      if (rows > 16 && cols > 264) continue;
      if (rows > 515 && cols > 29 && cols != 264) continue;
      CAPTURE(rows);
      CAPTURE(cols);
      const Data<T> d(rows, cols);
      check_forward<T, 1>(d, Kind::transposed, Kind::reversed, Order::forward);
      check_forward<T, 1>(d, Kind::padded, Kind::wide, Order::backward);
      check_backward<T, 1>(d, Kind::reversed, Kind::transposed, Kind::padded);
      if (vector_width(Format<T>::kDtype, cols, true) == kWide<T>) {
        check_forward<T, kWide<T>>(d, Kind::padded, Kind::contiguous, Order::forward);
        check_forward<T, kWide<T>>(d, Kind::contiguous, Kind::wide, Order::backward);
        check_backward<T, kWide<T>>(d, Kind::wide, Kind::padded, Kind::contiguous);
      }
    }
  }
}

TEST_CASE("rms_norm rows: a row of zeros has r = 1 / sqrt(eps) and a gradient that is finite") {
  Data<float> d(2, 264);
  std::fill(d.x.begin(), d.x.end(), 0.0f);
  check_forward<float, 4>(d, Kind::contiguous, Kind::contiguous, Order::forward);
  check_backward<float, 4>(d, Kind::contiguous, Kind::contiguous, Kind::contiguous);
}

}  // namespace
}  // namespace gain_ops
