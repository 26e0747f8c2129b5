// How unit_products is cut into tasks: a task is a run and a stretch of the wide columns.
#pragma once

#include <stdint.h>

#include "../unit_products.h"

namespace entropy_fast {
namespace cpu {

// So many that the sums of a task stay in the nearest cache, whatever the rank.
constexpr int64_t kUnitProductColumns = 256;

// Internal linkage, for sources that are compiled once per instruction set.
static inline int64_t unit_product_stretches(const UnitProducts& call) {
    return (call.wide_columns + kUnitProductColumns - 1) / kUnitProductColumns;
}

static inline int64_t unit_product_tasks(const UnitProducts& call) {
    return call.n_runs * unit_product_stretches(call);
}

}  // namespace cpu
}  // namespace entropy_fast
