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

// x of up to M tokens as one element of a column: a float for one token, else 16 bits each.
template <int M> struct Element {
    static constexpr int BYTES = M == 1 ? 4 : 2 * M;
};

// ---- adding columns: PTX, so that no lane goes its own way ------------------------------------------------------------

// Predicate n: there is something to add here; s is 1 or -1.
#define REGISTERS ".reg .pred n; .reg .u32 g, f, q; .reg .f32 s, x; .reg .b16 l, h; "
#if BF16
#define PAIR(W, A, B) \
    "shl.b32 g, " W ", 16; mov.b32 x, g; @n fma.rn.f32 " A ", x, s, " A "; " \
    "and.b32 g, " W ", 0xffff0000; mov.b32 x, g; @n fma.rn.f32 " B ", x, s, " B "; "
#else
#define PAIR(W, A, B) \
    "mov.b32 {l, h}, " W "; cvt.f32.f16 x, l; @n fma.rn.f32 " A ", x, s, " A "; " \
    "cvt.f32.f16 x, h; @n fma.rn.f32 " B ", x, s, " B "; "
#endif
// The column at AT into registers, and from there into the sums; LOAD under a predicate.
#define LOAD_1(IF, AT) IF "ld.shared.u32 %2, [" AT "]; "
#define LOAD_2(IF, AT) IF "ld.shared.u32 %3, [" AT "]; "
#define LOAD_4(IF, AT) IF "ld.shared.v2.u32 {%5, %6}, [" AT "]; "
#define LOAD_8(IF, AT) IF "ld.shared.v4.u32 {%9, %10, %11, %12}, [" AT "]; "
#define ADD_1 "mov.b32 x, %2; @n fma.rn.f32 %1, x, s, %1; "
#define ADD_2 PAIR("%3", "%1", "%2")
#define ADD_4 PAIR("%5", "%1", "%2") PAIR("%6", "%3", "%4")
#define ADD_8 PAIR("%9", "%1", "%2") PAIR("%10", "%3", "%4") PAIR("%11", "%5", "%6") PAIR("%12", "%7", "%8")
#define SUMS_1 "+f"(acc[0])
#define SUMS_2 SUMS_1, "+f"(acc[1])
#define SUMS_4 SUMS_2, "+f"(acc[2]), "+f"(acc[3])
#define SUMS_8 SUMS_4, "+f"(acc[4]), "+f"(acc[5]), "+f"(acc[6]), "+f"(acc[7])
#define HELD_1 "+r"(held[0])
#define HELD_2 HELD_1
#define HELD_4 HELD_2, "+r"(held[1])
#define HELD_8 HELD_4, "+r"(held[2]), "+r"(held[3])

// A symbol, the lowest bits of `v`: a gap leads on from `at`, and the column there is added or, by the sign below the
// gap, taken away. A gap of all ones is an escape: G columns that were zero, or 2 G. Eight instructions:
// * the gap is taken with its bits turned over, so that the same instruction says whether this is an escape, where none
//   is left. `at` then moves back by it, and G + 1 columns a symbol ahead, which the offsets of the loads hold;
// * an escape moves `at` by -1 or G - 1 columns, which is one product: y, an odd constant (1 / G modulo 2^32) or that
//   less 1 by the sign, times -G columns. It is written beside the other step, not after it, into a new register: one
//   that a load has its address from cannot be overwritten before that has read it;
// * a multiprocessor multiplies integers beside whatever else it does, and adds them at half the rate of floats.
// What is loaded goes into registers of the caller's, since one that is written under a predicate alone is alive from
// the beginning on. (Written with the opposite predicate, setp.eq, this does not come out of ptxas 13.0.)
#define SYMBOL(LOAD, ADD, V, GAPS, BACK, FAR, ODD, HERE) \
    "{ " REGISTERS "lop3.b32 g, " V ", " GAPS ", " GAPS ", 0x0c; setp.ne.u32 n, g, 0; " \
    "lop3.b32 f, " V ", 1, " ODD ", 0x6a; mad.lo.u32 q, g, " BACK ", %0; @!n mad.lo.u32 q, f, " FAR ", %0; " \
    LOAD("@n ", "q+" HERE) "mad.lo.u32 f, " V ", 0x80000000, 0x3f800000; mov.b32 s, f; mov.u32 %0, q; " ADD "}"

__device__ constexpr u32 inverse(u32 odd) {  // modulo 2^32
    u32 found = odd;
    for (int i = 0; i < 5; i++) found *= 2 - odd * found;
    return found;
}

template <int B, int M, int S> __device__ __forceinline__ void add_symbol(float (&acc)[M], u32 (&held)[(M + 1) / 2], u32& at, u32 v) {
    constexpr int GAPS = (1 << B) - 2, G = GAPS / 2, BACK = -STRIDE / 2, FAR = -G * STRIDE, HERE = (S * (G + 1) + G) * STRIDE;
#define GIVEN "r"(v), "n"(GAPS), "n"(BACK), "n"(FAR), "n"(inverse(G)), "n"(HERE)
    if constexpr (M == 1) asm volatile(SYMBOL(LOAD_1, ADD_1, "%3", "%4", "%5", "%6", "%7", "%8") : "+r"(at), SUMS_1, HELD_1 : GIVEN);
    if constexpr (M == 2) asm volatile(SYMBOL(LOAD_2, ADD_2, "%4", "%5", "%6", "%7", "%8", "%9") : "+r"(at), SUMS_2, HELD_2 : GIVEN);
    if constexpr (M == 4) asm volatile(SYMBOL(LOAD_4, ADD_4, "%7", "%8", "%9", "%10", "%11", "%12") : "+r"(at), SUMS_4, HELD_4 : GIVEN);
    if constexpr (M == 8) asm volatile(SYMBOL(LOAD_8, ADD_8, "%13", "%14", "%15", "%16", "%17", "%18") : "+r"(at), SUMS_8, HELD_8 : GIVEN);
}

// A flag, a bit of `flags`: if it is set, the column at `at` is added or, by the highest bit of `sign`, taken away, and
// that bit of `sign` is used up.
#define FLAG(LOAD, ADD, AT, FLAGS, BIT, ONE) \
    "{ " REGISTERS "and.b32 g, " FLAGS ", " BIT "; setp.ne.u32 n, g, 0; lop3.b32 f, %0, 0x80000000, " ONE ", 0xea; " \
    "mov.b32 s, f; " LOAD("", AT) ADD "@n mad.lo.u32 %0, %0, 2, 0; }"

template <int M> __device__ __forceinline__ void add_flag(float (&acc)[M], u32& sign, u32 at, u32 flags, u32 bit) {
    u32 held[(M + 1) / 2] = {};
#define GIVEN_FLAG "r"(at), "r"(flags), "r"(bit), "r"(0x3f800000)
    if constexpr (M == 1) asm volatile(FLAG(LOAD_1, ADD_1, "%3", "%4", "%5", "%6") : "+r"(sign), SUMS_1, HELD_1 : GIVEN_FLAG);
    if constexpr (M == 2) asm volatile(FLAG(LOAD_2, ADD_2, "%4", "%5", "%6", "%7") : "+r"(sign), SUMS_2, HELD_2 : GIVEN_FLAG);
    if constexpr (M == 4) asm volatile(FLAG(LOAD_4, ADD_4, "%7", "%8", "%9", "%10") : "+r"(sign), SUMS_4, HELD_4 : GIVEN_FLAG);
    if constexpr (M == 8) asm volatile(FLAG(LOAD_8, ADD_8, "%13", "%14", "%15", "%16") : "+r"(sign), SUMS_8, HELD_8 : GIVEN_FLAG);
}

// ---- one row ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 word_at(u32 row, int i, int words, u32 behind) { return i < words ? load_shared(row + 4 * i) : behind; }

__device__ __forceinline__ u32 word_or_ones(u32 at, int is_there) {
    u32 v;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.u32 %0, 0xffffffff; @p ld.shared.u32 %0, [%1]; }"
                 : "=&r"(v) : "r"(at), "r"(is_there));
    return v;
}

// Symbol S of B words.
template <int B, int M, int S> __device__ __forceinline__ void add_place(float (&acc)[M], u32 (&held)[(M + 1) / 2], u32& at, const u32 (&w)[B]) {
    constexpr int word = S * B / 32, bit = S * B % 32, next = word + 1 < B ? word + 1 : word;
    add_symbol<B, M, S>(acc, held, at, bit + B > 32 ? __funnelshift_r(w[word], w[next], bit) : w[word] >> bit);
}

// Runs: 32 symbols are B words. Behind a row's last word there are ones, which are escapes.
template <int B, int M> __device__ __forceinline__ void sum_runs(float (&acc)[M], u32 row, int words, int longest, u32 at) {
    constexpr int AHEAD = M <= 2 ? 8 : 4;  // columns on their way
    u32 held[AHEAD][(M + 1) / 2] = {};
    for (int first = 0; first < longest; first += B) {
        u32 w[B];
#pragma unroll
        for (int i = 0; i < B; i++) w[i] = word_or_ones(row + 4 * i, first + i < words);
        row += 4 * B;
#define PLACE(S) add_place<B, M, S>(acc, held[(S) % AHEAD], at, w);
#define PLACES(S) PLACE(S) PLACE(S + 1) PLACE(S + 2) PLACE(S + 3) PLACE(S + 4) PLACE(S + 5) PLACE(S + 6) PLACE(S + 7)
        PLACES(0) PLACES(8) PLACES(16) PLACES(24)
        at += 32 * STRIDE << (B - 1);
    }
}

// Bitmaps: a flag a column, then a bit for each flag that is set. All lanes look at the same column.
template <int M> __device__ __forceinline__ void sum_bitmap(float (&acc)[M], u32 row, int words, int columns, u32 x) {
    const int flags = (columns + 31) / 32;
    int bits = flags * 32;
    for (int i = 0; i < flags; i++) {
        const u32 set = word_at(row, i, words, 0);
        u32 sign = __brev(__funnelshift_r(word_at(row, bits / 32, words, 0), word_at(row, bits / 32 + 1, words, 0), bits & 31));
        bits += __popc(set);
#pragma unroll
        for (int j = 0; j < 32; j++) add_flag<M>(acc, sign, x + j * Element<M>::BYTES, set, 1u << j);
        x += 32 * Element<M>::BYTES;
    }
}

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
    const int longest = __reduce_max_sync(~0u, words);
    switch (matrix.bits) {
#define RUNS_OF(B) case B: if constexpr (CODES >> B & 1) sum_runs<B, M>(acc, row, words, longest, at); break;
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
    const u64 low = all * blockIdx.x / gridDim.x, high = all * (blockIdx.x + 1) / gridDim.x;
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

// ---- many tokens: rows as floats, for a dense product --------------------------------------------------------------------

struct Dense {
    const Matrix* matrices;
    const u8* zeros;         // of each row and group of each matrix, or none: symmetric grids
    u16* y;                  // matrices x rows x columns
    int count, rows, columns, groups;
    int first_row, last_row;  // of every matrix, a multiple of 32 the first; y has these rows alone
};

constexpr int PITCH = ROWS + 1;  // words of two-bit codes, 16 columns of each of a tile's rows, and one more for other banks

// What decoding knows of a matrix: bits of `kind`, see Matrix; bits 8 to 15 are the codes of the four levels.
__device__ __forceinline__ u32 code_of(const Matrix& matrix, u32 level) { return matrix.kind >> (8 + 2 * level) & 3; }

__device__ __forceinline__ void put_code(u32* codes, int column, u32 code, int lane) {
    codes[(column >> 4) * PITCH + lane] |= code << 2 * (column & 15);
}

__device__ __forceinline__ void decode_runs(const Matrix& matrix, const u32* words, int count, int columns, u32* codes, int lane) {
    const int b = matrix.bits, v = matrix.kind >> 16 & 3, gaps = ((1 << b) - 1) / v;
    const u32 mask = (1u << b) - 1;
    u32 low = count > 0 ? words[0] : ~0u, high = count > 1 ? words[1] : ~0u;
    int next = 2, bit = 0, left = count * 32;
    for (int column = 0; left >= b && column < columns; left -= b) {
        const int s = __funnelshift_r(low, high, bit) & mask;
        bit += b;
        if (bit >= 32) bit -= 32, low = high, high = next < count ? words[next] : ~0u, next++;
        const int gap = v == 1 ? s : v == 2 ? s >> 1 : s * 171 >> 9;
        if (s >= v * gaps) {
            column += (s - v * gaps + 1) * gaps;
        } else {
            column += gap;
            if (column < columns) put_code(codes, column, code_of(matrix, s - gap * v + 1), lane);
            column++;
        }
    }
}

__device__ __forceinline__ void decode_bitmap(const Matrix& matrix, const u32* words, int count, int columns, u32* codes, int lane) {
    const int flags = (columns + 31) / 32;
    int bits = flags * 32;
    for (int i = 0; i < flags && i < count; i++)
        for (u32 left = words[i]; left; left &= left - 1, bits++) {
            const int column = i * 32 + __ffs(left) - 1;
            const u32 sign = bits < count * 32 ? words[bits >> 5] >> (bits & 31) & 1 : 0;
            if (column < columns) put_code(codes, column, code_of(matrix, 1 + sign), lane);
        }
}

__device__ __forceinline__ void decode_plain(const Matrix& matrix, const u32* words, int count, int columns, u32* codes, int lane) {
    const int b = matrix.bits;
    for (int c = 0; c < columns && c * b < count * 32; c++)
        put_code(codes, c, code_of(matrix, words[c * b >> 5] >> (c * b & 31) & ((1 << b) - 1)), lane);
}

// A warp's tile of codes from shared memory to floats: 16 columns a lane.
__device__ __forceinline__ void store_dense(const Dense& p, const Matrix& matrix, int at, int first, const u32* codes, int lane) {
    const int width = p.columns / p.groups;
    for (int r = 0; r < min(ROWS, p.last_row - first); r++) {
        const u64 row = (u64)at * p.rows + first + r;  // of all matrices, among scales' and zeros' rows
        u16* to = p.y + ((u64)at * (p.last_row - p.first_row) + first + r - p.first_row) * p.columns;
        for (int c = lane * 16; c < p.columns; c += 512) {
            const u32 word = codes[(c >> 4) * PITCH + r];
            const int group = c / width;
            const u16 stored = matrix.scales[(u64)(first + r) * p.groups + group];
            const float scale = matrix.kind >> 30 & 1 ? bfloat_to_float(stored) : half_to_float(stored);
            const int zero = p.zeros ? p.zeros[row * p.groups + group] : 2;
            u32 out[8];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int steps = (int)((word >> 2 * i) + zero & 3) - zero;
                const u32 value = float_to_activation((float)steps * scale);
                out[i / 2] = i % 2 ? out[i / 2] | value << 16 : value;
            }
            *(uint4*)(to + c) = make_uint4(out[0], out[1], out[2], out[3]);
            *(uint4*)(to + c + 8) = make_uint4(out[4], out[5], out[6], out[7]);
        }
    }
}

// A tile a warp. Columns are a multiple of 16, and so is a group.
extern "C" __global__ void __launch_bounds__(128) sub1_dense(const __grid_constant__ Dense p) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, words = p.columns / 16;
    const int tiles = (p.last_row - p.first_row + ROWS - 1) / ROWS;
    const u64 index = (u64)blockIdx.x * (blockDim.x >> 5) + warp;
    if (index >= (u64)tiles * p.count) return;
    const int at = (int)(index / tiles), first = p.first_row + (int)(index % tiles) * ROWS;
    u32* codes = (u32*)memory + warp * words * PITCH;
    for (int i = 0; i < words; i++) codes[i * PITCH + lane] = 0;
    const Matrix matrix = p.matrices[at];
    if (first + lane < p.last_row) {
        const u32 begin = matrix.starts[first + lane], count = matrix.starts[first + lane + 1] - begin;
        const u32* own = matrix.words + begin;
        const int kind = matrix.kind & 0xff;
        if (kind == PLAIN) decode_plain(matrix, own, count, p.columns, codes, lane);
        else if (kind == BITMAP) decode_bitmap(matrix, own, count, p.columns, codes, lane);
        else decode_runs(matrix, own, count, p.columns, codes, lane);
    }
    __syncwarp();
    store_dense(p, matrix, at, first, codes, lane);
}
