#include "parallel.h"

#include <dlfcn.h>

#include <system_error>
#include <thread>
#include <vector>

namespace entropy_fast {
namespace cpu {
namespace {

// GCC's entry points, which LLVM's and Intel's runtimes have too.
struct OpenMp {
    void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
    int (*thread_number)();
    int (*thread_count)();

    bool complete() const { return parallel != nullptr && thread_number != nullptr && thread_count != nullptr; }
};

template <typename Function>
void look_up(const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

// Looked up until it is there: torch may be imported after this library.
const OpenMp* open_mp() {
    thread_local OpenMp found = {};
    if (!found.complete()) {
        look_up("GOMP_parallel", &found.parallel);
        look_up("omp_get_thread_num", &found.thread_number);
        look_up("omp_get_num_threads", &found.thread_count);
    }
    return found.complete() ? &found : nullptr;
}

struct Loop {
    int64_t rows;
    void (*work)(const void* context, int64_t begin, int64_t end);
    const void* context;
    const OpenMp* runtime;
};

// The runtime may give fewer threads than asked for (inside another parallel region, one).
void run_own_part(void* data) {
    const Loop& loop = *static_cast<const Loop*>(data);
    const int64_t part = loop.runtime->thread_number();
    const int64_t parts = loop.runtime->thread_count();
    loop.work(loop.context, loop.rows * part / parts, loop.rows * (part + 1) / parts);
}

}  // namespace

bool uses_openmp() { return open_mp() != nullptr; }

void parallel_ranges(int64_t rows, int64_t parts, void (*work)(const void* context, int64_t begin, int64_t end),
                     const void* context) {
    const OpenMp* runtime = open_mp();
    if (runtime != nullptr) {
        Loop loop = {rows, work, context, runtime};
        return runtime->parallel(run_own_part, &loop, static_cast<unsigned>(parts), 0);
    }
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(parts - 1));
    int64_t begin = 0;
    for (int64_t part = 1; part < parts; ++part) {
        const int64_t end = rows * part / parts;
        try {
            others.emplace_back([work, context, begin, end] { work(context, begin, end); });
        } catch (const std::system_error&) {
            break;  // No more threads to be had: this one does the rest.
        }
        begin = end;
    }
    work(context, begin, rows);
    for (std::thread& other : others) other.join();
}

}  // namespace cpu
}  // namespace entropy_fast
