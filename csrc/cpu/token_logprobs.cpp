#include "token_logprobs.h"

#include "../token_logprobs_check.h"
#include "dispatch.h"
#include "parallel.h"

namespace entropy_fast {
namespace cpu {

void token_logprobs_forward(const TokenLogprobsForward& call, int threads) {
    check_shape(call);
    check_targets(call);
    const Kernels& kernels = selected_kernels();
    parallel_rows(call.rows, call.vocabulary, threads,
                  [&](int64_t begin, int64_t end) { kernels.token_logprobs_forward(call, begin, end); });
}

void token_logprobs_backward(const TokenLogprobsBackward& call, int threads) {
    check_shape(call);
    check_targets(call);
    const Kernels& kernels = selected_kernels();
    parallel_rows(call.rows, call.vocabulary, threads,
                  [&](int64_t begin, int64_t end) { kernels.token_logprobs_backward(call, begin, end); });
}

}  // namespace cpu
}  // namespace entropy_fast
