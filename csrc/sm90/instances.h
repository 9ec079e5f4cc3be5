// The fused GEMMs that are compiled, one function a file: sm90_<epilogue>_<dtype>.
#pragma once

#include "../linear.h"

namespace gain_ops {

LinearKernel sm90_linear_bfloat16(Tile tile, bool b_is_kn);
LinearKernel sm90_linear_float16(Tile tile, bool b_is_kn);
LinearKernel sm90_linear_z_bfloat16(Tile tile, bool b_is_kn);
LinearKernel sm90_linear_z_float16(Tile tile, bool b_is_kn);
LinearKernel sm90_recompute_bfloat16(Tile tile, bool b_is_kn);
LinearKernel sm90_recompute_float16(Tile tile, bool b_is_kn);
LinearKernel sm90_input_bfloat16(Tile tile, bool b_is_kn);
LinearKernel sm90_input_float16(Tile tile, bool b_is_kn);

}  // namespace gain_ops
