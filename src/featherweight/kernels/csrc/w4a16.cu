// y_TR = x_TC V^T for 4-bit weights and at most 8 * NT tokens, streamed once from device memory.
//
// R rows (outputs), C columns (inputs), T tokens. A *block* is 32 rows x 128 columns: 2048 bytes of codes in the order
// the tensor cores take them, then its scales, then its zeros (`w4a16_layout.py` packs and describes it). A *tile* is
// 32 rows, a *chunk* one or two neighbouring blocks of one: what is fetched at a time. Memory holds the first two blocks
// of every tile, then the next two of every tile: warps that run side by side read one stretch of it.
//
// A cluster of CTAs owns every so many-th tile; its CTAs split the columns, so each needs only its slice of x, and the
// warps of a CTA take a tile each (or split the columns further).
//
// Each warp fills its own ring of blocks in shared memory (bulk copies, evict-first) and nobody else reads it: no
// barrier of the CTA is passed while streaming. Weights depend on no other kernel, so the ring is filled before
// waiting for the one that makes x (programmatic dependent launch).
//
// A code is used as it lies: four bits anded out of a word are the subnormal float16 q * 2^-24, or q * 2^-20 for bits
// 4..7, exact in a tensor core; even rows of a pair use the first, odd rows the second, and the powers of two are
// undone once at the end. The lowest eight bits of bfloat16 count in steps of 2^-133 likewise, and x is multiplied by
// 2^64 to keep products of two far above float32's own subnormals. What zeros take away is the first addend of every
// group's sum (`sum_x`), which the group's scale then multiplies.
//
// Macros: BF16 (0: float16), GROUP (32, 64, 128), SCALE (0 float16, 1 bfloat16, 2 float32), ZEROS (0: all 8).

#include "gpu.cuh"

constexpr int ROWS = 32, COLUMNS = 128, CODES = ROWS * COLUMNS / 2, PARTS = COLUMNS / GROUP;
constexpr int SCALE_BYTES = PARTS * ROWS * (SCALE == 2 ? 4 : 2);
constexpr int BLOCK = CODES + SCALE_BYTES + (ZEROS ? PARTS * ROWS : 0);
constexpr int RING = 3;  // stages of a ring on GPUs without bulk copies, where the count must be known when compiling

struct Params {
    const u8* weights;
    const u16* x;
    u16* y;
    const u16* bias;  // or null
    int tokens, rows, columns;
    int blocks, tiles;   // of the whole matrix: across and down
    int warp_splits;     // in how many the warps of a CTA split its columns
    int stages, chunk;   // of each warp's ring: chunks; blocks in a chunk (1 or 2)
    int owned_log2;      // of the rows of one pass that a CTA sums up and stores
    int x_stride;        // bytes
    int at_barriers, at_x, at_sums, at_partials, partials_bytes;  // in shared memory; partials twice if passes > 1
};

#include "streaming.cuh"

// ---- the product ----------------------------------------------------------------------------------------------------

#if BF16
constexpr float STEP = 1.0f / (1ull << 63) / 64;                             // 2^-69: a code's 2^-133 by x's 2^64
constexpr float X_SCALE = 2.0f * (1ull << 63);
#else
constexpr float STEP = 1.0f / (1 << 24), X_SCALE = 1.0f;
#endif

__device__ __forceinline__ u32 scaled(u32 pair) {
    float low = activation_to_float((u16)pair) * X_SCALE, high = activation_to_float((u16)(pair >> 16)) * X_SCALE;
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);  // exact: bfloat16 is half a float
}

// x[:, slice] into shared memory, for bfloat16 times 2^64. The caller waits for all threads afterwards.
__device__ __forceinline__ void load_x(const Params& p, int first_column, int columns, u8* x, u32 barrier) {
    const int present = min(columns, p.columns - first_column), chunks = columns / 8;
#if BULK
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) expect_bytes(barrier, p.tokens * present * 2);
        __syncwarp();
        if (threadIdx.x < p.tokens && present > 0)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(shared_address(x + threadIdx.x * p.x_stride)), "l"(p.x + (u64)threadIdx.x * p.columns + first_column),
                         "r"(present * 2), "r"(barrier) : "memory");
    }
    wait_barrier(barrier, 0);
#endif
    if (BULK && !BF16 && present == columns) return;
    for (int i = threadIdx.x; i < p.tokens * chunks; i += blockDim.x) {
        int token = i / chunks, column = (i - token * chunks) * 8;
        uint4* at = (uint4*)(x + token * p.x_stride + column * 2);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (column < present) v = BULK ? *at : *(const uint4*)(p.x + (u64)token * p.columns + first_column + column);
        if (BF16) v.x = scaled(v.x), v.y = scaled(v.y), v.z = scaled(v.z), v.w = scaled(v.w);
        *at = v;
    }
}

struct Four {
    float of[2][2];  // half tile; row or row + 8
};

__device__ __forceinline__ Four load_scales(const u8* block, int part, int g) {
    Four s;
    if (SCALE == 2) {
        float4 v = *(const float4*)(block + CODES + (part * 8 + g) * 16);
        s.of[0][0] = v.x, s.of[0][1] = v.y, s.of[1][0] = v.z, s.of[1][1] = v.w;
    } else {
        uint2 v = *(const uint2*)(block + CODES + (part * 8 + g) * 8);
        u32 words[2] = {v.x, v.y};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u16 low = (u16)words[h], high = (u16)(words[h] >> 16);
            s.of[h][0] = SCALE ? bfloat_to_float(low) : half_to_float(low);
            s.of[h][1] = SCALE ? bfloat_to_float(high) : half_to_float(high);
        }
    }
    return s;
}

__device__ __forceinline__ Four load_zeros(const u8* block, int part, int g) {
    u32 v = *(const u32*)(block + CODES + SCALE_BYTES + (part * 8 + g) * 4);
    Four z;
    z.of[0][0] = (float)(v & 255), z.of[0][1] = (float)(v >> 8 & 255);
    z.of[1][0] = (float)(v >> 16 & 255), z.of[1][1] = (float)(v >> 24);
    return z;
}

// What zeros take away: -8 (or -1, for zeros that are stored) times the sum of x over each group, in the steps of even
// and of odd rows' codes, by the tensor cores. Four floats a lane t, token pair and group: as an accumulator holds them.
template <int NT>
__device__ __forceinline__ void sum_x(const u8* const (&x)[NT], u8* sums, int groups, int warp, int lane) {
    const u32 even = ZEROS ? 0x80018001u : 0x80088008u, odd = ZEROS ? 0x80108010u : 0x80808080u, away[4] = {even, odd, even, odd};
    for (int group = warp; group < groups; group += blockDim.x / 32) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float acc[4] = {};
#pragma unroll
            for (int unit = 0; unit < GROUP / 32; unit++) {
                uint4 b = *(const uint4*)(x[n] + (group * (GROUP / 32) + unit) * 64);
                multiply(acc, away, b.x, b.y);
                multiply(acc, away, b.z, b.w);
            }
            if (lane < 4) *(float4*)(sums + (group * NT + n) * 64 + lane * 16) = make_float4(acc[0], acc[1], acc[2], acc[3]);
        }
    }
}

// total += a block's 32 rows x 128 columns times x. `x` is this lane's first 16 bytes of each 8 tokens, `at` the block's
// place in the slice.
template <int NT>
__device__ __forceinline__ void multiply_block(
    float (&total)[2][NT][4], const u8* block, const u8* const (&x)[NT], const u8* sums, int at, int lane) {
    const int g = lane >> 2, t = lane & 3;
    uint4 codes[2];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        float acc[2][NT][4];
        Four zeros;
        if (ZEROS) zeros = load_zeros(block, part, g);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float4 v = *(const float4*)(sums + ((at * PARTS + part) * NT + n) * 64 + t * 16);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                acc[h][n][0] = ZEROS ? v.x * zeros.of[h][0] : v.x;
                acc[h][n][1] = ZEROS ? v.y * zeros.of[h][0] : v.y;
                acc[h][n][2] = ZEROS ? v.z * zeros.of[h][1] : v.z;
                acc[h][n][3] = ZEROS ? v.w * zeros.of[h][1] : v.w;
            }
        }
#pragma unroll
        for (int i = 0; i < GROUP / 32; i++) {
            const int unit = part * (GROUP / 32) + i;  // of 32 columns
            if (unit % 2 == 0) {
                codes[0] = *(const uint4*)(block + unit * 256 + lane * 16);
                codes[1] = *(const uint4*)(block + CODES / 2 + unit * 256 + lane * 16);
            }
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) b[n] = *(const uint4*)(x[n] + at * (COLUMNS * 2) + unit * 64);
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u32 w = unit % 2 ? (j ? codes[h].w : codes[h].z) : (j ? codes[h].y : codes[h].x);
                    u32 a[4] = {w & 0x000f000fu, w & 0x00f000f0u, w >> 8 & 0x000f000fu, w >> 8 & 0x00f000f0u};
#pragma unroll
                    for (int n = 0; n < NT; n++) multiply(acc[h][n], a, j ? b[n].z : b[n].x, j ? b[n].w : b[n].y);
                }
        }
        Four scales = load_scales(block, part, g);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) total[h][n][e] += scales.of[h][e / 2] * acc[h][n][e];
    }
}

template <int NT>
__device__ __forceinline__ void send_partials(const Params& p, const float (&total)[2][NT][4], u32 buffer, u32 barrier, int part, int warp_row, int lane) {
    const int g = lane >> 2, t = lane & 3, owned = 1 << p.owned_log2, stride = owned + 4;  // 4 more: other banks
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = warp_row + 16 * h;
        u32 to = buffer + (part * p.tokens * stride + (row & owned - 1) + g) * 4, there = barrier;
#if BULK
        to = remote_address(to, row >> p.owned_log2);
        there = remote_address(barrier, row >> p.owned_log2);
#endif
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int token = n * 8 + 2 * t + (e & 1);
                float value = total[h][n][e] * (e / 2 ? 1 / STEP / 16 : 1 / STEP);
                if (token < p.tokens) send(to + (token * stride + e / 2 * 8) * 4, value, there);
            }
    }
}

// Sums of all splits for the rows this CTA owns, rounded once. Of the cluster's tiles, which lie `clusters` apart, `here`
// are in this pass, from `tile` on; ours begin at row `at` of theirs.
__device__ __forceinline__ void store_rows(const Params& p, u32 partials, int splits, int tile, int clusters, int here, int at) {
    const int owned = 1 << p.owned_log2, stride = owned + 4;
    for (int i = threadIdx.x; i < p.tokens << p.owned_log2; i += blockDim.x) {
        int token = i >> p.owned_log2, r = i & owned - 1, slot = (at + r) / ROWS;
        int row = (tile + slot * clusters) * ROWS + (at + r) % ROWS;
        float sum = 0;
        for (int s = 0; s < splits; s++) sum += load_shared_float(partials + ((s * p.tokens + token) * stride + r) * 4);
        if (slot < here && row < p.rows) {
            if (p.bias) sum += activation_to_float(p.bias[row]);
            p.y[(u64)token * p.rows + row] = float_to_activation(sum);
        }
    }
}

template <int NT> __device__ __forceinline__ void product(const Params& p) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 base = shared_address(memory);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    const int rank = cluster_rank(), size = cluster_size(), cluster = blockIdx.x / size, clusters = gridDim.x / size;
    const int warps = blockDim.x / 32, row_warps = warps / p.warp_splits, warp_row = warp % row_warps, splits = size * p.warp_splits;
    const int part = rank * p.warp_splits + warp / row_warps;
    const int tiles = (p.tiles - cluster + clusters - 1) / clusters;  // ours: cluster, cluster + clusters, ...
    const int passes = (tiles + row_warps - 1) / row_warps;
    const int owned = 1 << p.owned_log2;
    const int chunks = (p.blocks + p.chunk - 1) / p.chunk, first = chunks * part / splits;
    const int slice = chunks * (rank * p.warp_splits) / splits * p.chunk;  // blocks, first and last, that this CTA needs
    const int slice_end = min(chunks * ((rank + 1) * p.warp_splits) / splits * p.chunk, p.blocks);

    Ring ring;
    ring.slots = memory + warp * p.stages * p.chunk * BLOCK;
    ring.barriers = base + p.at_barriers + warp * p.stages * 8;
    ring.stages = BULK ? p.stages : RING;
    ring.chunk = p.chunk, ring.blocks = p.blocks, ring.tiles = p.tiles, ring.weights = p.weights;
    ring.first = first;
    ring.chunks = chunks * (part + 1) / splits - first;
    ring.tile = warp_row * clusters + cluster;
    ring.tile_step = row_warps * clusters;
    ring.left = max(0, (tiles - warp_row + row_warps - 1) / row_warps) * ring.chunks;
    ring.begin(lane);
    Exchange exchange = {base + p.at_partials, base + p.at_barriers + warps * p.stages * 8, p.partials_bytes};
    exchange.begin();
    __syncthreads();

    let_the_next_kernel_start();
    wait_for_the_kernel_before();
    load_x(p, slice * COLUMNS, (slice_end - slice) * COLUMNS, memory + p.at_x, exchange.barriers + 16);
    __syncthreads();

    const u8* x[NT];
#pragma unroll
    for (int n = 0; n < NT; n++)  // columns of the product beyond the last token repeat it, and are not stored
        x[n] = memory + p.at_x + min(n * 8 + (lane >> 2), p.tokens - 1) * p.x_stride + (lane & 3) * 16;
    u8* sums = memory + p.at_sums;
    sum_x<NT>(x, sums, (slice_end - slice) * PARTS, warp, lane);
    __syncthreads();

    for (int pass = 0; pass <= passes; pass++) {
        float total[2][NT][4] = {};
        const bool mine = pass * row_warps + warp_row < tiles;
        if (mine)
            for (int i = 0; i < ring.chunks; i++) {
                const u8* block = ring.wait();
                int at = (first + i) * p.chunk - slice;
#pragma unroll 1
                for (int k = ring.blocks_of(first + i); k > 0; k--) {
                    multiply_block<NT>(total, block, x, sums, at, lane);
                    block += BLOCK;
                    at++;
                }
                ring.release(lane);
            }
        if (pass < passes) {
            int rows = min(owned, max(0, (tiles - pass * row_warps) * ROWS - rank * owned));
            exchange.may_send(pass, splits * p.tokens * rows * 4);
            if (mine)
                send_partials<NT>(p, total, exchange.buffer(pass), exchange.barrier(pass), part, warp_row * ROWS, lane);
        }
        if (pass > 0) {
            exchange.wait_for(pass - 1);
            const int before = (pass - 1) * row_warps;
            store_rows(p, exchange.buffer(pass - 1), splits, before * clusters + cluster, clusters,
                       min(row_warps, tiles - before), rank * owned);
        }
        if (pass + 1 < passes) exchange.have_read();
    }
}

// Few registers, for two CTAs on a multiprocessor: the next kernel's fetches while this one ends.
extern "C" __global__ void __launch_bounds__(256, 2) w4a16_8(const __grid_constant__ Params p) { product<1>(p); }
extern "C" __global__ void __launch_bounds__(512, 1) w4a16_16(const __grid_constant__ Params p) { product<2>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) w4a16_24(const __grid_constant__ Params p) { product<3>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) w4a16_32(const __grid_constant__ Params p) { product<4>(p); }

// ---- many tokens: the weights as floats, for a dense product -----------------------------------------------------------

// One warp a block. y is rows x columns; each weight is rounded once.
extern "C" __global__ void __launch_bounds__(256) w4a16_dequantize(const __grid_constant__ Params p) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u64 index = (u64)blockIdx.x * (blockDim.x / 32) + (threadIdx.x >> 5);
    if (index >= (u64)p.tiles * p.blocks) return;
    const int k = (int)(index / p.tiles), tile = (int)(index % p.tiles), column0 = k * COLUMNS;
    const u8* block = p.weights + block_index(k, tile, p.blocks, p.tiles) * BLOCK;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int u = 0; u < 2; u++) {
            uint4 v = *(const uint4*)(block + h * (CODES / 2) + u * 512 + lane * 16);
            u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    int unit = 2 * u + i, part = unit * 32 / GROUP, at = (part * 8 + g) * 4 + h * 2 + odd;
                    int row = tile * ROWS + h * 16 + odd * 8 + g, column = column0 + unit * 32 + t * 8;
                    float scale = SCALE == 2   ? ((const float*)(block + CODES))[at]
                                  : SCALE == 1 ? bfloat_to_float(((const u16*)(block + CODES))[at])
                                               : half_to_float(((const u16*)(block + CODES))[at]);
                    float zero = ZEROS ? (float)(block + CODES + SCALE_BYTES)[at] : 8.0f;
                    u32 out[4];
#pragma unroll
                    for (int q = 0; q < 4; q++) {  // two words of four codes a row: columns 0, 2 low and 1, 3 high
                        u32 w = words[i * 2 + q / 2] >> (4 * odd + 8 * (q & 1));
                        u32 low = float_to_activation(((float)(w & 15) - zero) * scale);
                        u32 high = float_to_activation(((float)(w >> 16 & 15) - zero) * scale);
                        out[q] = low | high << 16;
                    }
                    if (row < p.rows && column < p.columns)
                        *(uint4*)(p.y + (u64)row * p.columns + column) = make_uint4(out[0], out[1], out[2], out[3]);
                }
        }
}
