// What a call must satisfy before any kernel sees it, on either device.
#pragma once

#include <stdexcept>
#include <string>

#include "token_logprobs.h"

namespace entropy_fast {

template <typename Call>
void check_shape(const Call& call) {
    if (call.rows < 0 || call.vocabulary < 0) throw std::invalid_argument("token_logprobs: negative size");
    if (call.rows > 0 && call.vocabulary == 0) throw std::invalid_argument("token_logprobs: rows without a vocabulary");
    if (call.rows > 1 && call.row_stride < 0) throw std::invalid_argument("token_logprobs: negative row stride");
}

// For targets that the host can read. The kernels themselves trust them.
template <typename Call>
void check_targets(const Call& call) {
    for (int64_t row = 0; row < call.rows; ++row) {
        const int64_t target = call.targets[row];
        if (target != call.ignore_index && (target < 0 || target >= call.vocabulary)) {
            throw std::invalid_argument("token_logprobs: targets[" + std::to_string(row) + "] is " +
                                        std::to_string(target) + ", outside [0, " + std::to_string(call.vocabulary) +
                                        ") and not ignore_index");
        }
    }
}

}  // namespace entropy_fast
