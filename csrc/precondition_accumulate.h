// Fold one more pair of gradients into the sums of a list of tensors: what the host hands to the kernels of either
// device.
//
// For every element of every tensor:
//     y = g g_scale ratio / (sqrt(v bias_correction) + eps),   g 0 where v is 0,   0 where it is null
//     x = x x_scale
//     dots += (x y, x Y_sum, y X_sum)        with the sums as they were before
//     X_sum += x,   Y_sum += y               unless the call only wants the dots
//
// One table describes all tensors, so that one launch does them all. Elements are cut into chunks of kAccumulateChunk,
// tensor by tensor; a chunk's dots are summed in an order that depends on its size alone, and a tensor's chunks in one
// that depends on their number alone.
#pragma once

#include <stdint.h>

namespace entropy_fast {

constexpr int64_t kAccumulateChunk = 8192;

// How x and g, v, and the sums are stored. Sums are float, or double for double gradients, and so is what is computed.
enum class AccumulateKind : int64_t {
    kFloat32 = 0,          // x, g, v float
    kBFloat16 = 1,         // x, g bfloat16, v float
    kFloat16 = 2,          // x, g half, v float
    kBFloat16Moments = 3,  // x, g, v bfloat16
    kFloat64 = 4,          // x, g, v double
};

// One tensor: a row of an [n, 8] tensor of int64. Addresses are those of contiguous elements on the device of the call.
struct AccumulateEntry {
    uint64_t x;
    uint64_t g;
    uint64_t v;  // 0: no second moment, y is 0
    uint64_t x_sum;
    uint64_t y_sum;
    int64_t numel;
    int64_t first_chunk;  // number of chunks of the tensors before this one
    AccumulateKind kind;
};
static_assert(sizeof(AccumulateEntry) == 8 * sizeof(int64_t), "rows of an [n, 8] tensor of int64");

// A row of an [n, 3] tensor of doubles.
struct AccumulateFactors {
    double bias_correction;  // 1 / (1 - beta2^step)
    double eps;
    double ratio;  // the learning rate of the tensor's group, relative to that of the first group
};

struct PreconditionAccumulate {
    const AccumulateEntry* entries;
    const AccumulateFactors* factors;
    const int32_t* owners;  // [chunks]: which tensor a chunk belongs to
    double* partial_dots;   // [chunks, 3]
    double* dots;           // [tensors, 3]
    int64_t tensors;
    int64_t chunks;
    double x_scale;
    double g_scale;
    bool update;  // false: the sums are only read
};

}  // namespace entropy_fast
