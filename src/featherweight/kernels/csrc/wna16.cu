// y_TR = x_TC V^T for weights of 2, 3, 4 or 8 bits and at most 8 * NT tokens, streamed once from device memory.
//
// R rows (outputs), C columns (inputs), T tokens. A *block* is 32 rows x 128 columns: codes in the order the tensor cores
// take them, then their scales, then their zeros (`wna16_layout.py` packs and describes it, blocks.cuh reads it). A *tile*
// is 32 rows, a *chunk* up to CHUNK neighbouring blocks of one: what is fetched at a time. Memory holds the first chunk of
// every tile, then the next of every tile: warps that run side by side read one stretch of it.
//
// A cluster of CTAs owns every so many-th tile; its CTAs split the columns, so each needs only its slice of x, and the warps
// of a CTA take a tile each (or split the columns further).
//
// Each warp fills its own ring of chunks in shared memory (bulk copies, evict-first) and nobody else reads it: no barrier
// of the CTA is passed while streaming. Weights depend on no other kernel, so the ring is filled before waiting for the
// one that makes x (programmatic dependent launch).
//
// Codes are multiplied as subnormals (blocks.cuh), exact in a tensor core; their powers of two are undone once at the end.
// With bfloat16 x is multiplied by 2^64, to keep products of two far above float32's own subnormals. What zeros take away
// is the first addend of every group's sum (`sum_x`), which the group's scale then multiplies.
//
// Of 2:4 sparse weights (SPARSE, kept.cuh) half is stored, and the tensor cores pick the x that belong to it; what zeros take
// away is then another sum of x for every row, so codes become numbers, code minus zero, before they are multiplied.
//
// Macros: BF16 (0: float16), and those of blocks.cuh.

#include "gpu.cuh"
#include "blocks.cuh"

constexpr int RING = 3;  // stages of a ring on GPUs without bulk copies, where the count must be known when compiling

struct Params {
    const u8* weights;
    const u16* x;
    u16* y;
    const u16* bias;  // or null
    int tokens, rows, columns;
    int blocks, tiles;           // of the whole matrix: across and down
    int chunks;                  // across
    int tiles_each, tiles_more;  // tiles of a cluster, and how many clusters have one more
    int row_warps, warp_splits;  // warps of a CTA: that take a tile each; in how many they split its columns
    int stages, chunk;           // of each warp's ring: chunks; blocks in one of its chunks (a divisor of CHUNK)
    int own;                     // whether sums for its own CTA stay in a warp's ring, as they can where there is one pass
    int owned;                   // half tiles of a pass that a CTA sums up and stores (the last may have fewer)
    int x_stride, part_bytes;    // of a token of x; of one split's sums
    int at_barriers, at_x, at_sums, at_partials;  // in shared memory
    u32 by_row_warps, by_splits, by_owned;  // inverses, for `quotient`
    int hold;                    // the next launch may begin when a warp has so many chunks left to multiply; -1: at once
};

#include "streaming.cuh"
#include "activations.cuh"
#if SPARSE
#include "numbers.cuh"
#include "kept.cuh"
#endif
#include "sums.cuh"

// ---- the product ----------------------------------------------------------------------------------------------------

#if !SPARSE
// Sums of a group begin with what zeros take away.
template <int NT>
__device__ __forceinline__ void begin_group(float (&acc)[2][NT][4], Codes&, const u8* block, const u8* sums, int part, int lane) {
    Four zeros;
    if (ZEROS) zeros = load_zeros(block, part, lane >> 2);
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const u8* at = sums + n * 64 + (lane & 3) * 16;
        if (ZEROS) {
            float2 v = *(const float2*)at;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                acc[h][n][0] = v.x * zeros.of[h][0], acc[h][n][1] = v.y * zeros.of[h][0];
                acc[h][n][2] = v.x * zeros.of[h][1], acc[h][n][3] = v.y * zeros.of[h][1];
            }
        } else {
            float4 v = *(const float4*)at;
#pragma unroll
            for (int h = 0; h < 2; h++) acc[h][n][0] = v.x, acc[h][n][1] = v.y, acc[h][n][2] = v.z, acc[h][n][3] = v.w;
        }
    }
}

template <int NT>
__device__ __forceinline__ void multiply_unit(float (&acc)[2][NT][4], const Codes& codes, const uint4 (&b)[NT], int unit) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 a[4];
            codes.take(a, h, unit, j);
#pragma unroll
            for (int n = 0; n < NT; n++) multiply(acc[h][n], a, j ? b[n].z : b[n].x, j ? b[n].w : b[n].y);
        }
}
#endif

// total += a block's 32 rows x 128 columns times x. `x` is where this lane's row of each 8 tokens begins (`load_unit`), `at`
// the block's place in the slice.
template <int NT>
__device__ __forceinline__ void multiply_block(
    float (&total)[2][NT][4], const u8* block, const u32 (&x)[NT], const u8* sums, int at, int lane) {
    Codes codes;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        float acc[2][NT][4];
        begin_group<NT>(acc, codes, block, sums + (at * PARTS + part) * NT * 64, part, lane);
#pragma unroll
        for (int i = 0; i < GROUP / 32; i++) {
            const int unit = part * (GROUP / 32) + i;  // of 32 columns
            if (unit % UNITS == 0) codes.load(block, unit, lane);
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) b[n] = load_unit(x[n] + at * (COLUMNS * 2) + unit * 64);
            multiply_unit<NT>(acc, codes, b, unit);
        }
        Four scales = load_scales(block, part, lane >> 2);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) total[h][n][e] += scales.of[h][e / 2] * acc[h][n][e];
    }
}

// A tile's sums begin with the bias of its rows, from `row` on, in one of its parts, and with nothing in the others. Set
// before the products, not after the sums were sent: else the compiler moves them about in between. Added here, the bias
// leaves the stores, which everything waits for, without a branch.
template <int NT>
__device__ __forceinline__ void begin_tile(const Params& p, float (&total)[2][NT][4], bool with_bias, int row, int lane) {
#pragma unroll
    for (int i = 0; i < 8 * NT; i++) total[i / 4 / NT][i / 4 % NT][i % 4] = 0;
    if (!p.bias || !with_bias) return;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int at = row + e * 8 + (lane >> 2);
        if (at >= p.rows) continue;
        const float bias = activation_to_float(p.bias[at]) * (e % 2 ? STEP * ODD : STEP);
#pragma unroll
        for (int n = 0; n < NT; n++) total[e / 2][n][e % 2 * 2] = total[e / 2][n][e % 2 * 2 + 1] = bias;
    }
}

template <int NT> __device__ __forceinline__ void product(const Params& p) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 base = shared_address(memory);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), warps = p.row_warps * p.warp_splits;
    const int rank = cluster_rank(), cluster = cluster_index(), clusters = cluster_count(), splits = cluster_size() * p.warp_splits;
    const int warp_split = quotient(warp, p.by_row_warps), warp_row = warp - warp_split * p.row_warps;
    const int part = rank * p.warp_splits + warp_split;
    const int tiles = p.tiles_each + (cluster < p.tiles_more);  // ours: cluster, cluster + clusters, ...
    const int passes = quotient(tiles + p.row_warps - 1, p.by_row_warps);
    auto chunk_of_part = [&](int i) { return quotient(p.chunks * i, p.by_splits); };

    Ring ring;
    ring.slots = memory + warp * p.stages * p.chunk * BLOCK;
    ring.barriers = base + p.at_barriers + warp * p.stages * 8;
    ring.stages = BULK ? p.stages : RING;
    ring.chunk = p.chunk, ring.blocks = p.blocks, ring.tiles = p.tiles, ring.weights = p.weights;
    ring.first = chunk_of_part(part);
    ring.chunks = chunk_of_part(part + 1) - ring.first;
    ring.tile = warp_row * clusters + cluster;
    ring.tile_step = p.row_warps * clusters;
    ring.left = quotient(max(0, tiles - warp_row + p.row_warps - 1), p.by_row_warps) * ring.chunks;
    int to_come = ring.left;
    ring.begin(lane);
    Exchange exchange = {base + p.at_partials, base + p.at_barriers + warps * p.stages * 8};
    exchange.begin();
    __syncthreads();

    const int slice = chunk_of_part(rank * p.warp_splits) * p.chunk;  // blocks, first and last, that this CTA needs
    const int slice_end = min(chunk_of_part((rank + 1) * p.warp_splits) * p.chunk, p.blocks);
    // Where the next launch's CTAs fit beside ours, their fetches delay what is still to come of our own.
    if (p.hold < 0 || to_come <= p.hold) let_the_next_kernel_start();
    auto may_send = [&](int pass) {
        int halves = min(p.owned, max(0, min(p.row_warps, tiles - pass * p.row_warps) * 2 - rank * p.owned));
        exchange.may_send(p.warp_splits * (int)cluster_size() * halves * ((p.tokens + 1) / 2) * 128);
    };
    // What need not wait for x is done before: at few tokens each step behind it is a per cent of the launch.
    may_send(0);
    const Slice x_slice = {memory + p.at_x, exchange.barrier + 8, slice * COLUMNS, (slice_end - slice) * COLUMNS};
    x_slice.expect(p);
    wait_for_the_kernel_before();
    x_slice.load(p);

    u32 x[NT];
#pragma unroll
    for (int n = 0; n < NT; n++)  // columns of the product beyond the last token repeat it, and are not stored
        x[n] = base + p.at_x + min(n * 8 + (lane & 7), p.tokens - 1) * p.x_stride + (lane >> 3) * 16;
    u8* sums = memory + p.at_sums;
#if !SPARSE
    sum_x<NT>(x, sums, (slice_end - slice) * PARTS, warp, lane);
    __syncthreads();
#endif

    // A pass has two steps: the rows of the pass before are stored between them, when their sums have long come.
    float total[2][NT][4];
    for (int step = 0; step <= 2 * passes; step++) {
        const int pass = step / 2, middle = ring.chunks / 2;
        const bool mine = pass * p.row_warps + warp_row < tiles;
        if (step % 2 == 0)
            begin_tile<NT>(p, total, part == 0 && mine, ((pass * p.row_warps + warp_row) * clusters + cluster) * ROWS, lane);
        if (mine)
            for (int i = step % 2 ? middle : 0; i < (step % 2 ? ring.chunks : middle); i++) {
                const u8* block = ring.wait();
                int at = (ring.first + i) * p.chunk - slice;
#pragma unroll 1
                for (int k = ring.blocks_of(ring.first + i); k > 0; k--) {
                    multiply_block<NT>(total, block, x, sums, at, lane);
                    block += BLOCK;
                    at++;
                }
                ring.release(lane);
                if (--to_come == p.hold) let_the_next_kernel_start();
            }
        if (step % 2) {
            if (pass > 0) may_send(pass);
            if (mine) send_partials<NT>(p, total, exchange, shared_address(ring.slots), part, rank, warp_row, lane);
        } else if (pass > 0) {
            const int before = (pass - 1) * p.row_warps;
            exchange.wait_for(pass - 1);
            store_rows<NT>(p, exchange.buffer, base, splits, before * clusters + cluster, clusters, min(p.row_warps, tiles - before) * 2,
                           rank * p.owned, warp, lane);
            if (pass < passes) exchange.have_read();
        }
    }
}

// At most 128 registers up to 16 tokens: 16 warps of a CTA, or two CTAs of 8, where one fetches while the other ends.
extern "C" __global__ void __launch_bounds__(512, 1) wna16_8(const __grid_constant__ Params p) { product<1>(p); }
extern "C" __global__ void __launch_bounds__(512, 1) wna16_16(const __grid_constant__ Params p) { product<2>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) wna16_24(const __grid_constant__ Params p) { product<3>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) wna16_32(const __grid_constant__ Params p) { product<4>(p); }

// ---- many tokens: the weights as floats, for a dense product -----------------------------------------------------------

#if !SPARSE
// Of four lanes, word i of lane t and word t of lane i change places: pairs of eights become whole eights.
__device__ __forceinline__ void turn_pairs(u32 (&w)[4], int lane) {
#pragma unroll
    for (int apart = 2; apart; apart /= 2) {
        const bool upper = lane & apart;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & apart) continue;
            const u32 got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + apart], apart);
            (upper ? w[i] : w[i + apart]) = got;
        }
    }
}

// A unit of 32 columns, which begins at `column`, of a block's rows.
__device__ __forceinline__ void store_weights(const Params& p, const Codes& codes, const u8* block, int unit, int row, int column, int lane) {
    const int g = lane >> 2, part = unit * 32 / GROUP;
    Four scales = load_scales(block, part, g), zeros;
    if (ZEROS) zeros = load_zeros(block, part, g);
    column += (lane & 3) * 8;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 out[2][4];  // rows g, g + 8; a pair of each eight columns
#pragma unroll
        for (int j = 0; j < 2; j++) {
            u32 a[4];
            codes.take(a, h, unit, j);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float steps = r % 2 ? ODD : 1, unscaled = 1 / steps;
                float zero = ZEROS ? zeros.of[h][r % 2] * (1 << 24) : MIDDLE * steps, scale = scales.of[h][r % 2];
                u32 low = float_to_activation(((float)(a[r] & 0xffff) - zero) * unscaled * scale);
                u32 high = float_to_activation(((float)(a[r] >> 16) - zero) * unscaled * scale);
                out[r % 2][j * 2 + r / 2] = low | high << 16;
            }
        }
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int at = row + h * 16 + odd * 8 + g;
            turn_pairs(out[odd], lane);
            if (at < p.rows && column < p.columns)
                *(uint4*)(p.y + (u64)at * p.columns + column) = make_uint4(out[odd][0], out[odd][1], out[odd][2], out[odd][3]);
        }
    }
}
#endif

// One warp a block. y is rows x columns; each weight is rounded once.
extern "C" __global__ void __launch_bounds__(256) wna16_dequantize(const __grid_constant__ Params p) {
    const int lane = threadIdx.x & 31;
    const u64 index = (u64)blockIdx.x * (blockDim.x / 32) + (threadIdx.x >> 5);
    if (index >= (u64)p.tiles * p.blocks) return;
    const int k = (int)(index / p.tiles), tile = (int)(index % p.tiles);
    const u8* block = p.weights + block_index(k, tile, p.blocks, p.tiles) * BLOCK;
    Codes codes;
#pragma unroll
    for (int unit = 0; unit < COLUMNS / 32; unit++) {
        if (unit % UNITS == 0) codes.load(block, unit, lane);
        store_weights(p, codes, block, unit, tile * ROWS, k * COLUMNS + unit * 32, lane);
    }
}
