// Vectors of the width this translation unit is compiled for, in GCC/Clang vector extensions.
//
// Included only by sources that are compiled once per instruction set. Nothing here comes from the standard library and
// everything has internal linkage: an inline function that is emitted with AVX-512 in one translation unit and with
// SSE2 in another is one symbol to the linker, and it may keep the copy that the processor cannot run.
#pragma once

#include <stdint.h>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float f32v __attribute__((vector_size(kVectorBytes)));
typedef int32_t i32v __attribute__((vector_size(kVectorBytes)));
typedef uint32_t u32v __attribute__((vector_size(kVectorBytes)));
typedef uint16_t u16v __attribute__((vector_size(kVectorBytes / 2)));
typedef double f64v __attribute__((vector_size(kVectorBytes)));
typedef float f32half __attribute__((vector_size(kVectorBytes / 2)));
typedef int64_t i64v __attribute__((vector_size(kVectorBytes)));
typedef uint64_t u64v __attribute__((vector_size(kVectorBytes)));

template <typename To, typename From>
inline To bit_cast_vector(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    return (To)from;
}

template <typename Vector, typename Pointer>
inline Vector load_unaligned(const Pointer* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
}

template <typename Vector, typename Pointer>
inline void store_unaligned(Pointer* to, Vector vector) {
    __builtin_memcpy(to, &vector, sizeof(vector));
}

// Keeps `b` where the comparison is false, so a NaN in `a` is skipped.
template <typename Vector>
inline Vector maximum(Vector a, Vector b) {
    return a > b ? a : b;
}

// The lanes of a float vector as doubles, in order.
inline void widen(f32v from, f64v* low, f64v* high) {
    f32half halves[2];
    __builtin_memcpy(halves, &from, sizeof(from));
    *low = __builtin_convertvector(halves[0], f64v);
    *high = __builtin_convertvector(halves[1], f64v);
}

inline f32v square_root(f32v x) {
    f32v root;
    for (unsigned lane = 0; lane < sizeof(f32v) / sizeof(float); ++lane) root[lane] = __builtin_sqrtf(x[lane]);
    return root;
}

inline f64v square_root(f64v x) {
    f64v root;
    for (unsigned lane = 0; lane < sizeof(f64v) / sizeof(double); ++lane) root[lane] = __builtin_sqrt(x[lane]);
    return root;
}

// Below this exp is less than the smallest normal number.
constexpr float kExpFloor32 = -0x1.5d589ep6f;
constexpr double kExpFloor64 = -0x1.6232bdd7abcd2p9;

// No less than the floor; NaN stays NaN. A NaN difference, or the -inf of a token of probability 0, meets the
// arithmetic of weighted sums as a finite number or as NaN, never as 0 * inf.
inline f32v no_less_than_floor(f32v x) { return maximum(f32v{} + kExpFloor32, x); }
inline f64v no_less_than_floor(f64v x) { return maximum(f64v{} + kExpFloor64, x); }

// 2^n exp_r for the n in the low bits of `shifted`: n is added to the exponent.
inline f32v scaled_by_power(f32v exp_r, f32v shifted) {
    return bit_cast_vector<f32v>(bit_cast_vector<u32v>(exp_r) + (bit_cast_vector<u32v>(shifted) << 23));
}

// exp(x) for x between the floor and 0 (or a little above), within 2 units in the last place; NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln(2)/2. Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the mantissa.
// The coefficients are those of Cephes' expf.
inline f32v exp_above_floor(f32v x) {
    const f32v round_magic = f32v{} + 0x1.8p23f;
    const f32v shifted = x * 0x1.715476p+0f + round_magic;
    const f32v n = shifted - round_magic;
    // ln 2 in two parts: n times the first is exact.
    const f32v r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
    f32v p = f32v{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return scaled_by_power(p * (r * r) + r + 1.0f, shifted);
}

// The same within 2 + |x| / 16 units in the last place, for terms of a sum whose largest are near exp(0): what is small
// may be less exact. A quarter less work.
//
// 2^f for f = x / ln 2 - n, in one rounding from x; the polynomial is a minimax fit to exp on |f ln 2| <= ln(2)/2 with
// ln 2 multiplied into its coefficients, and 2e-8 off at most.
inline f32v exp_term(f32v x) {
    const f32v round_magic = f32v{} + 0x1.8p23f;
    const f32v shifted = x * 0x1.715476p+0f + round_magic;
    const f32v n = shifted - round_magic;
    const f32v f = x * 0x1.715476p+0f - n;
    f32v p = f32v{} + 1.535330957e-04f;
    p = p * f + 1.339893905e-03f;
    p = p * f + 9.618437849e-03f;
    p = p * f + 5.550332367e-02f;
    p = p * f + 2.402264774e-01f;
    p = p * f + 6.931471825e-01f;
    return scaled_by_power(p * f + 1.0f, shifted);
}

// The double version: the Taylor series of degree 13, whose remainder on |r| <= ln(2)/2 is 4e-18.
inline f64v exp_above_floor(f64v x) {
    const f64v round_magic = f64v{} + 0x1.8p52;
    const f64v shifted = x * 0x1.71547652b82fep+0 + round_magic;
    const f64v n = shifted - round_magic;
    const f64v r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    f64v p = f64v{} + 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    const f64v exp_r = p * (r * r) + r + 1.0;
    return bit_cast_vector<f64v>(bit_cast_vector<u64v>(exp_r) + (bit_cast_vector<u64v>(shifted) << 52));
}

inline f64v exp_term(f64v x) { return exp_above_floor(x); }

// exp(x) for x <= 0: below the floor the result is 0.
inline f32v exp_nonpositive(f32v x) { return x < kExpFloor32 ? f32v{} : exp_above_floor(x); }
inline f64v exp_nonpositive(f64v x) { return x < kExpFloor64 ? f64v{} : exp_above_floor(x); }

// How each element type is stored, and in which type it is computed with.
struct Float32 {
    using Storage = float;
    using Scalar = float;
    using Vector = f32v;
    static Vector load(const Storage* from) { return load_unaligned<f32v>(from); }
    static void store(Storage* to, Vector value) { store_unaligned(to, value); }
    static constexpr Storage kNegativeInfinity = -__builtin_inff();
};

struct Float64 {
    using Storage = double;
    using Scalar = double;
    using Vector = f64v;
    static Vector load(const Storage* from) { return load_unaligned<f64v>(from); }
    static void store(Storage* to, Vector value) { store_unaligned(to, value); }
    static constexpr Storage kNegativeInfinity = -__builtin_inf();
};

struct BFloat16 {
    using Storage = uint16_t;
    using Scalar = float;
    using Vector = f32v;
    static constexpr Storage kNegativeInfinity = 0xff80;

    static Vector load(const Storage* from) {
        return bit_cast_vector<f32v>(__builtin_convertvector(load_unaligned<u16v>(from), u32v) << 16);
    }

    // Rounds to nearest, ties to even; the addition would carry a NaN over into infinity, hence the selection.
    static void store(Storage* to, Vector value) {
        const u32v bits = bit_cast_vector<u32v>(value);
        const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const u32v quiet_nan = u32v{} + 0x7fc0u;
        store_unaligned(to, __builtin_convertvector(value == value ? rounded : quiet_nan, u16v));
    }
};

// Rounds to nearest, ties up, and takes numbers for granted: a third of the work. For weights of a product.
template <typename Element>
inline void store_weight(typename Element::Storage* to, typename Element::Vector value) {
    Element::store(to, value);
}

template <>
inline void store_weight<BFloat16>(BFloat16::Storage* to, f32v value) {
    store_unaligned(to, __builtin_convertvector((bit_cast_vector<u32v>(value) + 0x8000u) >> 16, u16v));
}

struct Float16 {
    using Storage = uint16_t;
    using Scalar = float;
    using Vector = f32v;
    static constexpr Storage kNegativeInfinity = 0xfc00;

    // The half's exponent and mantissa, moved to where a float has them, are the value times 2^-112, subnormals too.
    static Vector load(const Storage* from) {
        const u32v half = __builtin_convertvector(load_unaligned<u16v>(from), u32v);
        const u32v magnitude = (half & 0x7fffu) << 13;
        const u32v finite = bit_cast_vector<u32v>(bit_cast_vector<f32v>(magnitude) * 0x1p112f);
        const u32v bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
        return bit_cast_vector<f32v>(bits | ((half & 0x8000u) << 16));
    }

    // Rounds to nearest, ties to even. For a result that is subnormal in half precision, the addition of 0.5 (whose
    // last mantissa bit is worth 2^-24, the smallest half) does the rounding.
    static void store(Storage* to, Vector value) {
        const u32v bits = bit_cast_vector<u32v>(value);
        const u32v sign = bits & 0x80000000u;
        const u32v magnitude = bits ^ sign;
        const u32v normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
        const u32v subnormal = bit_cast_vector<u32v>(bit_cast_vector<f32v>(magnitude) + 0.5f) - 0x3f000000u;
        const u32v special = magnitude > 0x7f800000u ? u32v{} + 0x7e00u : u32v{} + 0x7c00u;
        u32v half = magnitude < 0x38800000u ? subnormal : normal;
        half = magnitude >= 0x47800000u ? special : half;
        store_unaligned(to, __builtin_convertvector(half | (sign >> 16), u16v));
    }
};

template <typename Element>
constexpr int64_t lanes() {
    return sizeof(typename Element::Vector) / sizeof(typename Element::Scalar);
}

// The last, partial vector of a row, filled up with `fill`.
template <typename Element>
typename Element::Vector load_partial(const typename Element::Storage* from, int64_t count,
                                      typename Element::Storage fill) {
    typename Element::Storage padded[lanes<Element>()];
    for (int64_t i = 0; i < lanes<Element>(); ++i) padded[i] = i < count ? from[i] : fill;
    return Element::load(padded);
}

// Filled up with -inf, which changes neither a maximum nor a sum of exponentials.
template <typename Element>
typename Element::Vector load_tail(const typename Element::Storage* from, int64_t count) {
    return load_partial<Element>(from, count, Element::kNegativeInfinity);
}

template <typename Element>
typename Element::Scalar load_one(const typename Element::Storage* from) {
    return load_tail<Element>(from, 1)[0];
}

template <typename Element>
void store_tail(typename Element::Storage* to, typename Element::Vector value, int64_t count) {
    typename Element::Storage padded[lanes<Element>()] = {};
    Element::store(padded, value);
    for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

template <typename Element>
void store_one(typename Element::Storage* to, typename Element::Scalar value) {
    store_tail<Element>(to, typename Element::Vector{} + value, 1);
}

template <typename Vector>
auto highest_lane(Vector vector) {
    auto highest = vector[0];
    for (unsigned lane = 1; lane < sizeof(Vector) / sizeof(highest); ++lane) {
        if (vector[lane] > highest) highest = vector[lane];
    }
    return highest;
}

inline double sum_of_lanes(f64v vector) {
    double sum = 0.0;
    for (unsigned lane = 0; lane < sizeof(f64v) / sizeof(double); ++lane) sum += vector[lane];
    return sum;
}

inline double sum_of_lanes(f32v vector) {
    f64v low, high;
    widen(vector, &low, &high);
    return sum_of_lanes(low + high);
}

}  // namespace
