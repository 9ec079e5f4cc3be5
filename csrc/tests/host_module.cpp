// The ops on CPU tensors, as torch.ops.gain_ops_host: the objects that ship, over host_device.cpp and host_kernels.cpp.
#include "../ops.h"

STABLE_TORCH_LIBRARY(gain_ops_host, m) { gain_ops::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(gain_ops_host, CPU, m) { gain_ops::implement_ops(m); }
