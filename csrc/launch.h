// What every launch of a hand-written kernel goes through.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace gain_ops {

inline unsigned grid_size(int64_t blocks, const char* kernel) {
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::runtime_error(
        std::string("gain_ops: ") + kernel + " would need " + std::to_string(blocks) +
        " blocks and a grid has 2^31 - 1");
  }
  return static_cast<unsigned>(blocks);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(
        std::string("gain_ops: ") + kernel + " could not be launched: " + cudaGetErrorString(error));
  }
}

}  // namespace gain_ops
