#include "plan.h"

#include <charconv>
#include <cstring>
#include <stdexcept>
#include <string>

namespace gain_ops {

namespace {

double tile_time(int64_t m, int64_t n, int multiprocessors, Tile tile) {
  const TileShape shape = tile_shape(tile);
  const int64_t tiles = round_up(ceil_div(m, shape.m), shape.cluster_m) * ceil_div(n, shape.n);
  const double cost = static_cast<double>(shape.m * shape.n) * (tile == Tile::small_128x128 ? 1.08 : 1.0);
  return static_cast<double>(ceil_div(tiles, resident_blocks(multiprocessors, tile))) * cost;
}

}  // namespace

int sm_margin(const char* text) {
  if (text == nullptr) return 0;
  int margin = 0;
  const char* end = text + std::strlen(text);
  const auto [last, error] = std::from_chars(text, end, margin);
  if (error != std::errc() || last != end || margin < 0) {
    throw std::runtime_error(
        "gain_ops: GAIN_OPS_SM_MARGIN='" + std::string(text) +
        "', expected a number of multiprocessors to leave free, such as 16; set it so, or unset it");
  }
  return margin;
}

Tile choose_tile(int64_t m, int64_t n, int multiprocessors) {
  const bool large =
      multiprocessors >= tile_shape(Tile::large_128x256).cluster_m &&  // CUTLASS launches no grid under one cluster
      tile_time(m, n, multiprocessors, Tile::large_128x256) <= tile_time(m, n, multiprocessors, Tile::small_128x128);
  return large ? Tile::large_128x256 : Tile::small_128x128;
}

PartialLayout linear_partials(int64_t m, int64_t n, Tile tile) {
  const TileShape shape = tile_shape(tile);
  return {ceil_div(m, shape.m), round_up(n, shape.n)};
}

PartialLayout row_partials(int64_t rows, int64_t cols) { return {ceil_div(rows, rows_per_chunk(rows)), cols}; }

PartialLayout rms_norm_partials(int64_t rows, int64_t cols) {
  return {ceil_div(rows, rms_norm_rows_per_chunk(rows)), cols};
}

int vector_width(Dtype dtype, int64_t cols, bool all_aligned) {
  const int64_t width = 16 / element_size(dtype);
  return all_aligned && cols % width == 0 ? static_cast<int>(width) : 1;
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool rows_aligned(const void* data, int64_t rows, int64_t row_stride, int64_t col_stride, int64_t element_bytes) {
  return col_stride == 1 && (rows <= 1 || row_stride * element_bytes % 16 == 0) && aligned(data);
}

}  // namespace gain_ops
