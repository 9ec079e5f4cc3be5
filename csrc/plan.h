// Every decision that is made on the host before a launch: tiles, partial sums, grids. Pure functions of sizes, tested
// without a GPU in tests/.
#pragma once

#include <cstdint>

namespace gain_ops {

enum class Dtype { float32, float16, bfloat16 };

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- fused GEMMs ----

// Shape and schedule of a GEMM kernel; the K tile is 64 elements of 16 bits.
enum class Tile {
  large_128x256,  // two warpgroups on one tile, clusters of 2 x 1: the most arithmetic a byte
  small_128x128,  // two warpgroups on two tiles in turn (ping-pong): fills the chip at small sizes
};

struct TileShape {
  int64_t m, n, cluster_m;
};

constexpr TileShape tile_shape(Tile tile) {
  return tile == Tile::large_128x256 ? TileShape{128, 256, 2} : TileShape{128, 128, 1};
}

// The tile whose last wave wastes least: waves times a tile's cost, where the small tile pays 8% for its extra traffic.
Tile choose_tile(int64_t m, int64_t n, int multiprocessors);

// The most tile rows walked together, for W to be read from L2, that cost no wave: CUTLASS pads both counts of tiles to
// whole walks and runs the padding like any other tile. Of 1, 2, 4, 8; where tiles are few it takes fewer by itself.
constexpr int choose_swizzle(int64_t m, int64_t n, int multiprocessors, Tile tile) {
  const TileShape shape = tile_shape(tile);
  const auto waves = [&](int64_t width) {
    const int64_t tiles =
        round_up(ceil_div(m, shape.m), width * shape.cluster_m) * round_up(ceil_div(n, shape.n), width);
    return ceil_div(tiles, multiprocessors);
  };
  int width = 8;
  while (width > 1 && waves(width) > waves(1)) width /= 2;
  return width;
}

// fp32 partial sums of a reduction over rows: row i holds the sums of its chunk of rows.
struct PartialLayout {
  int64_t rows;   // chunks
  int64_t width;  // elements from one row to the next; the first n of each count
  int64_t elements() const { return rows * width; }
};

// One row a tile row, padded to whole tiles: the kernel stores its tile's sums without a mask.
PartialLayout matmul_partials(int64_t m, int64_t n, Tile tile);

// ---- one-pass row kernels ----

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kRowThreads = kLanes * kWarps;

// Rows that one block of the backward sums: a function of the row count alone, so that a sum has the same bits on every
// device. Short chunks while there are few rows, to occupy the chip; long ones later, for fewer partials.
constexpr int64_t rows_per_chunk(int64_t rows) { return rows <= 2048 ? 32 : 128; }

PartialLayout row_partials(int64_t rows, int64_t cols);

// Elements that a thread moves at once: 16 bytes when every row of every matrix can be read so, otherwise one.
int vector_width(Dtype dtype, int64_t cols, bool all_rows_aligned);

// Whether rows of a matrix can be read in 16-byte pieces.
bool rows_aligned(const void* data, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t element_bytes);

}  // namespace gain_ops
