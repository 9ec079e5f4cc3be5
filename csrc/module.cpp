// Registers the ops for CUDA, and for CPU where the first check of each says what is missing; the Python module
// gain_ops._C is empty but for what it says of itself.
#include <Python.h>
#include <cuda_runtime_api.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(gain_ops_cuda, m) { gain_ops::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(gain_ops_cuda, CUDA, m) { gain_ops::implement_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(gain_ops_cuda, CPU, m) { gain_ops::implement_ops(m); }

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_C";
  definition.m_doc = "The CUDA kernels of gain_ops: importing it registers torch.ops.gain_ops_cuda.";
  definition.m_size = -1;
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyModule_AddStringConstant(module, "version", GAIN_OPS_VERSION);
  PyModule_AddStringConstant(module, "architectures", GAIN_OPS_ARCHITECTURES);
  PyModule_AddIntConstant(module, "cuda", CUDART_VERSION);  // which the driver must serve: 13000 is 13.0
  return module;
}
