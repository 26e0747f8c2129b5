// The loops that are compiled once per instruction set, and the table each such build of them fills in.
#pragma once

#include <stdint.h>

#include "../token_logprobs.h"

namespace entropy_fast {
namespace cpu {

// Each function works on rows [begin, end). The result of a row depends on that row and on the vocabulary size alone.
struct Kernels {
    void (*token_logprobs_forward)(const TokenLogprobsForward& call, int64_t begin, int64_t end);
    void (*token_logprobs_backward)(const TokenLogprobsBackward& call, int64_t begin, int64_t end);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace cpu
}  // namespace entropy_fast
