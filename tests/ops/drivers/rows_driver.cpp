// Runs the CPU row loops, in the baseline build, on a call file: for processors that only an emulator has.
#include "call_file.h"
#include "cpu/variants.h"

int main(int, char** arguments) {
    CallFile call = read_call(arguments[1]);
    entropy_fast::cpu::baseline::kernels.token_logprobs_forward(call.forward(), 0, call.rows);
    entropy_fast::cpu::baseline::kernels.token_logprobs_backward(call.backward(), 0, call.rows);
    write_results(call, arguments[2]);
}
