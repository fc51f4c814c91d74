// y_TR = x_TC V^T for 4-bit weights and many tokens, by Hopper's warpgroup products.
//
// R rows (outputs), C columns (inputs), T tokens. The product is turned over: weights are the 64-row operand, which the
// tensor cores take from registers, and tokens the N columns, which they take from shared memory. Weights lie as
// wna16_layout.py packs those of four bits for wna16.cu: blocks of 32 rows x 128 columns. A *tile* of y is 64 rows for each warpgroup x
// TOKENS; a *stage* the 128 columns of x and of weights that it needs next.
//
// One warp copies stages into shared memory; WARPGROUPS of four warps make floats of codes in registers and multiply them.
//
// Tiles that fill the GPU evenly are computed whole, the rest by several CTAs together in one of three ways. Either each takes an
// equal stretch of their columns, and who shared in a tile then sums up its share of the parts, through device memory that the L2
// holds. Or each tile has an owner, which computes most of its columns and adds to its sums what the CTAs that are left over, its
// helpers, have made of the others. Or MEET CTAs, a cluster, share each tile, and send each other their sums: no device memory, and
// no cluster waits for another.
//
// SUMS 0: weights are rounded to float16 with their scale. SUMS 1: code minus zero, exact in either dtype, is multiplied,
// and each group's sum scaled: twice the registers.
//
// SPARSE 1: of four neighbouring columns two are stored, as in kept.cuh, and one product takes 32 columns.
//
// Macros: BF16, GROUP, SCALE, ZEROS, SPARSE as wna16.cu; SUMS; TOKENS of a tile (64, 128, 256), WARPGROUPS, CTAS of a multiprocessor
// (1, or 2 for two warpgroups and 64 tokens: the second is the next launch's, which fetches weights while this one ends); MEET, how many
// CTAs share each tile (1: as above).

#include "gpu.cuh"
#include "hopper.cuh"

constexpr int ROWS = 32, COLUMNS = 128, PARTS = COLUMNS / GROUP;
constexpr int CODES = ROWS * COLUMNS / (SPARSE ? 4 : 2), PLACES = SPARSE ? ROWS * COLUMNS / 8 : 0;
constexpr int SCALE_BYTES = PARTS * ROWS * (SCALE == 2 ? 4 : 2);
constexpr int BLOCK = CODES + SCALE_BYTES + (ZEROS ? PARTS * ROWS : 0) + PLACES;
constexpr int WARPS = 4 * WARPGROUPS, CONSUMERS = 32 * WARPS, STAGING = 1024;
constexpr int TILES = 2 * WARPGROUPS, X_BYTES = TOKENS * COLUMNS * 2;        // 32-row tiles of weights; bytes of a stage
constexpr int SIXTEENS = TOKENS / 16, QUADS = TOKENS / 8;                     // of a tile
constexpr int BUFFERS = WARPGROUPS == 4 && (SUMS || TOKENS > 64) ? 1 : 2;     // sets of registers for weights
constexpr bool OWNERS = MEET == 1 && !SPARSE && !SUMS && TOKENS * WARPGROUPS != 128 * 4;  // else too few registers to add to sums
constexpr bool RAISED = !BF16 && !SUMS && !ZEROS && SCALE == 0;   // hopper_codes.cuh
constexpr int STEP = SPARSE ? 32 : 16, STEPS = 64 / STEP;                     // columns of a product; products of a unit

struct Params {
    TensorMap x;
    const u8* weights;
    u16* y;
    const u16* bias;     // or null
    float4* partials;    // two tiles a CTA, or a tile that has an owner
    u32* counters;       // 16 a shared tile, of which each warp has one; zero between launches
    int tokens, rows;
    int blocks, tiles;   // of the weights: across and down
    int row_tiles, token_tiles, band;  // of y; tiles are numbered through bands of so many token tiles, rows by rows
    int whole;           // whole tiles of each CTA
    int shared, sharers; // tiles after those, and CTAs that share them
    int helped;          // blocks of a shared tile that helpers compute, or 0: no tile has an owner
    int stages, at_weights, at_staging, at_meeting, at_barriers;  // of shared memory
};

#include "hopper_tiles.cuh"
#include "numbers.cuh"
#include "hopper_codes.cuh"

// Where block k of tile t lies (wna16_layout.py): pairs of blocks of all tiles lie side by side.
__device__ __forceinline__ const u8* block_at(const Params& p, int k, int t) {
    const int pair = k & ~1, width = min(2, p.blocks - pair);
    return p.weights + (u64)(u32)(p.tiles * pair + t * width + (k - pair)) * BLOCK;
}

// ---- the product --------------------------------------------------------------------------------------------------------------

// Where we are in the ring of stages.
struct Ring {
    int slot, stages;
    u32 phase;
    __device__ __forceinline__ void step() {
        if (++slot == stages) slot = 0, phase ^= 1;
    }
};

__device__ __forceinline__ void fetch_x(const Params& p, u32 to, u32 barrier, int token, int k) {
    copy_box(to, &p.x, k * COLUMNS, token, barrier);
    copy_box(to + X_BYTES / 2, &p.x, k * COLUMNS + COLUMNS / 2, token, barrier);
}

// Weights are nobody's output: the ring takes its first before the kernel in front has ended, x after.
__device__ __forceinline__ void fetch_late_x(const Params& p, u32 base, u32 full, int waiting) {
    Pieces pieces(p);
    Piece piece;
    wait_for_the_kernel_before();
    for (int slot = 0; slot < waiting && pieces.next(p, piece);) {
        int token_tile;
        row_tile_of(p, piece.tile, token_tile);
#pragma unroll 1
        for (int k = piece.first; k < piece.end && slot < waiting; k++, slot++)
            if (one_lane()) fetch_x(p, base + slot * X_BYTES, full + 8 * slot, token_tile * TOKENS, k);
    }
}

__device__ __forceinline__ void produce(const Params& p, u8* memory) {
    const u32 base = shared_address(memory), full = base + p.at_barriers, empty = full + 8 * p.stages;
    const u64 policy = evict_first();
    Pieces pieces(p);
    Piece piece;
    Ring ring = {0, p.stages, 1};
    int waiting = 0;  // stages without x; -1 once it flows
    while (pieces.next(p, piece)) {
        int token_tile, tile0 = row_tile_of(p, piece.tile, token_tile) * TILES;
        const int present = min(TILES, p.tiles - tile0);
#pragma unroll 1
        for (int k = piece.first; k < piece.end; k++) {
            if (waiting == p.stages) {
                fetch_late_x(p, base, full, waiting);
                waiting = -1;
            }
            const u32 barrier = full + 8 * ring.slot;
            wait_barrier(empty + 8 * ring.slot, ring.phase);
            if (one_lane()) {
                expect_bytes(barrier, X_BYTES + present * BLOCK);
                if (waiting < 0) fetch_x(p, base + ring.slot * X_BYTES, barrier, token_tile * TOKENS, k);
                const u32 to = base + p.at_weights + ring.slot * TILES * BLOCK;
                const u8* from = block_at(p, k, tile0);
                const u64 apart = block_at(p, k, tile0 + 1) - from;
#pragma unroll 1
                for (int i = 0; i < present; i++) copy_bytes(to + i * BLOCK, from + i * apart, BLOCK, barrier, policy);
            }
            if (waiting >= 0) waiting++;
            ring.step();
        }
    }
    if (waiting > 0) fetch_late_x(p, base, full, waiting);
}

// Of a unit, from where the lane that has them keeps them (wna16_layout.py).
__device__ __forceinline__ void load_places(u32 (&places)[STEPS], const u8* block, int unit, int half, int lane) {
    uint2 v = *(const uint2*)(block + BLOCK - PLACES + (lane & ~3 | half * 2 | lane & 1) * 16 + unit * 8);
    places[0] = v.x, places[1] = v.y;
}

// The compiler takes a sparse product to have read its places when it has been issued, and the tensor cores read them when they
// come to it: they must stay in their registers until it has ended. A store that never happens needs them then.
// (tests/test_kernels_sparse24.py looks whether they do.)
__device__ __forceinline__ void have_ended(const Params& p, const u32 (&places)[STEPS], u32 base) {
#if SPARSE
    asm volatile("{\n.reg .pred never;\nsetp.lt.s32 never, %2, 0;\n@never st.shared.v2.b32 [%3], {%0, %1};\n}"
                 ::"r"(places[0]), "r"(places[1]), "r"(p.stages), "r"(base) : "memory");
#endif
}

// A unit is 64 columns of a warpgroup's weights: made floats in registers, of which there may be a second set while the
// tensor cores still multiply the unit before.
__device__ __forceinline__ void consume(const Params& p, u8* memory) {
    const u32 base = shared_address(memory), full = base + p.at_barriers, empty = full + 8 * p.stages;
    const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), g = lane >> 2, half = warp & 1;
    u8* staging = memory + p.at_staging + warp * STAGING;
    float sum[TOKENS / 2], total[SUMS ? TOKENS / 2 : 1], scale[2];
    u32 a[BUFFERS][STEPS][4], places[BUFFERS][STEPS] = {};
    Ring ring = {0, p.stages, 0};
    int shared_tile0 = -1, shared_tile1 = -1;
    Pieces pieces(p);
    Piece piece;
    wait_for_the_kernel_before();
    if (MEET > 1) wait_for_the_cluster();  // whose barriers are there now
    while (pieces.next(p, piece)) {
        if (SUMS) {
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) total[i] = 0;
        }
        if (MEET > 1) {  // where we may have no columns
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) sum[i] = 0;
        }
        float raises[2];
        if (RAISED) {
            int token_tile;
            const int row = row_tile_of(p, piece.tile, token_tile) * WARPGROUPS * 64 + warp * 16 + g;
            load_raises(raises, p.weights + (u64)(u32)(p.tiles * p.blocks) * BLOCK, row, p.tiles * ROWS);
        }
        auto fold = [&]() {  // the group that has been summed up
            settle(sum);
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) total[i] += scale[i >> 1 & 1] * sum[i];
        };
        auto release = [&](int slot) {
            __syncwarp();  // the whole warp has read its weights (racecheck sees it only where all lanes arrive)
            if (lane == 0) arrive(empty + 8 * slot);
        };
        u32 more = 0;     // whether sums have been begun
        int before = -1;  // slot of the stage before, which the tensor cores may still read
        for (int k = piece.first; k < piece.end; k++) {
            wait_barrier(full + 8 * ring.slot, ring.phase);
            const u8* block = memory + p.at_weights + (ring.slot * TILES + warp / 2) * BLOCK;
            // The shuffle tells the compiler that all lanes have the same address: descriptors are then made once for all of them,
            // by other registers. (Sparse groups of 32 have none left to spare.)
            const u32 at = base + ring.slot * X_BYTES;
            const u64 x = operand_of(SPARSE && GROUP == 32 ? at : __shfl_sync(0xffffffffu, at, 0));
            u32 words[4];
            Scales s[2];
#pragma unroll
            for (int u = 0; u < 2; u++) {
                u32(&buffer)[STEPS][4] = a[u % BUFFERS];
                if (u == 0 || !SPARSE) load_words(words, block + half * (CODES / 2) + u * 512 + lane * 16);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (i == 0 ? u == 0 || GROUP < 128 : GROUP == 32)
                        s[i] = load_scales(block, (2 * u + i) * 32 / GROUP, g, half, raises);
                    else
                        s[i] = s[0];
                    if (BUFFERS == 1 && i == 0) {
                        products_wait<0>();
                        have_ended(p, places[0], base);
                    }
                    if (SPARSE) {
                        if (i == 0) load_places(places[u % BUFFERS], block, u, half, lane);
                        to_floats(buffer[i], words[2 * u + i], s[i]);
                    } else {
                        to_floats(buffer[2 * i], words[2 * i], s[i]);
                        to_floats(buffer[2 * i + 1], words[2 * i + 1], s[i]);
                    }
                }
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    const bool begins = SUMS && (u * 64 + step * STEP) % GROUP == 0;
                    if (begins) {
                        if (step) products_commit();
                        if (more || u || step) {
                            products_wait<0>();
                            fold();
                        }
                        scale[0] = s[step * STEP / 32].of[0], scale[1] = s[step * STEP / 32].of[1];
                    }
                    if (step == 0 || begins) {
                        settle(sum);
                        products_begin();
                    }
                    warpgroup_product(sum, buffer[step], places[u % BUFFERS][step], x + (u * (X_BYTES / 2) + step * STEP * 2 >> 4),
                                      SUMS ? !begins : more || u || step);
                }
                products_commit();
                if (BUFFERS > 1) {
                    products_wait<1>();
                    have_ended(p, places[(u + 1) % BUFFERS], base);
                }
                if (BUFFERS > 1 && u == 0 && before >= 0) release(before);
            }
            if (BUFFERS == 1) {
                products_wait<0>();
                have_ended(p, places[0], base);
                release(ring.slot);
            }
            more = 1;
            before = ring.slot;
            ring.step();
        }
        products_wait<0>();
        have_ended(p, places[BUFFERS - 1], base);
        if (BUFFERS > 1 && (MEET == 1 || before >= 0)) release(before);
        if (SUMS) fold();
        else settle(sum);
        float(&result)[TOKENS / 2] = *(float(*)[TOKENS / 2])(SUMS ? total : sum);
        if (RAISED) {
            const float by[2] = {lowered_by(raises, 0), lowered_by(raises, 1)};
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) result[i] *= by[i >> 1 & 1];
        }
        if (MEET > 1) {
            meet(p, result, piece.tile, memory, staging, warp, lane);
        } else if (piece.end < p.blocks || piece.first > 0 && !p.helped) {
            int slot = (piece.tile - p.whole * gridDim.x) * 2 + (piece.first > 0);
            if (!p.helped) {
                slot = blockIdx.x * 2 + (shared_tile0 >= 0);
                (shared_tile0 < 0 ? shared_tile0 : shared_tile1) = piece.tile;
            }
            store_partial(p, result, piece.tile, slot, warp, lane);
        } else {
            if (OWNERS && piece.first > 0) add_help(p, result, piece.tile, warp, lane);
            store_tile(p, result, piece.tile, staging, warp, lane);
        }
    }
    if (MEET == 1 && shared_tile0 >= 0) sum_partials(p, shared_tile0, staging, warp, lane);
    if (MEET == 1 && shared_tile1 >= 0) sum_partials(p, shared_tile1, staging, warp, lane);
}

// Registers of a thread that copies, and of one that multiplies.
constexpr int FEWER = CTAS == 2 || WARPGROUPS != 2 ? 32 : 40;
constexpr int MORE = CTAS == 2 ? 104 : WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 160 : 112;

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, CTAS) w4a16_hopper(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 memory[];
    if (threadIdx.x == 0) {
        const u32 full = shared_address(memory) + p.at_barriers;
        for (int i = 0; i < p.stages; i++) {
            init_barrier(full + 8 * i, 1);
            init_barrier(full + 8 * (p.stages + i), WARPS);
        }
        if (MEET > 1) begin_meeting(p, shared_address(memory));
        publish_barriers();
    }
    __syncthreads();
    if (MEET > 1) arrive_at_the_cluster();
    let_the_next_kernel_start();
    if (threadIdx.x < CONSUMERS) {
        more_registers<MORE>();
        consume(p, memory);
    } else {
        fewer_registers<FEWER>();
        if (threadIdx.x < CONSUMERS + 32) produce(p, memory);
    }
}
