// Several neighbouring elements at once. Where they are aligned, one instruction moves 16 bytes; where they are not,
// the same thread moves the same elements one by one, so that what a thread adds up never depends on an address.
#pragma once

#include "elements.cuh"

namespace entropy_fast {
namespace cuda {

constexpr int kPackBytes = 16;

template <typename Storage>
constexpr int kPackSize = kPackBytes / int(sizeof(Storage));

template <typename Storage, int kCount>
struct alignas(sizeof(Storage) * kCount < kPackBytes ? sizeof(Storage) * kCount : kPackBytes) Pack {
    Storage elements[kCount];
};

template <int kCount, typename Storage>
__device__ inline bool is_aligned(const Storage* address) {
    return reinterpret_cast<uintptr_t>(address) % alignof(Pack<Storage, kCount>) == 0;
}

// `whole`: all of the pack's elements exist, and `from` is aligned. Otherwise those past `count` become `fill`.
template <int kCount, typename Storage, typename Scalar>
__device__ inline void load_pack(const Storage* from, bool whole, int64_t count, Scalar fill, Scalar (&to)[kCount]) {
    if (whole) {
        const Pack<Storage, kCount> pack = *reinterpret_cast<const Pack<Storage, kCount>*>(from);
#pragma unroll
        for (int i = 0; i < kCount; ++i) to[i] = Scalar(to_scalar(pack.elements[i]));
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) to[i] = i < count ? Scalar(to_scalar(from[i])) : fill;
    }
}

template <int kCount, typename Storage, typename Scalar>
__device__ inline void store_pack(Storage* to, bool whole, int64_t count, const Scalar (&from)[kCount]) {
    if (whole) {
        Pack<Storage, kCount> pack;
#pragma unroll
        for (int i = 0; i < kCount; ++i) store_scalar(&pack.elements[i], from[i]);
        *reinterpret_cast<Pack<Storage, kCount>*>(to) = pack;
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (i < count) store_scalar(to + i, from[i]);
        }
    }
}

}  // namespace cuda
}  // namespace entropy_fast
