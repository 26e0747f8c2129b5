#include "precondition_accumulate.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "parallel.h"

namespace entropy_fast {
namespace cpu {
namespace {

void check(const PreconditionAccumulate& call) {
    int64_t chunks = 0;
    for (int64_t tensor = 0; tensor < call.tensors; ++tensor) {
        const AccumulateEntry& entry = call.entries[tensor];
        if (entry.numel < 0 || entry.first_chunk != chunks) {
            throw std::invalid_argument("precondition_accumulate: entry " + std::to_string(tensor) +
                                        " of the table does not fit");
        }
        const int64_t own = (entry.numel + kAccumulateChunk - 1) / kAccumulateChunk;
        for (int64_t chunk = chunks; chunk < std::min(chunks + own, call.chunks); ++chunk) {
            if (call.owners[chunk] != tensor) {
                throw std::invalid_argument("precondition_accumulate: chunk " + std::to_string(chunk) +
                                            " belongs to another tensor than the table says");
            }
        }
        chunks += own;
    }
    if (chunks != call.chunks) throw std::invalid_argument("precondition_accumulate: wrong number of chunks");
}

}  // namespace

void precondition_accumulate(const PreconditionAccumulate& call, int threads) {
    check(call);
    const Kernels& kernels = selected_kernels();
    parallel_rows(call.chunks, kAccumulateChunk, threads,
                  [&](int64_t begin, int64_t end) { kernels.precondition_accumulate(call, begin, end); });
    for (int64_t tensor = 0; tensor < call.tensors; ++tensor) {
        const int64_t begin = call.entries[tensor].first_chunk;
        const int64_t end = tensor + 1 < call.tensors ? call.entries[tensor + 1].first_chunk : call.chunks;
        double* dots = call.dots + 3 * tensor;
        std::fill(dots, dots + 3, 0.0);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            for (int k = 0; k < 3; ++k) dots[k] += call.partial_dots[3 * chunk + k];
        }
    }
}

}  // namespace cpu
}  // namespace entropy_fast
