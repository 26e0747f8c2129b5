// A parallel loop over rows in contiguous ranges, one per thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace entropy_fast {
namespace cpu {

// Calls work(context, begin, end) on ranges that cover [0, rows) once; it must not throw.
//
// On the threads of the OpenMP runtime that the process has loaded, found by name: torch's. Its idle threads keep a
// processor busy for some milliseconds after every matrix product, waiting for the next piece of work; threads of our
// own would have to share the processors with them. Where there is no such runtime, threads are started for the call.
void parallel_ranges(int64_t rows, int64_t parts, void (*work)(const void* context, int64_t begin, int64_t end),
                     const void* context);

// Whether there is an OpenMP runtime to run on.
bool uses_openmp();

template <typename Work>
void parallel_rows(int64_t rows, int64_t elements_per_row, int threads, const Work& work) {
    // Waking a thread costs about as much as this many elements.
    constexpr int64_t kElementsPerThread = int64_t{1} << 14;
    const int64_t worthwhile = std::max<int64_t>(1, rows * elements_per_row / kElementsPerThread);
    const int64_t parts = std::min({std::max<int64_t>(1, threads), worthwhile, std::max<int64_t>(1, rows)});
    if (parts == 1) return work(0, rows);
    parallel_ranges(
        rows, parts,
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Work*>(context))(begin, end); },
        &work);
}

}  // namespace cpu
}  // namespace entropy_fast
