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

}  // namespace cpu
}  // namespace entropy_fast
