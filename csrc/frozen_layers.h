// Layers without a trained parameter on a model's way from token to token: RMS norm, and the gate of an MLP.
//
// Written with tensor operations each takes a dozen passes over its input, and fresh memory for most of them. Here each
// direction is one pass, or two over a row that stays in the cache. Rows are contiguous, and of Float32 or Float64.
#pragma once

#include <stdint.h>

#include "element_type.h"

namespace entropy_fast {

// y = w x r,  r = 1 / sqrt(mean(x^2) + epsilon)
struct RmsNormForward {
    const void* x;       // [rows, width]
    const void* weight;  // [width]
    void* y;             // [rows, width]
    void* scales;        // [rows]: r
    int64_t rows;
    int64_t width;
    double epsilon;
    ElementType element_type;
};

// dx = r w dy - x r^3 sum(w dy x) / width
struct RmsNormBackward {
    const void* dy;      // [rows, width]
    const void* x;       // [rows, width]
    const void* weight;  // [width]
    const void* scales;  // [rows]: r
    void* dx;            // [rows, width]
    int64_t rows;
    int64_t width;
    ElementType element_type;
};

// y = silu(gate) up,  silu(z) = z sigmoid(z)
struct GatedSiluForward {
    const void* gate;  // [rows, width]
    const void* up;    // [rows, width]
    void* y;           // [rows, width]
    int64_t rows;
    int64_t width;
    ElementType element_type;
};

// dgate = dy up s (1 + gate (1 - s)),  dup = dy gate s,  s = sigmoid(gate)
struct GatedSiluBackward {
    const void* dy;    // [rows, width]
    const void* gate;  // [rows, width]
    const void* up;    // [rows, width]
    void* dgate;       // [rows, width]
    void* dup;         // [rows, width]
    int64_t rows;
    int64_t width;
    ElementType element_type;
};

}  // namespace entropy_fast
