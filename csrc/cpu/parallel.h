// A parallel loop over rows in contiguous ranges, one per thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace entropy_fast {
namespace cpu {

// Calls work(begin, end) on ranges that cover [0, rows) once. `work` must not throw.
template <typename Work>
void parallel_rows(int64_t rows, int64_t elements_per_row, int threads, const Work& work) {
    // Starting a thread costs about as much as this many elements.
    constexpr int64_t kElementsPerThread = int64_t{1} << 15;
    const int64_t worthwhile = std::max<int64_t>(1, rows * elements_per_row / kElementsPerThread);
    const int64_t parts = std::min({std::max<int64_t>(1, threads), worthwhile, std::max<int64_t>(1, rows)});
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(parts - 1));
    int64_t begin = 0;
    for (int64_t part = 1; part < parts; ++part) {
        const int64_t end = rows * part / parts;
        try {
            others.emplace_back([&work, begin, end] { work(begin, end); });
        } catch (const std::system_error&) {
            break;  // No more threads to be had: this one does the rest.
        }
        begin = end;
    }
    work(begin, rows);
    for (std::thread& other : others) other.join();
}

}  // namespace cpu
}  // namespace entropy_fast
