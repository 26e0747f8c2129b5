// The tasks of unit_products (csrc/unit_products.h), compiled once per instruction set.
#include "unit_products_tasks.h"

#include "small_product.h"
#include "variants.h"

namespace {

using entropy_fast::UnitProducts;
using entropy_fast::UnitRun;
using entropy_fast::cpu::kUnitProductColumns;

// What lies in the cache at a time: tokens of both factors, and rows of the result (narrow columns of both labels).
constexpr int64_t kTokens = 64;
constexpr int64_t kRows = 64;

// The element type that a scalar is.
template <typename Scalar>
struct Of;
template <>
struct Of<float> {
    using Element = Float32;
};
template <>
struct Of<double> {
    using Element = Float64;
};

// The same numbers in the type that is computed with.
template <typename Element>
struct Wide {
    using Scalar = typename Element::Scalar;
    Scalar block[kTokens * kUnitProductColumns];

    const Scalar* load(const typename Element::Storage* from, int64_t row, int64_t tokens, int64_t columns,
                       int64_t* stride) {
        constexpr int64_t kLanes = lanes<Element>();
        for (int64_t t = 0; t < tokens; ++t, from += row) {
            Scalar* to = block + t * kUnitProductColumns;
            int64_t j = 0;
            for (; j + kLanes <= columns; j += kLanes) store_unaligned(to + j, Element::load(from + j));
            for (; j < columns; ++j) to[j] = load_one<Element>(from + j);
        }
        *stride = kUnitProductColumns;
        return block;
    }
};

template <typename Element>
struct InPlace {
    const typename Element::Scalar* load(const typename Element::Storage* from, int64_t row, int64_t, int64_t,
                                         int64_t* stride) {
        *stride = row;
        return from;
    }
};

template <>
struct Wide<Float32> : InPlace<Float32> {};
template <>
struct Wide<Float64> : InPlace<Float64> {};

// Labels [first, last).
struct Labels {
    int64_t first;
    int64_t last;
};

// Which labels have a weight other than 0 among the rows of a run: no work for the others.
template <typename Scalar>
Labels labels_of(const UnitProducts& call, const UnitRun& run, int64_t count) {
    const auto* weights = static_cast<const Scalar*>(call.weights);
    const auto any = [&](int64_t label) {
        for (int64_t row = run.begin; row < run.end; ++row) {
            if (weights[label * call.weights_row + row] != 0) return true;
        }
        return false;
    };
    Labels labels = {0, count};
    if (!any(0)) labels.first = 1;
    if (count > 1 && !any(1)) labels.last = 1;
    return labels;
}

// Narrow columns [first, first + columns) of the tokens, with each label's weights, label after label.
template <typename Element>
void weighted(const UnitProducts& call, Labels labels, int64_t token, int64_t tokens, int64_t first, int64_t columns,
              typename Element::Scalar* to) {
    using Scalar = typename Element::Scalar;
    const auto* narrow = static_cast<const typename Element::Storage*>(call.narrow) + token * call.narrow_row + first;
    const auto* weights = static_cast<const Scalar*>(call.weights);
    constexpr int64_t kLanes = lanes<Element>();
    for (int64_t t = 0; t < tokens; ++t, narrow += call.narrow_row) {
        for (int64_t label = labels.first; label < labels.last; ++label, to += columns) {
            const Scalar weight = weights[label * call.weights_row + (token + t) / call.tokens_per_row];
            int64_t i = 0;
            for (; i + kLanes <= columns; i += kLanes) store_unaligned(to + i, Element::load(narrow + i) * weight);
            for (; i < columns; ++i) to[i] = load_one<Element>(narrow + i) * weight;
        }
    }
}

// What a task computes in: found[label][narrow column][wide column], and the factors on the way there.
template <typename Element>
struct Workspace {
    typename Element::Scalar narrow[kTokens * kRows];
    typename Element::Scalar found[kRows * kUnitProductColumns];
    Wide<Element> wide;
};

// A stretch of the columns of a factor.
struct Stretch {
    int64_t first;
    int64_t count;
};

inline Stretch stretch_from(int64_t first, int64_t all, int64_t longest) {
    return {first, all - first < longest ? all - first : longest};
}

template <typename Element>
void add_run(const UnitProducts& call, const UnitRun& run, int64_t n_labels, Stretch rows, Stretch columns,
             Workspace<Element>* space) {
    const auto* wide = static_cast<const typename Element::Storage*>(call.wide) + columns.first;
    const int64_t end = run.end * call.tokens_per_row;
    const Labels labels = labels_of<typename Element::Scalar>(call, run, n_labels);
    if (labels.first >= labels.last) return;
    const int64_t found_rows = (labels.last - labels.first) * rows.count;
    auto* found = space->found + labels.first * rows.count * columns.count;
    for (int64_t token = run.begin * call.tokens_per_row; token < end; token += kTokens) {
        const int64_t tokens = stretch_from(token, end, kTokens).count;
        weighted<Element>(call, labels, token, tokens, rows.first, rows.count, space->narrow);
        int64_t stride = 0;
        const auto* block =
            space->wide.load(wide + token * call.wide_row, call.wide_row, tokens, columns.count, &stride);
        add_product<typename Of<typename Element::Scalar>::Element>(
            {space->narrow, 1, found_rows, block, stride, found, columns.count, found_rows, columns.count, tokens});
    }
}

// The inner loop goes along the columns that stand next to one another in the sums.
template <typename Scalar>
void add_found(const UnitProducts& call, Scalar* sums, const Scalar* found, Stretch rows, Stretch columns) {
    sums += rows.first * call.narrow_stride + columns.first * call.wide_stride;
    if (call.wide_stride == 1) {
        for (int64_t i = 0; i < rows.count; ++i) {
            for (int64_t j = 0; j < columns.count; ++j)
                sums[i * call.narrow_stride + j] += found[i * columns.count + j];
        }
        return;
    }
    for (int64_t j = 0; j < columns.count; ++j) {
        for (int64_t i = 0; i < rows.count; ++i) {
            sums[i * call.narrow_stride + j * call.wide_stride] += found[i * columns.count + j];
        }
    }
}

// One unit, whose runs are [first, last), and one stretch of the wide columns.
template <typename Element>
void run_task(const UnitProducts& call, const UnitRun* first, const UnitRun* last, Stretch columns) {
    using Scalar = typename Element::Scalar;
    Workspace<Element> space;
    const int64_t labels = call.second_sums == nullptr ? 1 : 2;
    Scalar* sums[2] = {static_cast<Scalar*>(call.first_sums), static_cast<Scalar*>(call.second_sums)};
    for (int64_t row = 0; row < call.narrow_columns; row += kRows / labels) {
        const Stretch rows = stretch_from(row, call.narrow_columns, kRows / labels);
        __builtin_memset(space.found, 0, sizeof(Scalar) * labels * rows.count * columns.count);
        for (const UnitRun* run = first; run < last; ++run) {
            add_run<Element>(call, *run, labels, rows, columns, &space);
        }
        for (int64_t label = 0; label < labels; ++label) {
            add_found(call, sums[label] + first->unit * call.unit_stride,
                      space.found + label * rows.count * columns.count, rows, columns);
        }
    }
}

template <typename Element>
void run_tasks(const UnitProducts& call, int64_t begin, int64_t end) {
    const int64_t stretches = entropy_fast::cpu::unit_product_stretches(call);
    const UnitRun* const all = call.runs + call.n_runs;
    for (int64_t task = begin; task < end; ++task) {
        const UnitRun* const first = call.runs + task / stretches;
        // All runs of a unit belong to the task of its first one: two threads would add to one sum.
        if (first > call.runs && first[-1].unit == first->unit) continue;
        const UnitRun* last = first + 1;
        while (last < all && last->unit == first->unit) ++last;
        const int64_t column = task % stretches * kUnitProductColumns;
        run_task<Element>(call, first, last, stretch_from(column, call.wide_columns, kUnitProductColumns));
    }
}

}  // namespace

namespace entropy_fast {
namespace cpu {
namespace ENTROPY_FAST_VARIANT {

void unit_products(const UnitProducts& call, int64_t begin, int64_t end) {
    switch (call.element_type) {
        case ElementType::kFloat32:
            return run_tasks<Float32>(call, begin, end);
        case ElementType::kFloat64:
            return run_tasks<Float64>(call, begin, end);
        case ElementType::kBFloat16:
            return run_tasks<BFloat16>(call, begin, end);
        case ElementType::kFloat16:
            return run_tasks<Float16>(call, begin, end);
    }
}

}  // namespace ENTROPY_FAST_VARIANT
}  // namespace cpu
}  // namespace entropy_fast
