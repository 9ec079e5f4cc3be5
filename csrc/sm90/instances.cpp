#include "instances.h"

#include <stdexcept>

namespace gain_ops {

LinearKernel sm90_kernel(Epilogue epilogue, Dtype dtype, Tile tile, bool b_is_kn) {
  if (dtype == Dtype::float32) throw std::logic_error("gain_ops: no fused GEMM computes in float32");
  const bool half = dtype == Dtype::float16;
  switch (epilogue) {
    case Epilogue::linear: return (half ? sm90_linear_float16 : sm90_linear_bfloat16)(tile, b_is_kn);
    case Epilogue::linear_z: return (half ? sm90_linear_z_float16 : sm90_linear_z_bfloat16)(tile, b_is_kn);
    case Epilogue::recompute: return (half ? sm90_recompute_float16 : sm90_recompute_bfloat16)(tile, b_is_kn);
    case Epilogue::input: return (half ? sm90_input_float16 : sm90_input_bfloat16)(tile, b_is_kn);
  }
  throw std::logic_error("gain_ops: an epilogue that does not exist");
}

}  // namespace gain_ops
