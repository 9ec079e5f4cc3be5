#include "device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>

namespace gain_ops {

namespace {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// The stable ABI's function lives in libtorch_cuda: looked up, so that the extension loads where torch has no CUDA.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
  void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  check(
      symbol != nullptr,
      "gain_ops: this torch was built without CUDA; install a CUDA build of torch to run the CUDA kernels");
  return reinterpret_cast<CurrentStream>(symbol);
}

cudaStream_t current_stream(int device) {
  static const CurrentStream find = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, "gain_ops: ", what, " failed: ", cudaGetErrorString(error));
}

}  // namespace

bool on_device(const Tensor& t) { return t.is_cuda(); }

LaunchScope::LaunchScope(int device)
    : guard_(std::make_shared<torch::stable::accelerator::DeviceGuard>(device)), stream_(current_stream(device)) {
  // The guard is idle where `device` is current already, as device 0 is on a new thread: no context is bound there yet,
  // and TMA's descriptors are encoded by the driver, which binds none.
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
}

const DeviceProperties& device_properties(int device) {
  constexpr int kMost = 64;
  static std::array<DeviceProperties, kMost> known;
  static std::array<std::once_flag, kMost> asked;
  check(device >= 0 && device < kMost, "gain_ops: device index ", device, ", expected 0 to ", kMost - 1);
  std::call_once(asked[device], [device] {
    DeviceProperties& p = known[device];
    check_cuda(cudaDeviceGetAttribute(&p.major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&p.minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    check_cuda(
        cudaDeviceGetAttribute(&p.multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  });
  return known[device];
}

}  // namespace gain_ops
