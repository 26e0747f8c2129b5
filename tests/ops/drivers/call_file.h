// One call of token_logprobs, forward and backward, read from a file and its results written to another.
// tests/_support/kernel_drivers.py writes and reads these files.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "token_logprobs.h"

struct CallFile {
    int64_t element_type, rows, vocabulary, row_stride, ignore_index;
    std::vector<char> logits, grad_logprob;
    std::vector<int64_t> targets;
    std::vector<double> grad_lse;
    std::vector<char> logprob, grad_logits;
    std::vector<double> lse;

    entropy_fast::ElementType type() const { return static_cast<entropy_fast::ElementType>(element_type); }
    size_t storage() const { return element_type == 0 ? 4 : element_type == 1 ? 8 : 2; }
    size_t scalar() const { return element_type == 1 ? 8 : 4; }

    entropy_fast::TokenLogprobsForward forward() {
        return {logits.data(), targets.data(), logprob.data(), lse.data(), rows,
                vocabulary,    row_stride,     ignore_index,   type()};
    }
    entropy_fast::TokenLogprobsBackward backward() {
        return {logits.data(), targets.data(), lse.data(), grad_logprob.data(), grad_lse.data(), grad_logits.data(),
                rows,          vocabulary,     row_stride, ignore_index,        type()};
    }
};

template <typename T>
void read_exactly(std::FILE* file, T* to, size_t count) {
    if (std::fread(to, sizeof(T), count, file) != count) std::abort();
}

template <typename T>
void write_exactly(std::FILE* file, const T* from, size_t count) {
    if (std::fwrite(from, sizeof(T), count, file) != count) std::abort();
}

inline CallFile read_call(const char* path) {
    CallFile call;
    std::FILE* file = std::fopen(path, "rb");
    if (file == nullptr) std::abort();
    read_exactly(file, &call.element_type, 1);
    read_exactly(file, &call.rows, 1);
    read_exactly(file, &call.vocabulary, 1);
    read_exactly(file, &call.row_stride, 1);
    read_exactly(file, &call.ignore_index, 1);
    call.logits.resize(call.rows * call.row_stride * call.storage());
    call.targets.resize(call.rows);
    call.grad_logprob.resize(call.rows * call.scalar());
    call.grad_lse.resize(call.rows);
    read_exactly(file, call.logits.data(), call.logits.size());
    read_exactly(file, call.targets.data(), call.targets.size());
    read_exactly(file, call.grad_logprob.data(), call.grad_logprob.size());
    read_exactly(file, call.grad_lse.data(), call.grad_lse.size());
    std::fclose(file);
    // All bits set is a NaN in every element type: what a kernel forgets to write is seen.
    call.logprob.assign(call.rows * call.scalar(), static_cast<char>(0xff));
    call.grad_logits.assign(call.rows * call.vocabulary * call.storage(), static_cast<char>(0xff));
    call.lse.assign(call.rows, -__builtin_nan(""));
    return call;
}

inline void write_results(const CallFile& call, const char* path) {
    std::FILE* file = std::fopen(path, "wb");
    if (file == nullptr) std::abort();
    write_exactly(file, call.logprob.data(), call.logprob.size());
    write_exactly(file, call.lse.data(), call.lse.size());
    write_exactly(file, call.grad_logits.data(), call.grad_logits.size());
    std::fclose(file);
}
