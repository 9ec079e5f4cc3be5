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

// Of `all` multiprocessors those that a persistent grid takes: `margin` are left to others, such as NCCL's kernels
// under an overlapped backward.
constexpr int grid_multiprocessors(int all, int margin) { return all > margin ? all - margin : 1; }

// GAIN_OPS_SM_MARGIN as the environment has it; null is 0. Throws std::runtime_error where it is no number.
int sm_margin(const char* text);

// Blocks that run at once: one a multiprocessor, in whole clusters.
constexpr int64_t resident_blocks(int multiprocessors, Tile tile) {
  const int64_t clusters = multiprocessors / tile_shape(tile).cluster_m;
  return (clusters > 0 ? clusters : 1) * tile_shape(tile).cluster_m;
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
    return ceil_div(tiles, resident_blocks(multiprocessors, tile));
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
PartialLayout linear_partials(int64_t m, int64_t n, Tile tile);

// ---- one-pass row kernels ----

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kRowThreads = kLanes * kWarps;

// Rows that one block sums, the least that makes at most `chunks` of them: few while there are few rows, to occupy the
// chip; more later, for fewer partials. Of the row count alone, so that a sum has the same bits on every device.
constexpr int64_t chunk_of(int64_t rows, int64_t least, int64_t most, int64_t chunks) {
  int64_t chunk = least;
  while (chunk < most && chunk * chunks < rows) chunk *= 2;
  return chunk;
}

// Of a pass by blocks of kLanes columns and a warp a row.
constexpr int64_t rows_per_chunk(int64_t rows) { return chunk_of(rows, kWarps, 128, 64); }

PartialLayout row_partials(int64_t rows, int64_t cols);

// Of a pass by blocks of whole rows, one row after the other.
constexpr int64_t rms_norm_rows_per_chunk(int64_t rows) { return chunk_of(rows, 1, 32, 256); }

PartialLayout rms_norm_partials(int64_t rows, int64_t cols);

// Elements that a thread moves at once: 16 bytes when every row of every matrix, and every vector over the columns, can
// be read so, otherwise one.
int vector_width(Dtype dtype, int64_t cols, bool all_aligned);

// Whether memory can be read in 16-byte pieces from here on.
bool aligned(const void* data);

// Whether rows of a matrix can be read in 16-byte pieces.
bool rows_aligned(const void* data, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t element_bytes);

}  // namespace gain_ops
