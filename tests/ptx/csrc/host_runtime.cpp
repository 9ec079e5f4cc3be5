// Stands in for CUDA's runtime and driver where there is no GPU: a launch goes to the simulator, a tensor map becomes
// bytes that it reads (tests/ptx/tensor_maps.py). The objects of csrc/ that ship are linked against it and run on CPU
// tensors.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "linear.h"
#include "tensor.h"

#define VISIBLE extern "C" __attribute__((visibility("default")))

namespace {

struct Launch {
  const char* kernel;
  unsigned grid[3], block[3], cluster[3];
  void** arguments;
  size_t dynamic_shared;
};

using Simulate = int (*)(const Launch*);
using Allocated = void (*)(void*, size_t);

Simulate simulate = nullptr;
Allocated allocated = nullptr;
int multiprocessors = 132;
dim3 next_grid, next_block;  // of the launch that <<<>>> has begun
size_t next_shared = 0;
cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> registered;
  return registered;
}

std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> asked;
  return asked;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, dim3 cluster, void** arguments, size_t shared) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return failed(cudaErrorInvalidDeviceFunction);
  // beyond 48 KiB a kernel must have asked
  if (shared > 48 * 1024 && static_cast<int>(shared) > shared_limits()[function]) return failed(cudaErrorInvalidValue);
  const Launch one = {
      found->second.c_str(),
      {grid.x, grid.y, grid.z},
      {block.x, block.y, block.z},
      {cluster.x, cluster.y, cluster.z},
      arguments,
      shared};
  return simulate(&one) ? failed(cudaErrorLaunchFailure) : cudaSuccess;
}

CUresult encode(
    CUtensorMap* map,
    CUtensorMapDataType type,
    cuuint32_t rank,
    void* address,
    const cuuint64_t* extents,
    const cuuint64_t* strides,
    const cuuint32_t* box,
    const cuuint32_t* steps,
    CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion,
    CUtensorMapFloatOOBfill fill) {
  static const unsigned char bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  struct {
    unsigned magic;
    unsigned char element, rank, swizzle, unused;
    void* address;
    unsigned extents[5], padding;
    unsigned long long strides[4];
    unsigned box[5];
  } fields = {
      0x7A5A11E5, bytes[type], static_cast<unsigned char>(rank), static_cast<unsigned char>(swizzle), 0, address, {}, 0,
      {},         {}};
  for (unsigned i = 0; i < rank; ++i) {
    if (steps[i] != 1 || extents[i] > 0xffffffffull) return CUDA_ERROR_INVALID_VALUE;
    fields.extents[i] = static_cast<unsigned>(extents[i]);
    fields.box[i] = box[i];
    if (i + 1 < rank) fields.strides[i] = strides[i];
  }
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &fields, sizeof(fields));
  return CUDA_SUCCESS;
}

}  // namespace

VISIBLE void ptx_setup(Simulate on_launch, Allocated on_allocation, int count) {
  simulate = on_launch, allocated = on_allocation, multiprocessors = count;
}

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = device;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t) {
  next_grid = grid, next_block = block, next_shared = shared;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = next_grid, *block = next_block, *shared = next_shared;
  *static_cast<cudaStream_t*>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(entry));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, dim3(1, 1, 1), arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(f, grid, block, dim3(1, 1, 1), arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& asked = config->attrs[i].val.clusterDim;
      cluster = dim3(asked.x, asked.y, asked.z);
    }
  }
  return launch(function, config->gridDim, config->blockDim, cluster, arguments, config->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) shared_limits()[function] = value;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDeviceFunction ? "no such kernel was registered"
         : error == cudaErrorInvalidValue        ? "more shared memory than was asked for"
                                                 : "the simulator found a fault";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = multiprocessors / 2;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
  const bool known = !std::strcmp(symbol, "cuTensorMapEncodeTiled");
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : cudaErrorUnknown;
}

}  // extern "C"

namespace gain_ops {

// What the ops allocate is poisoned, and told to the simulator: it is what kernels may write. The linker's --wrap
// puts it in the place of empty().
#define EMPTY "_ZN8gain_ops5emptyERKN5torch6stable6TensorESt16initializer_listIlEN3c1010ScalarTypeE"
Tensor real_empty(const Tensor&, std::initializer_list<int64_t>, ScalarType) __asm__("__real_" EMPTY);
Tensor wrapped_empty(const Tensor&, std::initializer_list<int64_t>, ScalarType) __asm__("__wrap_" EMPTY);
Tensor wrapped_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor made = real_empty(like, sizes, dtype);
  const size_t element = dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
  if (const size_t bytes = made.numel() * element) {
    std::memset(made.mutable_data_ptr(), 0xff, bytes);
    allocated(made.mutable_data_ptr(), bytes);
  }
  return made;
}

// The fused GEMMs, where their objects are not linked in.
__attribute__((weak)) LinearKernel sm90_kernel(Epilogue, Dtype, Tile, bool) {
  throw std::logic_error("the fused GEMMs are not part of this library");
}

}  // namespace gain_ops
