// Matrix products of factors that lie in the caches, and that no library call would be worth: C += A B, or C = A B.
//
// Included only by sources that are compiled once per instruction set, like simd.h.
#pragma once

#include "simd.h"

namespace {

// Accumulators of a tile fill the registers: rows x 2 vectors, two vectors of B and one broadcast element of A.
constexpr int kTileVectors = 2;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

// A and C by element strides; the elements of a row of B and of C stand next to one another.
template <typename Scalar>
struct SmallProduct {
    const Scalar* a;
    int64_t a_row;    // from a row of A to the next
    int64_t a_inner;  // from one of the summed elements to the next
    const Scalar* b;
    int64_t b_row;
    Scalar* c;
    int64_t c_row;
    int64_t rows;
    int64_t columns;
    int64_t inner;
    bool fresh = false;  // C = A B, whatever C was
};

template <typename Element, int rows, int vectors, bool partial>
void add_tile(const SmallProduct<typename Element::Scalar>& product, int64_t row, int64_t column) {
    using Vector = typename Element::Vector;
    constexpr int64_t kLanes = lanes<Element>();
    const auto* a = product.a + row * product.a_row;
    const auto* b = product.b + column;
    auto* c = product.c + row * product.c_row + column;
    const int64_t tail = product.columns - column - (vectors - 1) * kLanes;
    Vector sums[rows][vectors] = {};
    for (int64_t k = 0; k < product.inner; ++k) {
        Vector of_b[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            of_b[v] = partial && v == vectors - 1 ? load_partial<Element>(b + v * kLanes, tail, 0)
                                                  : Element::load(b + v * kLanes);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            // x - 0 is x for every x; x + 0 is not for -0, and would be computed.
            const Vector of_a = a[r * product.a_row] - Vector{};
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sums[r][v] += of_a * of_b[v];
        }
        a += product.a_inner;
        b += product.b_row;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            auto* to = c + r * product.c_row + v * kLanes;
            if (partial && v == vectors - 1) {
                const Vector before = product.fresh ? Vector{} : load_partial<Element>(to, tail, 0);
                store_tail<Element>(to, before + sums[r][v], tail);
            } else {
                Element::store(to, product.fresh ? sums[r][v] : Element::load(to) + sums[r][v]);
            }
        }
    }
}

template <typename Element, int vectors, bool partial>
void add_columns(const SmallProduct<typename Element::Scalar>& product, int64_t column) {
    int64_t row = 0;
    for (; row + kTileRows <= product.rows; row += kTileRows) {
        add_tile<Element, kTileRows, vectors, partial>(product, row, column);
    }
    if constexpr (kTileRows > 8) {
        for (; row + 8 <= product.rows; row += 8) add_tile<Element, 8, vectors, partial>(product, row, column);
    }
    for (; row + 4 <= product.rows; row += 4) add_tile<Element, 4, vectors, partial>(product, row, column);
    for (; row + 2 <= product.rows; row += 2) add_tile<Element, 2, vectors, partial>(product, row, column);
    for (; row < product.rows; ++row) add_tile<Element, 1, vectors, partial>(product, row, column);
}

// C += A B or C = A B, for elements that are their own accumulators (Float32, Float64). The columns of B that a tile
// reads stay in the nearest cache for all rows.
template <typename Element>
void add_product(const SmallProduct<typename Element::Scalar>& product) {
    constexpr int64_t kLanes = lanes<Element>();
    int64_t column = 0;
    for (; column + kTileVectors * kLanes <= product.columns; column += kTileVectors * kLanes) {
        add_columns<Element, kTileVectors, false>(product, column);
    }
    if (column + kLanes < product.columns) return add_columns<Element, 2, true>(product, column);
    if (column + kLanes == product.columns) return add_columns<Element, 1, false>(product, column);
    if (column < product.columns) add_columns<Element, 1, true>(product, column);
}

}  // namespace
