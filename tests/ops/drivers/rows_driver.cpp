// Runs the CPU kernels on a call file: for processors that only an emulator has.
#include "call_file.h"
#include "cpu/frozen_layers.h"
#include "cpu/packed_attention.h"
#include "cpu/precondition_accumulate.h"
#include "cpu/softmax_block.h"
#include "cpu/token_logprobs.h"
#include "cpu/unit_products.h"

namespace {

struct Run {
    void operator()(const entropy_fast::TokenLogprobsForward& call) const {
        entropy_fast::cpu::token_logprobs_forward(call, 1);
    }
    void operator()(const entropy_fast::TokenLogprobsBackward& call) const {
        entropy_fast::cpu::token_logprobs_backward(call, 1);
    }
    void operator()(const entropy_fast::SoftmaxBlock& call) const { entropy_fast::cpu::softmax_block(call, 1); }
    void operator()(const entropy_fast::SumsOfBlocks& call) const { entropy_fast::cpu::sums_of_blocks(call, 1); }
    void operator()(const entropy_fast::RmsNormForward& call) const { entropy_fast::cpu::rms_norm_forward(call, 1); }
    void operator()(const entropy_fast::RmsNormBackward& call) const { entropy_fast::cpu::rms_norm_backward(call, 1); }
    void operator()(const entropy_fast::GatedSiluForward& call) const {
        entropy_fast::cpu::gated_silu_forward(call, 1);
    }
    void operator()(const entropy_fast::GatedSiluBackward& call) const {
        entropy_fast::cpu::gated_silu_backward(call, 1);
    }
    void operator()(const entropy_fast::UnitProducts& call) const { entropy_fast::cpu::unit_products(call, 1); }
    void operator()(const entropy_fast::PreconditionAccumulate& call) const {
        entropy_fast::cpu::precondition_accumulate(call, 1);
    }
    void operator()(const entropy_fast::PackedAttentionForward& call) const {
        entropy_fast::cpu::packed_attention_forward(call, 1);
    }
    void operator()(const entropy_fast::PackedAttentionBackward& call) const {
        entropy_fast::cpu::packed_attention_backward(call, 1);
    }
};

}  // namespace

int main(int, char** arguments) {
    CallFile file(arguments[1]);
    file.run(Run{});
    file.write(arguments[2]);
}
