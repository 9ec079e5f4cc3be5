#include "ops.h"

namespace gain_ops {

void define_ops(torch::stable::detail::StableLibrary& library) {
  library.def("scale(Tensor x, Tensor delta, Tensor? bias) -> Tensor");
  library.def("scale_rows(Tensor x, Tensor delta) -> Tensor");
  library.def("backward(Tensor dy, Tensor z, Tensor delta) -> (Tensor dz, Tensor ddelta)");
  library.def("ddelta(Tensor dy, Tensor z) -> Tensor");
#ifdef GAIN_OPS_SM90
  library.def("linear(Tensor x, Tensor weight, Tensor delta, Tensor? bias) -> Tensor");
  library.def("linear_z(Tensor x, Tensor weight, Tensor delta, Tensor? bias) -> (Tensor y, Tensor z)");
  library.def("backward_recompute(Tensor dy, Tensor x, Tensor weight, Tensor delta) -> (Tensor dz, Tensor ddelta)");
  library.def("backward_input(Tensor dy, Tensor x, Tensor weight, Tensor delta) -> (Tensor dx, Tensor ddelta)");
#endif
}

void implement_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("scale", TORCH_BOX(&scale));
  library.impl("scale_rows", TORCH_BOX(&scale_rows));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("ddelta", TORCH_BOX(&ddelta));
#ifdef GAIN_OPS_SM90
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_z", TORCH_BOX(&linear_z));
  library.impl("backward_recompute", TORCH_BOX(&backward_recompute));
  library.impl("backward_input", TORCH_BOX(&backward_input));
#endif
}

}  // namespace gain_ops
