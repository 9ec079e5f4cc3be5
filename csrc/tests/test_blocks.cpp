// blocks.h on the host: every thread of every block, phase by phase, against loops in double.
#include <sys/mman.h>

#include <limits>
#include <random>

#include "../launch.h"
#include "harness.h"

namespace gain_ops {
namespace {

template <class Block>
void run_backward(const BackwardRows& p, Order order, int64_t first, int64_t last) {
  execute<typename Block::Shared>(
      first, last, kRowThreads, order,
      [&](int64_t block, int thread, auto& shared) { Block::accumulate(p, block, thread, shared); },
      [&](int64_t block, int thread, const auto& shared) { Block::finish(p, block, thread, shared); });
}

template <class Block>
void run_scale(const ScaleRows& p, Order order, int64_t first, int64_t last) {
  struct None {};
  execute<None>(
      first, last, kRowThreads, order, [&](int64_t block, int thread, None&) { Block::run(p, block, thread); });
}

// One set of operands and all that should come of them. The rows of constant data are alike: they can be expanded.
template <class T>
struct Data {
  int64_t rows, cols;
  std::vector<T> in, other, bias;
  std::vector<float> column_delta, row_delta;
  std::vector<T> scaled[2][2];  // [by_row][with bias]
  std::vector<Sum> partials, sums;

  Data(int64_t rows, int64_t cols, bool constant = false) : rows(rows), cols(cols) {
    std::mt19937 bits(static_cast<uint32_t>(rows * 1000 + cols));
    const auto random = [&] { return static_cast<double>(bits()) * 0x1p-30 - 2; };
    const auto fill = [&](auto& values, int64_t elements) {
      using Value = typename std::decay_t<decltype(values)>::value_type;
      values.resize(static_cast<size_t>(elements));
      for (auto& value : values) value = encode<Value>(random());
    };
    fill(in, rows * cols);
    fill(other, rows * cols);
    fill(bias, cols);
    fill(column_delta, cols);
    fill(row_delta, rows);
    if (constant) {
      for (int64_t i = cols; i < rows * cols; ++i) in[i] = in[i - cols], other[i] = other[i - cols];
    }
    for (int by_row : {0, 1}) {
      for (int biased : {0, 1}) scaled[by_row][biased] = scale(by_row, biased);
    }
    partials.resize(row_partials(rows, cols).elements());
    sums.resize(cols);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const double term = decode(in[i]) * decode(other[i]);
      partials[i / cols / rows_per_chunk(rows) * cols + i % cols].add(term);
      sums[i % cols].add(term);
    }
  }

  std::vector<T> scale(bool by_row, bool biased) const {
    std::vector<T> out(in.size());
    for (int64_t i = 0; i < rows * cols; ++i) {
      const float gain = 1.0f + (by_row ? row_delta[i / cols] : column_delta[i % cols]);
      const float product = gain * static_cast<float>(decode(in[i]));
      out[i] = encode<T>(biased ? product + static_cast<float>(decode(bias[i % cols])) : product);
    }
    return out;
  }
};

struct Kinds {
  Kind in, other, out;
};

template <class T, int kWidth, bool kWrites>
void check_backward(const Data<T>& d, const Kinds& kinds, Order order) {
  using Block = BackwardBlock<T, kWidth, kWrites>;
  CAPTURE(kWrites);
  Placed<T> in(kinds.in, d.rows, d.cols, 0, d.in), other(kinds.other, d.rows, d.cols, 0, d.other);
  Placed<T> out(kinds.out, d.rows, d.cols, kGuard), expected(kinds.out, d.rows, d.cols, kGuard, d.scaled[0][0]);
  if constexpr (kWidth > 1) REQUIRE((in.aligned(d.rows) && other.aligned(d.rows) && out.aligned(d.rows)));
  const PartialLayout layout = row_partials(d.rows, d.cols);
  std::vector<float> partials = poisoned<float>(layout.elements() + 2 * kGuard);
  std::vector<float> sums = poisoned<float>(d.cols + 2 * kGuard);
  const BackwardRows p{
      in,
      other,
      kWrites ? d.column_delta.data() : nullptr,
      kWrites ? Matrix(out) : Matrix{nullptr, 0, 0},
      partials.data() + kGuard,
      d.rows,
      d.cols};
  run_backward<Block>(p, order, 0, Block::blocks(p));
  if constexpr (kWrites) CHECK(first_difference(out.memory, expected.memory) == -1);
  CHECK(guards_hold(partials));
  CHECK(count_wrong(p.partials, d.partials, rows_per_chunk(d.rows)) == 0);

  run_partials(p.partials, layout, d.cols, sums.data() + kGuard, order, 0, PartialsBlock::blocks(d.cols));
  CHECK(guards_hold(sums));
  CHECK(count_wrong(sums.data() + kGuard, d.sums, d.rows) == 0);

  if (order == Order::forward) {
    const std::vector<float> first_partials = partials, first_sums = sums;
    run_backward<Block>(p, Order::backward, 0, Block::blocks(p));
    run_partials(p.partials, layout, d.cols, sums.data() + kGuard, Order::backward, 0, PartialsBlock::blocks(d.cols));
    CHECK(first_difference(partials, first_partials) == -1);
    CHECK(first_difference(sums, first_sums) == -1);
  }
}

template <class T, int kWidth>
void check_scale(const Data<T>& d, const Kinds& kinds, Order order) {
  using Block = ScaleBlock<T, kWidth>;
  Placed<T> in(kinds.in, d.rows, d.cols, 0, d.in);
  for (bool by_row : {false, true}) {
    for (bool biased : {false, true}) {
      CAPTURE(by_row);
      CAPTURE(biased);
      Placed<T> out(kinds.out, d.rows, d.cols, kGuard);
      const Placed<T> expected(kinds.out, d.rows, d.cols, kGuard, d.scaled[by_row][biased]);
      const ScaleRows p{
          in,    (by_row ? d.row_delta : d.column_delta).data(), biased ? d.bias.data() : nullptr, out, d.rows, d.cols,
          by_row};
      run_scale<Block>(p, order, 0, Block::blocks(p));
      CHECK(first_difference(out.memory, expected.memory) == -1);
    }
  }
}

template <class T, int kWidth>
void check_blocks(const Data<T>& d, const std::vector<Kinds>& layouts) {
  CAPTURE(kWidth);
  Order order = Order::forward;
  for (const Kinds& kinds : layouts) {
    CAPTURE(static_cast<int>(kinds.in));
    check_backward<T, kWidth, true>(d, kinds, order);
    check_backward<T, kWidth, false>(d, kinds, order);
    check_scale<T, kWidth>(d, kinds, order);
    order = Order::backward;
  }
}

TEST_CASE_TEMPLATE("rows: dz, ddelta and scaled rows in every layout", T, float, __half, __nv_bfloat16) {
  for (int64_t rows : {1, 7, 8, 9, 129, 300, 600, 2049, 4100}) {  // chunks of 8, 16, 64 and 128
    for (int64_t cols : {1, 8, 29, 31, 256, 264, 520}) {
      if (rows > 600 && cols > 31 && cols != 264) continue;
      CAPTURE(rows);
      CAPTURE(cols);
      const bool divides = vector_width(Format<T>::kDtype, cols, true) == kWide<T>;
      CHECK(divides == (cols % 8 == 0));
      const Data<T> data(rows, cols);
      check_blocks<T, 1>(
          data, {{Kind::contiguous, Kind::contiguous, Kind::contiguous},
                 {Kind::padded, Kind::transposed, Kind::reversed},
                 {Kind::transposed, Kind::reversed, Kind::padded},
                 {Kind::reversed, Kind::padded, Kind::transposed}});
      if (divides) {
        check_blocks<T, kWide<T>>(
            data, {{Kind::contiguous, Kind::contiguous, Kind::contiguous},
                   {Kind::padded, Kind::contiguous, Kind::wide},
                   {Kind::wide, Kind::padded, Kind::contiguous}});
      }
      if (rows > 300) continue;
      const Data<T> constant(rows, cols, true);
      check_blocks<T, 1>(
          constant,
          {{Kind::expanded, Kind::transposed, Kind::reversed}, {Kind::padded, Kind::expanded, Kind::contiguous}});
      if (divides) {
        check_blocks<T, kWide<T>>(
            constant,
            {{Kind::expanded, Kind::padded, Kind::contiguous}, {Kind::contiguous, Kind::expanded, Kind::wide}});
      }
    }
  }
}

// Wavefronts of an access of `floats` a thread: 128 bytes at once, one word of a bank at a time.
template <class Place>
int wavefronts(int threads, int floats, const Place& place) {
  int total = 0;
  for (int first = 0; first < threads; first += 32 / floats) {
    int words[32] = {};
    for (int thread = first; thread < first + 32 / floats; ++thread) {
      for (int i = 0; i < floats; ++i) ++words[(place(thread) + i) % 32];
    }
    total += *std::max_element(words, words + 32);
  }
  return total;
}

template <int kWidth>
void check_spread(int cols) {
  using Places = Spread<kWidth>;
  CAPTURE(kWidth);
  CAPTURE(cols);
  constexpr int kEach = Places::kEach, kBest = kLanes * kEach / 32;
  std::vector<int> taken(Places::size(cols));
  int64_t split = 0, conflicts = 0;
  for (int col = 0; col < cols; ++col) {
    const int place = Places::place(col, cols), first = Places::place(col - col % kEach, cols);
    REQUIRE(place < Places::size(cols));
    ++taken[place];
    split += place != first + col % kEach || first % kEach != 0;
  }
  const auto conflict = [&](int floats, int best, const auto& column) {
    return wavefronts(kLanes, floats, [&](int lane) { return Places::place(column(lane), cols); }) != best;
  };
  for (int i = 0; i < kWidth; i += kEach) {
    conflicts += conflict(kEach, kBest, [&](int lane) { return lane * kWidth + i; });
  }
  for (int first = 0; first + kLanes * kEach <= cols; first += kLanes * kEach) {
    conflicts += conflict(kEach, kBest, [&](int lane) { return first + lane * kEach; });
    conflicts += conflict(1, 1, [&](int lane) { return first + lane; });
  }
  CHECK(*std::max_element(taken.begin(), taken.end()) == 1);
  CHECK(split == 0);
  CHECK(conflicts == 0);
}

TEST_CASE("column sums in shared memory: each has a place of its own, and no access a bank conflict") {
  for (int cols : {256, 264, 288, 1280, 4096, 24000}) {
    check_spread<1>(cols);
    check_spread<4>(cols);
    check_spread<8>(cols);
  }
}

TEST_CASE("partials: sums of padded rows, in any number") {
  std::mt19937 bits(1);
  for (int64_t rows : {1, 2, 15, 16, 17, 31, 33, 300}) {
    for (int64_t cols : {1, 8, 29, 31, 32, 33, 256, 264, 520}) {
      for (int64_t width : {cols, round_up(cols, 256)}) {
        CAPTURE(rows);
        CAPTURE(cols);
        CAPTURE(width);
        std::vector<float> partials = poisoned<float>((rows - 1) * width + cols);
        std::vector<Sum> truth(cols);
        for (int64_t i = 0; i < rows * cols; ++i) {
          float& partial = partials[i / cols * width + i % cols];
          partial = static_cast<float>(static_cast<double>(bits()) * 0x1p-30 - 2);
          truth[i % cols].add(partial);
        }
        std::vector<float> sums[2];
        for (Order order : {Order::forward, Order::backward}) {
          std::vector<float>& run = sums[static_cast<int>(order)] = poisoned<float>(cols + 2 * kGuard);
          run_partials(
              partials.data(), {rows, width}, cols, run.data() + kGuard, order, 0, PartialsBlock::blocks(cols));
          CHECK(guards_hold(run));
          CHECK(count_wrong(run.data() + kGuard, truth, rows) == 0);
        }
        CHECK(first_difference(sums[0], sums[1]) == -1);
      }
    }
  }
}

// Every finite number of 16 bits; of float, as many of its own. Wide enough for vectors.
template <class T>
Data<T> numbers() {
  Data<T> d(256, 256);
  std::mt19937 random(1);
  for (uint32_t i = 0; i < d.in.size(); ++i) {
    const uint32_t bits = sizeof(T) == 2 ? i : static_cast<uint32_t>(random());
    d.in[i] = from_bits<T>(is_finite<T>(bits) ? bits : bits & sign_bit<T>);
    d.other[i] = from_bits<T>(0);
  }
  return d;
}

// out of both kernels, the gain being 1 + delta
template <class T, int kWidth>
std::vector<std::vector<T>> gained(Data<T>& d, float delta) {
  std::vector<std::vector<T>> outs;
  const std::vector<float> deltas(256, delta);
  std::vector<float> partials(row_partials(d.rows, d.cols).elements());
  const ConstMatrix in{d.in.data(), d.cols, 1}, other{d.other.data(), d.cols, 1};
  const auto out = [&] { return Matrix{outs.emplace_back(poisoned<T>(d.rows * d.cols)).data(), d.cols, 1}; };
  using Backward = BackwardBlock<T, kWidth, true>;
  const BackwardRows backward{in, other, deltas.data(), out(), partials.data(), d.rows, d.cols};
  run_backward<Backward>(backward, Order::forward, 0, Backward::blocks(backward));
  for (bool by_row : {false, true}) {
    const ScaleRows scale{in, deltas.data(), nullptr, out(), d.rows, d.cols, by_row};
    run_scale<ScaleBlock<T, kWidth>>(scale, Order::forward, 0, ScaleBlock<T, kWidth>::blocks(scale));
  }
  return outs;
}

template <class T, int kWidth>
void check_special_gains() {
  CAPTURE(kWidth);
  Data<T> d = numbers<T>();
  for (const std::vector<T>& out : gained<T, kWidth>(d, 0.0f)) CHECK(first_difference(out, d.in) == -1);
  for (const std::vector<T>& out : gained<T, kWidth>(d, -1.0f)) {
    CHECK(std::count_if(out.begin(), out.end(), [](T value) { return decode(value) != 0; }) == 0);
  }
}

TEST_CASE_TEMPLATE("a gain of one keeps every bit, a gain of zero leaves zeros", T, float, __half, __nv_bfloat16) {
  check_special_gains<T, 1>();
  check_special_gains<T, kWide<T>>();
}

TEST_CASE_TEMPLATE("from_float rounds once, to nearest even; to_float is exact", T, __half, __nv_bfloat16) {
  int64_t wrong = 0;
  const auto check = [&](float value) { wrong += bits_of(from_float<T>(value)) != bits_of(encode<T>(value)); };
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    if (!is_finite<T>(bits)) continue;
    const float value = static_cast<float>(decode(from_bits<T>(bits)));
    wrong += bits_of(to_float(from_bits<T>(bits))) != bits_of(value);
    check(value);
    if (!is_finite<T>(bits + 1)) continue;
    // The tie with the next number away from zero, and its neighbours.
    const float tie = 0.5f * value + 0.5f * static_cast<float>(decode(from_bits<T>(bits + 1)));
    for (float near : {std::nextafter(tie, -INFINITY), tie, std::nextafter(tie, INFINITY)}) check(near);
  }
  for (float large : {65519.0f, 65520.0f, 65536.0f, std::numeric_limits<float>::max()}) check(large), check(-large);
  CHECK(wrong == 0);
}

// ---- indices beyond 32 bits ----

// Address space of which only touched pages exist.
class Sparse {
 public:
  explicit Sparse(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(data_ != MAP_FAILED);
  }
  ~Sparse() { munmap(data_, bytes_); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_;
};

constexpr int64_t kFar = (int64_t{1} << 30) + 8;  // two steps leave the 32-bit range

// [3, cols] whose third row, or column, is more than 2^31 elements away.
template <class T, int kWidth>
void check_far(int64_t cols, int64_t row_stride, int64_t col_stride) {
  const Data<T> d(3, cols);
  const int64_t bytes = (2 * row_stride + (cols - 1) * col_stride + 1) * static_cast<int64_t>(sizeof(T));
  const Sparse in(bytes), other(bytes), out(bytes);
  const auto at = [&](const Sparse& memory, int64_t i) -> T& {
    return memory.as<T>()[i / cols * row_stride + i % cols * col_stride];
  };
  for (int64_t i = 0; i < 3 * cols; ++i) at(in, i) = d.in[i], at(other, i) = d.other[i];
  const auto matrix = [&](const Sparse& memory) { return Matrix{memory.as<T>(), row_stride, col_stride}; };
  const auto const_matrix = [&](const Sparse& memory) { return ConstMatrix{memory.as<T>(), row_stride, col_stride}; };
  const auto count_different = [&] {
    int64_t different = 0;
    for (int64_t i = 0; i < 3 * cols; ++i) different += bits_of(at(out, i)) != bits_of(d.scaled[0][0][i]);
    return different;
  };

  std::vector<float> partials(cols);
  using Backward = BackwardBlock<T, kWidth, true>;
  const BackwardRows backward{
      const_matrix(in), const_matrix(other), d.column_delta.data(), matrix(out), partials.data(), 3, cols};
  run_backward<Backward>(backward, Order::forward, 0, Backward::blocks(backward));
  CHECK(count_different() == 0);
  CHECK(count_wrong(partials.data(), d.partials, 3) == 0);

  for (int64_t i = 0; i < 3 * cols; ++i) at(out, i) = from_bits<T>(0);
  using Scale = ScaleBlock<T, kWidth>;
  const ScaleRows scale{const_matrix(in), d.column_delta.data(), nullptr, matrix(out), 3, cols, false};
  run_scale<Scale>(scale, Order::forward, 0, Scale::blocks(scale));
  CHECK(count_different() == 0);
}

TEST_CASE("strides beyond 2^31 elements") {
  check_far<__half, 1>(8, kFar, 1);
  check_far<__half, 8>(8, kFar, 1);
  check_far<__half, 1>(3, 1, kFar);
}

TEST_CASE("more than 2^31 rows") {
  constexpr int64_t kRows = (int64_t{1} << 31) + 41;
  const Sparse in(kRows * 2), out(kRows * 2), delta(kRows * 4);
  in.as<__half>()[kRows - 1] = encode<__half>(3);
  delta.as<float>()[kRows - 1] = 1;

  using Scale = ScaleBlock<__half, 1>;
  const ScaleRows scale{{in.as<__half>(), 1, 1}, delta.as<float>(), nullptr, {out.as<__half>(), 1, 1}, kRows, 1, true};
  run_scale<Scale>(scale, Order::forward, Scale::blocks(scale) - 1, Scale::blocks(scale));
  CHECK(decode(out.as<__half>()[kRows - 1]) == 6);

  using Backward = BackwardBlock<__half, 1, true>;
  const PartialLayout layout = row_partials(kRows, 1);
  const Sparse partials(layout.elements() * 4);
  const BackwardRows backward{scale.in, scale.in, delta.as<float>(), {out.as<__half>(), 1, 1}, partials.as<float>(),
                              kRows,    1};
  run_backward<Backward>(backward, Order::forward, Backward::blocks(backward) - 1, Backward::blocks(backward));
  CHECK(decode(out.as<__half>()[kRows - 1]) == 3);
  CHECK(partials.as<float>()[layout.rows - 1] == 9);
}

TEST_CASE("more than 2^31 partial sums") {
  constexpr int64_t kRows = 17;  // three chunks
  const float two = 2;
  const ConstMatrix in{&two, 0, 0};
  const PartialLayout layout = row_partials(kRows, kFar);
  REQUIRE(layout.elements() > int64_t{1} << 31);
  const Sparse partials(layout.elements() * 4), sums(kFar * 4);
  using Block = BackwardBlock<float, 1, false>;
  const BackwardRows p{in, in, nullptr, {nullptr, 0, 0}, partials.as<float>(), kRows, kFar};
  run_backward<Block>(p, Order::forward, Block::blocks(p) - 1, Block::blocks(p));
  CHECK(partials.as<float>()[layout.elements() - 1] == 4);

  run_partials(
      p.partials, layout, kFar, sums.as<float>(), Order::forward, PartialsBlock::blocks(kFar) - 1,
      PartialsBlock::blocks(kFar));
  CHECK(sums.as<float>()[kFar - 1] == 4);
}

TEST_CASE("a grid has at most 2^31 - 1 blocks") {
  const int64_t most = std::numeric_limits<int>::max();
  CHECK(grid_size(1, "a_kernel") == 1);
  CHECK(grid_size(most, "a_kernel") == most);
  CHECK_THROWS_WITH(
      grid_size(most + 1, "a_kernel"), "gain_ops: a_kernel would need 2147483648 blocks and a grid has 2^31 - 1");
}

}  // namespace
}  // namespace gain_ops
