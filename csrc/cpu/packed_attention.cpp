#include "packed_attention.h"

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "attention_scratch.h"
#include "dispatch.h"
#include "parallel.h"

namespace entropy_fast {
namespace cpu {
namespace {

struct Extent {
    int64_t scores;
    int64_t longest_prefix;
    int64_t most_keys;  // that a block of queries sees
};

Extent checked(const PackedAttention& inputs, ElementType element_type, const char* name) {
    const auto refuse = [&](const char* why) { throw std::invalid_argument(std::string(name) + ": " + why); };
    if (inputs.n_sequences < 0 || inputs.size < 1) refuse("negative size");
    if (inputs.key_heads < 1 || inputs.heads < 1 || inputs.heads % inputs.key_heads != 0) {
        refuse("heads are no multiple of the key heads");
    }
    if (inputs.window < 1) refuse("a token does not see itself");
    if (element_type == ElementType::kFloat16) refuse("element type float16");
    if (inputs.tokens < 0 || inputs.prefix_tokens < 0) refuse("negative size");
    const int64_t block = tokens_of_block(inputs.heads / inputs.key_heads);
    Extent extent = {0, 0, 0};
    int64_t end = 0;
    for (int64_t index = 0; index < inputs.n_sequences; ++index) {
        const AttentionSequence& sequence = inputs.sequences[index];
        if (sequence.end < sequence.begin || sequence.prefix_end < sequence.prefix_begin) {
            refuse("a sequence ends before it begins");
        }
        // No two threads write to one place, and there is none that is not written.
        if (sequence.begin != end) refuse("sequences do not stand one behind the other");
        end = sequence.end;
        if (end > inputs.tokens) refuse("a sequence of tokens that are not there");
        if (sequence.prefix_begin < 0 || sequence.prefix_end > inputs.prefix_tokens) {
            refuse("a prefix that is not there");
        }
        const int64_t length = sequence.end - sequence.begin;
        const int64_t prefix = sequence.prefix_end - sequence.prefix_begin;
        if (prefix > 0 && (inputs.prefix_key.data == nullptr || inputs.prefix_value.data == nullptr)) {
            refuse("a prefix without keys or values");
        }
        extent.scores += length * (prefix + length) * inputs.heads;
        extent.longest_prefix = std::max(extent.longest_prefix, prefix);
        const int64_t in_window = inputs.window < prefix + length ? inputs.window + block : prefix + length;
        extent.most_keys = std::max(extent.most_keys, std::min(prefix + length, in_window));
    }
    if (end != inputs.tokens) refuse("tokens that are in no sequence");
    return extent;
}

// What a run of sequences writes has to lie within its arrays.
void check_runs(const PackedAttentionBackward& call, bool sums) {
    const auto refuse = [](const char* why) {
        throw std::invalid_argument(std::string("packed_attention_backward: ") + why);
    };
    if (call.n_runs < 0 || call.n_weights < 0 || call.weight_rows < 0) refuse("negative size");
    if (sums != (call.prefix_value_sums != nullptr) || (!sums && call.weights != nullptr)) {
        refuse("sums of prefixes and weights do not go together");
    }
    if (call.runs[0] != 0 || call.runs[call.n_runs] != call.inputs.n_sequences) refuse("sequences that are in no run");
    int64_t with_sums = 0;  // tokens of prefixes
    for (int64_t run = 0; run < call.n_runs; ++run) {
        const int64_t begin = call.runs[run], end = call.runs[run + 1];
        if (begin < 0 || begin > end || end > call.inputs.n_sequences) refuse("a run of sequences that are not there");
        for (int64_t index = begin; sums && index < end; ++index) {
            const AttentionSequence& first = call.inputs.sequences[begin];
            const AttentionSequence& sequence = call.inputs.sequences[index];
            if (index == begin && sequence.prefix_begin < sequence.prefix_end) {
                if (sequence.prefix_begin < with_sums) refuse("a prefix in two runs");
                with_sums = sequence.prefix_end;
            }
            if (sequence.row < 0 || sequence.row >= call.weight_rows) refuse("a sequence without weights");
            if (sequence.prefix_begin != first.prefix_begin || sequence.prefix_end != first.prefix_end) {
                refuse("prefixes that differ within a run");
            }
        }
    }
}

// Calls run(task, scratch) for each task, which go to whichever thread is free: they are of different lengths.
template <typename Run>
void run_tasks(int64_t tasks, int64_t scores, int64_t scratch_bytes, int threads, const Run& run) {
    constexpr int64_t kLine = 64;
    const int64_t workers = std::min<int64_t>(std::max(1, threads), std::max<int64_t>(1, tasks));
    const int64_t bytes = (scratch_bytes + kLine - 1) / kLine * kLine;
    const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(workers * bytes + kLine)]);
    char* const first = memory.get() + (kLine - reinterpret_cast<uintptr_t>(memory.get()) % kLine) % kLine;
    std::atomic<int64_t> next{0};
    parallel_rows(workers, scores / workers, static_cast<int>(workers), [&](int64_t begin, int64_t) {
        for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) run(task, first + begin * bytes);
    });
}

int64_t size_of_scalar(ElementType element_type) {
    return element_type == ElementType::kFloat64 ? sizeof(double) : sizeof(float);
}

}  // namespace

void packed_attention_forward(const PackedAttentionForward& call, int threads) {
    const Extent extent = checked(call.inputs, call.element_type, "packed_attention_forward");
    const Kernels& kernels = selected_kernels();
    const int64_t elements = attention_scratch(call.inputs).elements +
                             kKeysOfBlock * columns_of_block(call.inputs.heads / call.inputs.key_heads);
    run_tasks(call.inputs.n_sequences * call.inputs.key_heads, extent.scores,
              elements * size_of_scalar(call.element_type), threads,
              [&](int64_t task, void* memory) { kernels.packed_attention_forward(call, task, memory); });
}

void packed_attention_backward(const PackedAttentionBackward& call, int threads) {
    const Extent extent = checked(call.inputs, call.element_type, "packed_attention_backward");
    const bool sums = call.prefix_key_sums != nullptr;
    check_runs(call, sums);
    const Kernels& kernels = selected_kernels();
    const AttentionScratch scratch = attention_scratch(call.inputs);
    const int64_t elements = scratch.elements + (sums ? 2 * extent.longest_prefix * scratch.width : 0) +
                             2 * extent.most_keys * columns_of_block(call.inputs.heads / call.inputs.key_heads);
    run_tasks(call.n_runs * call.inputs.key_heads, extent.scores, elements * size_of_scalar(call.element_type), threads,
              [&](int64_t task, void* memory) { kernels.packed_attention_backward(call, task, memory); });
}

}  // namespace cpu
}  // namespace entropy_fast
