#include "softmax_block.h"

#include <stdexcept>

#include "dispatch.h"
#include "parallel.h"

namespace entropy_fast {
namespace cpu {

void softmax_block(const SoftmaxBlock& call, int threads) {
    if (call.rows < 0 || call.width < 0) throw std::invalid_argument("softmax_block: negative size");
    if (call.rows > 1 && call.row_stride < call.width) throw std::invalid_argument("softmax_block: rows overlap");
    if (call.entropy_weights != nullptr && !call.weights) {
        throw std::invalid_argument("softmax_block: weights of the entropy without the others");
    }
    if (!(call.softcap >= 0.0)) throw std::invalid_argument("softmax_block: softcap is negative or NaN");
    const Kernels& kernels = selected_kernels();
    parallel_rows(call.rows, call.width, threads,
                  [&](int64_t begin, int64_t end) { kernels.softmax_block(call, begin, end); });
}

void sums_of_blocks(const SumsOfBlocks& call, int threads) {
    if (call.rows < 0 || call.width < 0) throw std::invalid_argument("sums_of_blocks: negative size");
    const bool both = call.products != nullptr && call.entropy_sums != nullptr;
    if (both != (call.entropy_products != nullptr)) {
        throw std::invalid_argument("sums_of_blocks: products and sums do not go together");
    }
    const Kernels& kernels = selected_kernels();
    parallel_rows(call.rows, call.width, threads,
                  [&](int64_t begin, int64_t end) { kernels.sums_of_blocks(call, begin, end); });
}

}  // namespace cpu
}  // namespace entropy_fast
