// device.h on a CPU, for tests: the ops then run on CPU tensors, kernels and all, as on a card of
// GAIN_OPS_TEST_CAPABILITY (default 90) with 132 multiprocessors.
#include <cstdlib>

#include "../device.h"

namespace gain_ops {

bool on_device(const Tensor& t) { return t.is_cpu(); }

LaunchScope::LaunchScope(int) : stream_(nullptr) {}

const DeviceProperties& device_properties(int) {
  static DeviceProperties properties;
  const char* given = std::getenv("GAIN_OPS_TEST_CAPABILITY");
  const int capability = given ? std::atoi(given) : 90;
  properties = {capability / 10, capability % 10, 132};
  return properties;
}

}  // namespace gain_ops
