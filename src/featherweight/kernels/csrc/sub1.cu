// Products with entropy-coded ternary matrices, all experts of a layer in one launch, and matrices made floats.
//
// A warp has 32 rows, a row a lane: the symbols of a row are read one after the other, each leads to a column of x, and
// that column is added up or taken away. No weight is ever multiplied, no zero ever written. Columns of x lie in shared
// memory STRIDE bytes apart, as often as that holds them, each lane with a copy of few others: what 32 lanes ask for at
// once lies in few banks else. Row scales wait until the sum is there.
//
// Which tokens go to which expert is found in the kernel, by every CTA for itself: nothing waits for the host. Each CTA
// has an equal share of the work, a piece of the list (expert, up to 8 of its tokens, matrix, tile of 32 rows).
//
// Macros: BF16 (activations, else float16), STRIDE (16, 32 or 64 bytes a column), CODES (bit b: symbols of b bits occur,
// bit 0: bitmaps occur). The layout of the words is that of docs/formats.md; their checksums are verified before.

#include "gpu.cuh"

constexpr int ROWS = 32, MOST = 8;  // rows of a tile; tokens in one pass over a matrix
constexpr int TURNS = 2;             // of all warps in a share, for it to be whole turns
constexpr int PLAIN = 0, BITMAP = 1;  // of the codec's kinds; else runs

struct Matrix {
    const u32* words;
    const u32* starts;  // the word each row starts with, rows + 1
    const u16* scales;  // of each row
    u32 kind, bits;     // the codec's, and in `kind` from bit 8 the codes of 4 levels, from 16 V, how many are not zero;
                        // 30: scales are bfloat16, else float16; 31: level 1 is negative
};

struct Params {
    const Matrix* matrices;  // experts x parts
    const u16* x;            // tokens x columns
    const long long* experts_of;  // of each pair of a token and an expert; `experts` or more: none
    u16* y;                  // pairs x parts x rows
    int pairs, choices;      // pair i is of token i / choices
    int experts, parts, rows, columns;
    int at_stage, at_x, stage_bytes, stages;  // places in shared memory; bytes of a warp's tile, and how many it has
};

// ---- shared memory ----------------------------------------------------------------------------------------------------

extern __shared__ __align__(128) u8 memory[];

__device__ __forceinline__ void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ u16 load_now(const u16* from) {  // not when it is used, as the compiler would
    u16 v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(from));
    return v;
}
template <int N> __device__ __forceinline__ void wait_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#include "sub1_rows.cuh"

// ---- the tiles of one matrix -----------------------------------------------------------------------------------------

// Where a lane's row lies in a matrix's words; nowhere, behind the last tile.
struct Span {
    u32 begin, end;
};

__device__ __forceinline__ Span find_span(const Params& p, const Matrix& matrix, int tile, int last, int lane) {
    if (tile >= last) return {0, 0};
    const int row = min(tile * ROWS + lane, p.rows), below = min(row + 1, p.rows);
    return {matrix.starts[row], matrix.starts[below]};
}
__device__ __forceinline__ u32 first_of(const Span& span) { return __shfl_sync(~0u, span.begin, 0) & ~3u; }
__device__ __forceinline__ u32 last_of(const Span& span) { return __shfl_sync(~0u, span.end, 31); }

// Starts the copy of a tile's words into a buffer, in pieces of 16 bytes.
__device__ __forceinline__ void start_tile(const Matrix& matrix, const Span& span, u32 buffer, int lane) {
    const u32 first = first_of(span), last = last_of(span), to = shared_address(memory) + buffer;
    for (u32 i = first + lane * 4; i < last; i += 128) copy_async(to + (i - first) * 4, matrix.words + i);
    commit();
}
// Has a tile's words brought as near as the L2 cache.
__device__ __forceinline__ void expect_tile(const Matrix& matrix, const Span& span, int lane) {
    const u32 first = first_of(span), last = last_of(span);
    if (lane == 0 && first < last) prefetch(matrix.words + first, (last - first + 3) / 4 * 16);
}

template <int M> __device__ __forceinline__ void sum_row(
    const Params& p, const Matrix& matrix, u32 row, int words, float (&acc)[M], int lane) {
    const u32 x = shared_address(memory) + p.at_x, at = x + lane % (STRIDE / Element<M>::BYTES) * Element<M>::BYTES;
    if ((matrix.kind & 0xff) == BITMAP) {
        if constexpr (CODES & 1) sum_bitmap<M>(acc, row, words, p.columns, x);
        return;
    }
    const int shortest = __reduce_min_sync(~0u, words), longest = __reduce_max_sync(~0u, words);
    switch (matrix.bits) {
#define RUNS_OF(B) case B: if constexpr (CODES >> B & 1) sum_runs<B, M>(acc, row, words, shortest, longest, at); break;
        RUNS_OF(3) RUNS_OF(4) RUNS_OF(5) RUNS_OF(6) RUNS_OF(7) RUNS_OF(8)
#undef RUNS_OF
    }
}

// x of some pairs into shared memory: elements one after the other, or each STRIDE / BYTES times.
template <int M> __device__ __forceinline__ void load_x(const Params& p, const int* pairs, int count, bool packed) {
    const u16* rows[M];
#pragma unroll
    for (int m = 0; m < M; m++) rows[m] = p.x + (u64)(pairs[min(m, count - 1)] / p.choices) * p.columns;
#pragma unroll 4
    for (int c = threadIdx.x; c < p.columns; c += blockDim.x) {
        u32 word[4];
        if constexpr (M == 1) {
            word[0] = word[1] = word[2] = word[3] = __float_as_uint(activation_to_float(rows[0][c]));
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) word[i] = rows[2 * i % M][c] | (u32)rows[(2 * i + 1) % M][c] << 16;
        }
        if (packed) {
            u8* to = memory + p.at_x + c * Element<M>::BYTES;
            if constexpr (M <= 2) *(u32*)to = word[0];
            if constexpr (M == 4) *(uint2*)to = make_uint2(word[0], word[1]);
            if constexpr (M == 8) *(uint4*)to = make_uint4(word[0], word[1], word[2], word[3]);
        } else {
#pragma unroll
            for (int i = 0; i < STRIDE / 16; i++)  // in turns, so that neighbours write to different banks
                *(uint4*)(memory + p.at_x + c * STRIDE + (i + c) % (STRIDE / 16) * 16) =
                    make_uint4(word[0], word[1], word[2], word[3]);
        }
    }
}

// y of tiles first .. last - 1 for the pairs of one pass; their x has to be loaded before, if `load`.
template <int M> __device__ __forceinline__ void multiply_tiles(
    const Params& p, const Matrix& matrix, int part, const int* pairs, int count, int first, int last, bool load) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const u32 buffers = p.at_stage + warp * p.stages * p.stage_bytes;
    u32 buffer = buffers;
    Span now = find_span(p, matrix, first + warp, last, lane), next = find_span(p, matrix, first + warp + warps, last, lane);
    start_tile(matrix, now, buffer, lane);
    if (load) {
        __syncthreads();
        load_x<M>(p, pairs, count, (matrix.kind & 0xff) == BITMAP);
        __syncthreads();
    }
    for (int tile = first + warp; tile < last; tile += warps) {
        const int row = tile * ROWS + lane;
        const u16 stored = row < p.rows ? load_now(matrix.scales + row) : 0;
        const Span after = find_span(p, matrix, tile + 2 * warps, last, lane);
        const u32 here = buffer;
        if (p.stages > 1) {
            buffer = 2 * buffers + p.stage_bytes - buffer;
            start_tile(matrix, next, buffer, lane);
            wait_but<1>();
        } else {
            expect_tile(matrix, next, lane);
            wait_but<0>();
        }
        __syncwarp();
        float acc[M] = {};
        sum_row<M>(p, matrix, shared_address(memory) + here + (now.begin - first_of(now)) * 4, now.end - now.begin, acc, lane);
        if (row < p.rows) {
            float scale = matrix.kind >> 30 & 1 ? bfloat_to_float(stored) : half_to_float(stored);
            if (matrix.kind >> 31) scale = -scale;
#pragma unroll
            for (int m = 0; m < M; m++)
                if (m < count) p.y[((u64)pairs[m] * p.parts + part) * p.rows + row] = float_to_activation(acc[m] * scale);
        }
        __syncwarp();  // the buffer is free again
        if (p.stages == 1) start_tile(matrix, next, buffer, lane);
        now = next, next = after;
    }
    wait_but<0>();
}

// ---- who does what ------------------------------------------------------------------------------------------------------

// What a tile costs with so many tokens, about.
__device__ __forceinline__ int weight_of(int tokens) { return tokens <= 1 ? 4 : tokens <= 2 ? 5 : tokens <= 4 ? 7 : 11; }

struct Plan {
    int* starts;  // where each expert's pairs start in `order`, experts + 1
    int* work;    // what the experts before each one cost, experts + 1, in tiles of all parts
    int* order;   // pairs, those of expert 0 first
};

__device__ __forceinline__ int cost_of(int tokens) { return tokens / MOST * weight_of(MOST) + (tokens % MOST ? weight_of(tokens % MOST) : 0); }

__device__ __forceinline__ Plan make_plan(const Params& p) {
    const int padded = (p.pairs + 3) & ~3;
    int* const of = (int*)memory;
    Plan plan = {of + padded + padded, of + 2 * padded + p.experts + 1, of + padded};
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        const long long expert = i < p.pairs ? p.experts_of[i] : -1;
        of[i] = expert >= 0 && expert < p.experts ? (int)expert : -1;
    }
    for (int e = threadIdx.x; e <= p.experts; e += blockDim.x) plan.work[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < p.pairs; i += blockDim.x)
        if (of[i] >= 0) atomicAdd(plan.work + of[i], 1);  // counts, for now
    __syncthreads();
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        int pairs = 0, cost = 0;
        for (int first = 0; first <= p.experts; first += 32) {
            const int e = first + lane, count = e < p.experts ? plan.work[e] : 0, own = cost_of(count);
            int counts = count, costs = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int a = __shfl_up_sync(~0u, counts, step), b = __shfl_up_sync(~0u, costs, step);
                if (lane >= step) counts += a, costs += b;
            }
            if (e <= p.experts) plan.starts[e] = pairs + counts - count, plan.work[e] = cost + costs - own;
            pairs += __shfl_sync(~0u, counts, 31), cost += __shfl_sync(~0u, costs, 31);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.pairs; i += blockDim.x) {  // the same order in every CTA
        const int expert = of[i];
        if (expert < 0) continue;
        int rank = 0;
        for (int j = 0; j < i; j += 4) {
            const int4 other = *(const int4*)(of + j);
            rank += (other.x == expert) + (j + 1 < i && other.y == expert) + (j + 2 < i && other.z == expert) + (j + 3 < i && other.w == expert);
        }
        plan.order[plan.starts[expert] + rank] = i;
    }
    __syncthreads();
    return plan;
}

extern "C" __global__ void __launch_bounds__(512, 1) sub1_products(const __grid_constant__ Params p) {
    let_the_next_kernel_start();
    wait_for_the_kernel_before();
    const Plan plan = make_plan(p);
    const int tiles = (p.rows + ROWS - 1) / ROWS, warps = blockDim.x >> 5;
    // Shares are whole turns of all warps where there are many: a share that ends in two experts has no more turns then.
    const bool many = (u64)tiles * p.parts * plan.work[p.experts] >= (u64)TURNS * weight_of(1) * warps * gridDim.x;
    const int turn = many ? warps : 1, turns = (tiles + turn - 1) / turn;
    const u64 each = (u64)turns * p.parts, all = each * plan.work[p.experts];
    // Shares are whole turns of one pass where passes have as many tokens as they have on average: most begin and end with
    // an expert then, and the longest is no longer for it.
    const u64 unit = weight_of(min(MOST, (p.pairs + p.experts - 1) / p.experts));
    const u64 share = (all + unit * gridDim.x - 1) / (unit * gridDim.x) * unit;
    const u64 low = share * blockIdx.x, high = min(all, low + share);
    int expert = 0;
    for (int step = 1024; step; step /= 2)
        if (expert + step < p.experts && each * plan.work[expert + step] <= low) expert += step;
    int token = -1;  // whose x is in shared memory, where that is of one token alone
    bool token_packed = false;
    for (; expert < p.experts && each * plan.work[expert] < high; expert++) {
        u64 at = each * plan.work[expert];
        for (int pair = plan.starts[expert]; pair < plan.starts[expert + 1]; pair += MOST) {
            const int count = min(MOST, plan.starts[expert + 1] - pair), weight = weight_of(count);
            const int* const pairs = plan.order + pair;
            bool loaded = false, as_packed = false;
            for (int part = 0; part < p.parts; part++, at += (u64)turns * weight) {
                if (at >= high || at + (u64)turns * weight <= low) continue;
                const int first = low <= at ? 0 : (int)((low - at + weight - 1) / weight) * turn;
                const int last = min(tiles, (int)min((u64)turns, (high - at + weight - 1) / weight) * turn);
                if (first >= last) continue;
                const Matrix matrix = p.matrices[expert * p.parts + part];
                const bool packed = (matrix.kind & 0xff) == BITMAP;
                const int mine = count == 1 ? pairs[0] / p.choices : -1;
                const bool load = (!loaded || packed != as_packed) && (mine < 0 || mine != token || packed != token_packed);
                if (load) token = mine, token_packed = packed;
                loaded = true, as_packed = packed;
                if (count == 1) multiply_tiles<1>(p, matrix, part, pairs, count, first, last, load);
                else if (count == 2) multiply_tiles<2>(p, matrix, part, pairs, count, first, last, load);
                else if (count <= 4) multiply_tiles<4>(p, matrix, part, pairs, count, first, last, load);
                else multiply_tiles<8>(p, matrix, part, pairs, count, first, last, load);
            }
        }
    }
}

#include "sub1_dense.cuh"
