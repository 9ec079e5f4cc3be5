// plan.h: every decision of the host before a launch.
#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../plan.h"

namespace gain_ops {
namespace {

// Ints, so that doctest prints them.
enum { kLarge = static_cast<int>(Tile::large_128x256), kSmall = static_cast<int>(Tile::small_128x128) };

int chosen(int64_t m, int64_t n, int multiprocessors) { return static_cast<int>(choose_tile(m, n, multiprocessors)); }

TEST_CASE("ceil_div and round_up at the boundaries, and beyond 32 bits") {
  static_assert(std::is_same_v<decltype(ceil_div(1, 1)), int64_t>);
  CHECK(ceil_div(0, 8) == 0);
  CHECK(ceil_div(1, 8) == 1);
  CHECK(ceil_div(8, 8) == 1);
  CHECK(ceil_div(9, 8) == 2);
  CHECK(ceil_div((int64_t{1} << 40) + 1, 1 << 10) == (int64_t{1} << 30) + 1);
  CHECK(round_up(0, 256) == 0);
  CHECK(round_up(1, 256) == 256);
  CHECK(round_up(256, 256) == 256);
  CHECK(round_up(257, 256) == 512);
  CHECK(round_up((int64_t{1} << 40) + 1, 256) == (int64_t{1} << 40) + 256);
}

TEST_CASE("element_size") {
  CHECK(element_size(Dtype::float32) == 4);
  CHECK(element_size(Dtype::float16) == 2);
  CHECK(element_size(Dtype::bfloat16) == 2);
}

TEST_CASE("tile_shape says what the tile's name says") {
  constexpr TileShape large = tile_shape(Tile::large_128x256), small = tile_shape(Tile::small_128x128);
  CHECK(large.m == 128);
  CHECK(large.n == 256);
  CHECK(large.cluster_m == 2);
  CHECK(small.m == 128);
  CHECK(small.n == 128);
  CHECK(small.cluster_m == 1);
}

TEST_CASE("choose_tile: large for large problems, small where large tiles leave the chip idle") {
  for (int multiprocessors : {78, 132}) {
    CAPTURE(multiprocessors);
    for (int64_t n : {2048, 4096, 11008, 28672, 128256}) {
      CAPTURE(n);
      CHECK(chosen(65536, n, multiprocessors) == kLarge);
      CHECK(chosen(int64_t{1} << 33, n, multiprocessors) == kLarge);  // up to 2^35 tiles
    }
    for (int64_t n : {128, 1024, 4096}) {
      CAPTURE(n);
      CHECK(chosen(1, n, multiprocessors) == kSmall);
      CHECK(chosen(128, n, multiprocessors) == kSmall);
    }
    CHECK(chosen(512, 512, multiprocessors) == kSmall);
  }
}

TEST_CASE("choose_tile counts waves") {
  struct Case {
    int64_t m, n;
    int multiprocessors, expected;
    const char* why;
  };
  for (const Case& c : std::vector<Case>{
           {1024, 4096, 132, kLarge, "128 large in 1 wave, 256 small in 2"},
           {1025, 4096, 132, kSmall, "160 large in 2 waves, 288 small in 3"},
           {640, 4096, 132, kLarge, "96 large in 1 wave, 160 small in 2"},
           {640, 4096, 78, kSmall, "96 large in 2 waves, 160 small in 3"},
           {512, 4096, 78, kLarge, "64 large in 1 wave, 128 small in 2"},
           {128, 33792, 132, kSmall, "a cluster is two tiles high: 264 large in 2 waves, 264 small in 2"},
           {2816, 8448, 132, kSmall, "6 large waves cost 12, 11 small ones 11.88"},
           {3328, 8448, 132, kLarge, "7 large waves cost 14, 13 small ones 14.04"},
       }) {
    CAPTURE(std::string(c.why));
    CHECK(chosen(c.m, c.n, c.multiprocessors) == c.expected);
  }
}

TEST_CASE("choose_tile: sizes that end within the large tile, with an odd row of tiles in its cluster") {
  struct Case {
    int64_t m, n;
    int multiprocessors, expected;
    const char* why;
  };
  for (const Case& c : std::vector<Case>{
           {4097, 2312, 132, kSmall, "340 large in 3 waves cost 6, 627 small in 5 cost 5.4"},
           {4097, 2312, 114, kLarge, "340 large in 3 waves cost 6, 627 small in 6 cost 6.48"},
           {4097, 2312, 78, kSmall, "340 large in 5 waves cost 10, 627 small in 9 cost 9.72"},
           {769, 2312, 132, kLarge, "80 large in 1 wave, 133 small in 2"},
           {300, 5640, 132, kLarge, "92 large in 1 wave, 135 small in 2"},
           {300, 200, 132, kSmall, "4 large in 1 wave, 6 small in 1"},
           {300, 200, 4, kLarge, "4 large in 1 wave, 6 small in 2"},
           {300, 136, 4, kLarge, "4 large in 1 wave, 6 small in 2"},
       }) {
    CAPTURE(std::string(c.why));
    const TileShape large = tile_shape(Tile::large_128x256);
    CHECK(ceil_div(c.m, large.m) % large.cluster_m != 0);
    CHECK(c.n % large.n != 0);
    CHECK(chosen(c.m, c.n, c.multiprocessors) == c.expected);
  }
}

TEST_CASE("choose_tile counts multiprocessors that a cluster can have") {
  CHECK(chosen(1540, 200, 2) == kLarge);
  CHECK(chosen(200, 33536, 132) == kLarge);  // 262 large in 2 waves, 524 small in 4
  CHECK(chosen(200, 33536, 131) == kSmall);  // 262 large in 3 waves of 130
  CHECK(chosen(1540, 200, 1) == kSmall);     // a cluster is two
  CHECK(resident_blocks(132, Tile::large_128x256) == 132);
  CHECK(resident_blocks(131, Tile::large_128x256) == 130);
  CHECK(resident_blocks(131, Tile::small_128x128) == 131);
}

TEST_CASE("a margin leaves multiprocessors to others, and one to the grid") {
  static_assert(grid_multiprocessors(132, 0) == 132);
  static_assert(grid_multiprocessors(132, 16) == 116);
  static_assert(grid_multiprocessors(132, 131) == 1);
  static_assert(grid_multiprocessors(132, 132) == 1);
  static_assert(grid_multiprocessors(132, std::numeric_limits<int>::max()) == 1);
}

TEST_CASE("sm_margin reads a number, or says what came") {
  CHECK(sm_margin(nullptr) == 0);
  CHECK(sm_margin("0") == 0);
  CHECK(sm_margin("16") == 16);
  for (const char* text : {"", "-1", "+1", " 1", "1 ", "1.5", "0x10", "sixteen", "99999999999"}) {
    const std::string said =
        "gain_ops: GAIN_OPS_SM_MARGIN='" + std::string(text) +
        "', expected a number of multiprocessors to leave free, such as 16; set it so, or unset it";
    CHECK_THROWS_WITH_AS(sm_margin(text), said.c_str(), std::runtime_error);
  }
}

TEST_CASE("choose_tile is a function of its arguments alone") {
  std::vector<int> first;
  const auto every = [](auto visit) {
    for (int64_t m : {1, 127, 300, 1024, 5000}) {
      for (int64_t n : {8, 2048, 4104}) {
        for (int multiprocessors : {78, 132}) visit(chosen(m, n, multiprocessors));
      }
    }
  };
  every([&](int tile) { first.push_back(tile); });
  size_t i = 0;
  every([&](int tile) { CHECK(tile == first[i++]); });
}

TEST_CASE("choose_swizzle: the widest walk whose padding costs no wave") {
  struct Case {
    int64_t m, n;
    int multiprocessors;
    Tile tile;
    int expected;
    const char* why;
  };
  for (const Case& c : std::vector<Case>{
           {8192, 8192, 132, Tile::large_128x256, 8, "64 x 32 tiles are whole walks of 8"},
           {1024, 4096, 132, Tile::large_128x256, 4, "8 x 16: 1 wave, a walk of 8 pads to 16 x 16: 2 waves"},
           {2304, 14336, 132, Tile::large_128x256, 1, "18 x 56: 8 waves, a walk of 2 pads to 20 x 56: 9 waves"},
           {768, 5120, 132, Tile::large_128x256, 1, "6 x 20: 1 wave, a walk of 2 pads to 8 x 20: 2 waves"},
           {2048, 4096, 132, Tile::small_128x128, 8, "16 x 32 tiles are whole walks of 8"},
           {2176, 1920, 132, Tile::small_128x128, 1, "17 x 15: 2 waves, a walk of 2 pads to 18 x 16: 3 waves"},
           {1, 8, 132, Tile::small_128x128, 8, "64 tiles with the padding, in 1 wave"},
       }) {
    CAPTURE(std::string(c.why));
    CHECK(choose_swizzle(c.m, c.n, c.multiprocessors, c.tile) == c.expected);
  }
  static_assert(choose_swizzle(int64_t{1} << 33, 28672, 132, Tile::large_128x256) == 8);
}

TEST_CASE("linear_partials: a row a tile row, whole tiles wide, no more than needed") {
  for (Tile tile : {Tile::large_128x256, Tile::small_128x128}) {
    const TileShape shape = tile_shape(tile);
    CAPTURE(shape.n);
    for (int64_t m : {int64_t{1}, shape.m - 1, shape.m, shape.m + 1, 7 * shape.m, int64_t{1} << 33}) {
      for (int64_t n : {int64_t{1}, shape.n - 1, shape.n, shape.n + 1, 3 * shape.n, (int64_t{1} << 33) + 8}) {
        CAPTURE(m);
        CAPTURE(n);
        const PartialLayout layout = linear_partials(m, n, tile);
        CHECK(layout.rows * shape.m >= m);
        CHECK((layout.rows - 1) * shape.m < m);
        CHECK(layout.width % shape.n == 0);
        CHECK(layout.width >= n);
        CHECK(layout.width - n < shape.n);
      }
    }
    // A tile row that only fills up a cluster stores nothing, so it has no row here.
    CHECK(linear_partials(shape.m, shape.n, tile).rows == 1);
    CHECK(linear_partials(shape.m + 1, shape.n + 1, tile).elements() == 2 * 2 * shape.n);
  }
  CHECK(PartialLayout{1 << 20, 1 << 20}.elements() == int64_t{1} << 40);
}

TEST_CASE("row_partials: every row in exactly one chunk") {
  const int64_t big = int64_t{1} << 31;
  for (int64_t rows :
       {int64_t{1}, int64_t{31}, int64_t{32}, int64_t{33}, int64_t{2047}, int64_t{2048}, int64_t{2049}, int64_t{2176},
        int64_t{2177}, big - 1, big, big + 1, big << 9}) {
    CAPTURE(rows);
    const PartialLayout layout = row_partials(rows, 520);
    CHECK(layout.rows * rows_per_chunk(rows) >= rows);
    CHECK((layout.rows - 1) * rows_per_chunk(rows) < rows);
    CHECK(rms_norm_partials(rows, 520).rows * rms_norm_rows_per_chunk(rows) >= rows);
    CHECK((rms_norm_partials(rows, 520).rows - 1) * rms_norm_rows_per_chunk(rows) < rows);
    CHECK(rms_norm_partials(rows, 520).width == 520);
    CHECK(layout.width == 520);
    for (int64_t cols : {int64_t{1}, int64_t{8}, big + 8}) {
      CAPTURE(cols);
      CHECK(row_partials(rows, cols).rows == layout.rows);  // the sums' grouping does not depend on the columns
      CHECK(row_partials(rows, cols).width == cols);
    }
  }
}

TEST_CASE("rows_per_chunk is known from the rows: short while they are few, long beyond, whole rounds of the warps") {
  static_assert(rows_per_chunk(1) == 8 && rows_per_chunk(512) == 8);
  static_assert(rows_per_chunk(513) == 16 && rows_per_chunk(2048) == 32 && rows_per_chunk(4096) == 64);
  static_assert(rows_per_chunk(4097) == 128 && rows_per_chunk(int64_t{1} << 40) == 128);
  static_assert(rows_per_chunk(1) % kWarps == 0);
  static_assert(rms_norm_rows_per_chunk(1) == 1 && rms_norm_rows_per_chunk(256) == 1);
  static_assert(
      rms_norm_rows_per_chunk(257) == 2 && rms_norm_rows_per_chunk(512) == 2 && rms_norm_rows_per_chunk(4096) == 16);
  static_assert(rms_norm_rows_per_chunk(4097) == 32 && rms_norm_rows_per_chunk(int64_t{1} << 40) == 32);
  static_assert(kRowThreads == kLanes * kWarps && kRowThreads <= 1024);
}

TEST_CASE("from 256 rows of 1280 columns on a pass has some 130 blocks, and a norm's partials are few") {
  int64_t underfilled = 0, costly = 0;
  for (int64_t rows = 256; rows <= 16384; ++rows) {
    underfilled +=
        row_partials(rows, 1280).rows * ceil_div(1280, 256) < 132 || rms_norm_partials(rows, 1280).rows < 128;
    costly += rms_norm_partials(rows, 1280).rows > 256 && rms_norm_rows_per_chunk(rows) < 32;
  }
  CHECK(underfilled == 0);
  CHECK(costly == 0);
}

TEST_CASE("vector_width: 16 bytes of aligned rows that divide into them, otherwise one element") {
  struct Case {
    Dtype dtype;
    int64_t cols;
    int aligned;
  };
  for (const Case& c : std::vector<Case>{
           {Dtype::float32, 4, 4},
           {Dtype::float32, 8, 4},
           {Dtype::float32, 6, 1},
           {Dtype::float32, 1, 1},
           {Dtype::float16, 8, 8},
           {Dtype::float16, 4, 1},
           {Dtype::float16, 12, 1},
           {Dtype::float16, 520, 8},
           {Dtype::bfloat16, 8, 8},
           {Dtype::bfloat16, 4, 1},
           {Dtype::bfloat16, 29, 1},
           {Dtype::bfloat16, (int64_t{1} << 33) + 8, 8},
           {Dtype::bfloat16, (int64_t{1} << 33) + 1, 1}}) {
    CAPTURE(static_cast<int>(c.dtype));
    CAPTURE(c.cols);
    CHECK(vector_width(c.dtype, c.cols, true) == c.aligned);
    CHECK(vector_width(c.dtype, c.cols, false) == 1);
  }
}

TEST_CASE("rows_aligned") {
  alignas(16) static const char memory[32] = {};
  const int64_t big = int64_t{1} << 32;
  CHECK(rows_aligned(memory, 5, 8, 1, 2));
  CHECK(rows_aligned(memory, 5, 4, 1, 4));
  CHECK(rows_aligned(memory, 5, -8, 1, 2));
  CHECK(rows_aligned(memory, 5, big, 1, 2));
  CHECK(rows_aligned(memory + 16, 5, 8, 1, 2));

  CHECK_FALSE(rows_aligned(memory + 2, 5, 8, 1, 2));
  CHECK_FALSE(rows_aligned(memory + 8, 5, 8, 1, 2));
  CHECK_FALSE(rows_aligned(memory, 5, 9, 1, 2));
  CHECK_FALSE(rows_aligned(memory, 5, 4, 1, 2));
  CHECK_FALSE(rows_aligned(memory, 2, 6, 1, 4));
  CHECK_FALSE(rows_aligned(memory, 5, big + 1, 1, 2));

  CHECK(rows_aligned(memory, 5, 0, 1, 2));  // an expanded row
  CHECK_FALSE(rows_aligned(memory + 2, 5, 0, 1, 2));
  for (int64_t col_stride : {0, 2, 8, -1}) CHECK_FALSE(rows_aligned(memory, 5, 8, col_stride, 2));

  CHECK(rows_aligned(memory, 1, 9, 1, 2));  // one row: its stride leads nowhere
  CHECK_FALSE(rows_aligned(memory + 2, 1, 8, 1, 2));
  CHECK_FALSE(rows_aligned(memory, 1, 8, 5, 2));
}

}  // namespace
}  // namespace gain_ops
