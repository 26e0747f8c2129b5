// Enough of CUDA to run a kernel on the host: every thread of a block is a host thread, blocks run one after another.
//
// Barriers are stricter than the hardware's: a thread that returns before a __syncthreads the others reach hangs the
// program, so whoever runs it sets a timeout. Shared memory is static, hence one object per kernel, as it should be.
#pragma once

#include <math.h>
#include <pthread.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct SimtIndex {
    unsigned x = 0;
};
inline thread_local SimtIndex threadIdx;
inline thread_local SimtIndex blockIdx;

class SimtBarrier {
  public:
    explicit SimtBarrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
    ~SimtBarrier() { pthread_barrier_destroy(&barrier_); }
    SimtBarrier(const SimtBarrier&) = delete;
    SimtBarrier& operator=(const SimtBarrier&) = delete;
    void wait() { pthread_barrier_wait(&barrier_); }

  private:
    pthread_barrier_t barrier_;
};

struct SimtBlock {
    explicit SimtBlock(unsigned threads) : whole(threads), end(threads), exchange(threads) {
        for (unsigned first = 0; first < threads; first += 32) warps.emplace_back(std::make_unique<SimtBarrier>(32));
    }
    SimtBarrier whole;
    SimtBarrier end;
    std::vector<std::unique_ptr<SimtBarrier>> warps;
    std::vector<uint64_t> exchange;
};
inline SimtBlock* simt_block = nullptr;

#ifdef ENTROPY_FAST_SIMT_WITHOUT_BARRIERS
inline void __syncthreads() {}
#else
inline void __syncthreads() { simt_block->whole.wait(); }
#endif

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    if (mask != 0xffffffffu) __builtin_trap();
    SimtBarrier& warp = *simt_block->warps[threadIdx.x / 32];
    std::memcpy(&simt_block->exchange[threadIdx.x], &value, sizeof(T));
    warp.wait();
    T other;
    std::memcpy(&other, &simt_block->exchange[threadIdx.x ^ static_cast<unsigned>(lane_mask)], sizeof(T));
    warp.wait();
    return other;
}

template <typename Kernel, typename... Arguments>
void simt_launch(Kernel kernel, unsigned blocks, unsigned threads, Arguments... arguments) {
    SimtBlock block(threads);
    simt_block = &block;
    std::vector<std::thread> workers;
    for (unsigned thread = 0; thread < threads; ++thread) {
        workers.emplace_back([=, &block] {
            threadIdx.x = thread;
            for (unsigned index = 0; index < blocks; ++index) {
                blockIdx.x = index;
                kernel(arguments...);
                block.end.wait();
            }
        });
    }
    for (std::thread& worker : workers) worker.join();
}

struct __half {
    _Float16 value;
};
inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 brain) {
    const uint32_t bits = static_cast<uint32_t>(brain.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (isnan(value)) return {0x7fff};
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
