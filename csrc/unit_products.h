// Gradients of a matrix for many units (prompts) at once, from what a backward brings for every token.
//
// The gradient of a linear map's weight is a sum over tokens of outer products of two signals, one narrow (the rank of
// an adapter, say) and one wide. Units want it apart, and with up to two weights w_l for the tokens:
//     sums_l[u][i][j] += sum over tokens t of unit u of  w_l(t) narrow[t][i] wide[t][j]
// One call goes through all units and labels l; narrow signals take the weights on the way into the cache, in the
// accumulator, and wide ones are read once.
#pragma once

#include <stdint.h>

#include "element_type.h"

namespace entropy_fast {

// Rows [begin, end) of one unit. A row is what has a weight.
struct UnitRun {
    int64_t unit;
    int64_t begin;
    int64_t end;
};
static_assert(sizeof(UnitRun) == 3 * sizeof(int64_t), "rows of a [runs, 3] tensor of int64");

struct UnitProducts {
    const void* narrow;   // [tokens, narrow_columns] of element_type
    const void* wide;     // [tokens, wide_columns] of element_type
    const void* weights;  // [labels, rows] of Scalar (float, or double for double elements)
    const UnitRun* runs;  // [n_runs], units ascending; a unit may have several
    void* first_sums;     // [units, ...] of Scalar
    void* second_sums;    // likewise, of the second label; null where there is one
    int64_t n_runs;
    int64_t narrow_columns;
    int64_t wide_columns;
    int64_t narrow_row;      // from a token to the next, in elements
    int64_t wide_row;        // likewise
    int64_t weights_row;     // from a label to the next, in elements
    int64_t tokens_per_row;  // how many tokens in a line share a weight
    int64_t unit_stride;     // of the sums, in elements
    int64_t narrow_stride;
    int64_t wide_stride;
    ElementType element_type;
};

}  // namespace entropy_fast
