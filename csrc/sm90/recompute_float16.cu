#include "../linear_sm90.h"

namespace gain_ops {

LinearKernel sm90_recompute_float16(Tile tile, bool b_is_kn) {
  return tile == Tile::large_128x256
             ? sm90::linear_kernel<cutlass::half_t, Epilogue::recompute, Tile::large_128x256>(b_is_kn)
             : sm90::linear_kernel<cutlass::half_t, Epilogue::recompute, Tile::small_128x128>(b_is_kn);
}

}  // namespace gain_ops
