// Enough of a GPU for g++ to compile csrc/slabs.cu: every thread of a CTA is a fiber that runs until it has to wait for
// others. Shared memory begins as NaN. A copy into it arrives when its thread waits for it and not before, and what it
// will write over is NaN meanwhile. `order` says who goes first: 0 the first thread, 1 the last. A program whose result
// depends on that, or that is NaN, lacks a barrier.
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

struct Index {
    int x;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }

static Index threadIdx, blockIdx;

namespace emulation {

constexpr int STACK = 1 << 16;
enum State { READY, AT_WARP, AT_CTA, DONE };

struct Copy {
    float *to;
    const float* from;
    int count, bytes;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state = READY;
    std::vector<std::vector<Copy>> groups{{}};  // the last one is still open
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static std::function<void()> body;

static void wait(State state) {
    Fiber& own = fibers[threadIdx.x];
    own.state = state;
    swapcontext(&own.context, &scheduler);
}
static void begin() {
    body();
    wait(DONE);
}
static void copy(float* to, const float* from, int count, int bytes) {
    for (int i = 0; i < count; i++) to[i] = NAN;
    fibers[threadIdx.x].groups.back().push_back({to, from, count, bytes});
}
static bool release(size_t first, size_t count, State state) {
    bool any = false;
    for (size_t i = first; i < first + count; i++)
        if (fibers[i].state == state) any = true;
        else if (fibers[i].state != DONE) return false;
    for (size_t i = first; i < first + count && any; i++)
        if (fibers[i].state == state) fibers[i].state = READY;
    return any;
}
// False where threads wait for each other for ever.
static bool run_block(int threads, int order) {
    fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(STACK);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, begin, 0);
    }
    for (;;) {
        bool ran = false;
        for (int i = 0; i < threads; i++) {
            threadIdx.x = order ? threads - 1 - i : i;
            while (fibers[threadIdx.x].state == READY) ran = true, swapcontext(&scheduler, &fibers[threadIdx.x].context);
            const int warp = threadIdx.x / 32;
            if (i % 32 == 31 && release(warp * 32, 32, AT_WARP)) i -= 32;  // the same warp goes on
        }
        if (!release(0, threads, AT_CTA) && !ran) break;
    }
    for (Fiber& fiber : fibers)
        if (fiber.state != DONE) return false;
    return true;
}

}  // namespace emulation

static inline void __syncthreads() { emulation::wait(emulation::AT_CTA); }
static inline void __syncwarp() { emulation::wait(emulation::AT_WARP); }

// ---- async.cuh ------------------------------------------------------------------------------------------------------

static inline void copy_four(float* to, const float* from, int bytes) { emulation::copy(to, from, 4, bytes); }
static inline void copy_one(float* to, const float* from, int bytes) { emulation::copy(to, from, 1, bytes); }
static inline void commit() { emulation::fibers[threadIdx.x].groups.emplace_back(); }
template <int N> static inline void wait_but() {
    auto& groups = emulation::fibers[threadIdx.x].groups;
    while (groups.size() > N + 1) {
        for (const emulation::Copy& c : groups.front()) {
            for (int i = 0; i < c.count; i++) c.to[i] = 0.0f;
            std::memcpy(c.to, c.from, c.bytes);
        }
        groups.erase(groups.begin());
    }
}
static inline float load_now(const float* from, bool inside, float otherwise) { return inside ? *from : otherwise; }
