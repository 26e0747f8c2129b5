#include "unit_products.h"

#include <algorithm>
#include <stdexcept>

#include "dispatch.h"
#include "parallel.h"
#include "unit_products_tasks.h"

namespace entropy_fast {
namespace cpu {

void unit_products(const UnitProducts& call, int threads) {
    if (call.n_runs < 0 || call.narrow_columns < 0 || call.wide_columns < 0) {
        throw std::invalid_argument("unit_products: negative size");
    }
    if (call.tokens_per_row < 1) throw std::invalid_argument("unit_products: a weight for no token");
    if (call.first_sums == nullptr) throw std::invalid_argument("unit_products: no sums");
    int64_t tokens = 0;
    for (int64_t run = 0; run < call.n_runs; ++run) {
        const UnitRun& own = call.runs[run];
        if (own.unit < 0 || own.begin < 0 || own.end < own.begin) {
            throw std::invalid_argument("unit_products: a run that ends before it begins");
        }
        if (run > 0 && own.unit < call.runs[run - 1].unit) {
            throw std::invalid_argument("unit_products: units are not in ascending order");
        }
        tokens = std::max(tokens, (own.end - own.begin) * call.tokens_per_row);
    }
    const Kernels& kernels = selected_kernels();
    const int64_t work = tokens * std::min(call.wide_columns, kUnitProductColumns);
    parallel_rows(unit_product_tasks(call), work, threads,
                  [&](int64_t begin, int64_t end) { kernels.unit_products(call, begin, end); });
}

}  // namespace cpu
}  // namespace entropy_fast
