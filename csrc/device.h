// Where a launch goes. The host tests link another definition of these (tests/host_device.cpp).
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "tensor.h"

namespace gain_ops {

// Whether the kernels can read the tensor's memory.
bool on_device(const Tensor& t);

// While it lives, `device` is current; stream() is torch's current stream there.
class LaunchScope {
 public:
  explicit LaunchScope(int device);
  cudaStream_t stream() const { return stream_; }

 private:
  std::shared_ptr<void> guard_;
  cudaStream_t stream_;
};

struct DeviceProperties {
  int major, minor, multiprocessors;
};

// Asked of the driver once a device.
const DeviceProperties& device_properties(int device);

}  // namespace gain_ops
