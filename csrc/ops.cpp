#include "ops.h"

namespace gain_ops {

void define_ops(torch::stable::detail::StableLibrary& library) {
  library.def("scale(Tensor x, Tensor delta, Tensor? bias) -> Tensor");
  library.def("scale_rows(Tensor x, Tensor delta) -> Tensor");
  library.def("backward(Tensor dy, Tensor z, Tensor delta) -> (Tensor dz, Tensor ddelta)");
  library.def("ddelta(Tensor dy, Tensor z) -> Tensor");
  library.def("glu(Tensor gate, Tensor? up, Tensor delta, int activation) -> Tensor");
  library.def(
      "glu_backward(Tensor dh, Tensor gate, Tensor? up, Tensor delta, int activation)"
      " -> (Tensor dgate_up, Tensor ddelta)");
  library.def("glu_ddelta(Tensor dh, Tensor gate, Tensor? up, int activation) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, Tensor delta, float eps) -> (Tensor y, Tensor r)");
  library.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor delta, Tensor r) -> (Tensor dx, Tensor ddelta)");
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
  library.impl("glu", TORCH_BOX(&glu));
  library.impl("glu_backward", TORCH_BOX(&glu_backward));
  library.impl("glu_ddelta", TORCH_BOX(&glu_ddelta));
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
#ifdef GAIN_OPS_SM90
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("linear_z", TORCH_BOX(&linear_z));
  library.impl("backward_recompute", TORCH_BOX(&backward_recompute));
  library.impl("backward_input", TORCH_BOX(&backward_input));
#endif
}

}  // namespace gain_ops
