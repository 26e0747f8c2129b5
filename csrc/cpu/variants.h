// The loops that are compiled once per instruction set, and the table of each such build of them.
#pragma once

#include <stdint.h>

#include "../frozen_layers.h"
#include "../packed_attention.h"
#include "../precondition_accumulate.h"
#include "../softmax_block.h"
#include "../token_logprobs.h"
#include "../unit_products.h"

namespace entropy_fast {
namespace cpu {

// Each function works on rows (or chunks) [begin, end), and the result of a row depends on nothing but that row. Those
// of packed attention do one task each: a sequence (in the backward a run of them) and a key head.
struct Kernels {
    void (*token_logprobs_forward)(const TokenLogprobsForward& call, int64_t begin, int64_t end);
    void (*token_logprobs_backward)(const TokenLogprobsBackward& call, int64_t begin, int64_t end);
    void (*softmax_block)(const SoftmaxBlock& call, int64_t begin, int64_t end);
    void (*sums_of_blocks)(const SumsOfBlocks& call, int64_t begin, int64_t end);
    void (*precondition_accumulate)(const PreconditionAccumulate& call, int64_t begin, int64_t end);
    void (*rms_norm_forward)(const RmsNormForward& call, int64_t begin, int64_t end);
    void (*rms_norm_backward)(const RmsNormBackward& call, int64_t begin, int64_t end);
    void (*gated_silu_forward)(const GatedSiluForward& call, int64_t begin, int64_t end);
    void (*gated_silu_backward)(const GatedSiluBackward& call, int64_t begin, int64_t end);
    void (*unit_products)(const UnitProducts& call, int64_t begin, int64_t end);
    void (*packed_attention_forward)(const PackedAttentionForward& call, int64_t task, void* scratch);
    void (*packed_attention_backward)(const PackedAttentionBackward& call, int64_t task, void* scratch);
};

#define ENTROPY_FAST_DECLARE_VARIANT(name)                                                                     \
    namespace name {                                                                                           \
    void token_logprobs_forward(const TokenLogprobsForward& call, int64_t begin, int64_t end);                 \
    void token_logprobs_backward(const TokenLogprobsBackward& call, int64_t begin, int64_t end);               \
    void softmax_block(const SoftmaxBlock& call, int64_t begin, int64_t end);                                  \
    void sums_of_blocks(const SumsOfBlocks& call, int64_t begin, int64_t end);                                 \
    void precondition_accumulate(const PreconditionAccumulate& call, int64_t begin, int64_t end);              \
    void rms_norm_forward(const RmsNormForward& call, int64_t begin, int64_t end);                             \
    void rms_norm_backward(const RmsNormBackward& call, int64_t begin, int64_t end);                           \
    void gated_silu_forward(const GatedSiluForward& call, int64_t begin, int64_t end);                         \
    void gated_silu_backward(const GatedSiluBackward& call, int64_t begin, int64_t end);                       \
    void packed_attention_forward(const PackedAttentionForward& call, int64_t task, void* scratch);            \
    void packed_attention_backward(const PackedAttentionBackward& call, int64_t task, void* scratch);          \
    void unit_products(const UnitProducts& call, int64_t begin, int64_t end);                                  \
    constexpr Kernels kernels = {token_logprobs_forward, token_logprobs_backward,  softmax_block,              \
                                 sums_of_blocks,         precondition_accumulate,  rms_norm_forward,           \
                                 rms_norm_backward,      gated_silu_forward,       gated_silu_backward,        \
                                 unit_products,          packed_attention_forward, packed_attention_backward}; \
    }

ENTROPY_FAST_DECLARE_VARIANT(baseline)
ENTROPY_FAST_DECLARE_VARIANT(avx2)
ENTROPY_FAST_DECLARE_VARIANT(avx512)

#undef ENTROPY_FAST_DECLARE_VARIANT

}  // namespace cpu
}  // namespace entropy_fast
