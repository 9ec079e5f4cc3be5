// device.h on a CPU, for tests: the ops then run on CPU tensors, kernels and all, as on a card of
// GAIN_OPS_TEST_CAPABILITY (default 90) with GAIN_OPS_TEST_MULTIPROCESSORS (default 132).
#include <cstdlib>

#include "../device.h"

namespace gain_ops {

bool on_device(const Tensor& t) { return t.is_cpu(); }

LaunchScope::LaunchScope(int) : stream_(nullptr) {}

namespace {

int given(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

}  // namespace

const DeviceProperties& device_properties(int) {
  static DeviceProperties properties;
  const int capability = given("GAIN_OPS_TEST_CAPABILITY", 90);
  properties = {capability / 10, capability % 10, given("GAIN_OPS_TEST_MULTIPROCESSORS", 132)};
  return properties;
}

}  // namespace gain_ops
