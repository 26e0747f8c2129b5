// What every launch is checked for. Included by .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace entropy_fast {
namespace cuda {

// The number of blocks for a grid of one block for each of `count`.
inline unsigned blocks_for(const char* op, int64_t count) {
    if (count > std::numeric_limits<int>::max()) {
        throw std::invalid_argument(std::string(op) + ": " + std::to_string(count) +
                                    " blocks, more than a grid has (2147483647)");
    }
    return static_cast<unsigned>(count);
}

inline void check_launch(const char* op) {
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + cudaGetErrorString(status));
    }
}

}  // namespace cuda
}  // namespace entropy_fast
