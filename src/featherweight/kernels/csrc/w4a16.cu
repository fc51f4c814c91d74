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

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define BULK (__CUDA_ARCH__ >= 900)

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

// ---- instructions ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 load_shared(u32 a) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a));
    return v;
}
__device__ __forceinline__ void store_shared_float(u32 a, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory");
}
__device__ __forceinline__ float load_shared_float(u32 a) { return __uint_as_float(load_shared(a)); }

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float bfloat_to_float(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ __forceinline__ float activation_to_float(u16 h) { return BF16 ? bfloat_to_float(h) : half_to_float(h); }
__device__ __forceinline__ u16 float_to_activation(float f) {
    u16 h;
    if (BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- what Hopper and its successors have: clusters, bulk copies, dependent launches ------------------------------------

__device__ __forceinline__ u32 cluster_rank() {
    u32 v = 0;
#if BULK
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
#endif
    return v;
}
__device__ __forceinline__ u32 cluster_size() {
    u32 v = 1;
#if BULK
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
#endif
    return v;
}
#if BULK
__device__ __forceinline__ void init_barrier(u32 barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// True in one lane of a whole warp, in a way that tells the compiler so.
__device__ __forceinline__ bool one_lane() {
    u32 yes;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(yes));
    return yes;
}
// The barrier's one arrival: its phase ends when so many bytes have come.
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred ready;\nagain:\nmbarrier.try_wait.parity.shared.b64 ready, [%0], %1;\n@!ready bra again;\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}
// Address `a` of our shared memory in that of the cluster's CTA `rank`.
__device__ __forceinline__ u32 remote_address(u32 a, u32 rank) {
    u32 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(rank));
    return v;
}
#endif
__device__ __forceinline__ void let_the_next_kernel_start() {
#if BULK
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where block k of tile t lies. Pairs of blocks of all tiles lie side by side, as the CTAs that read them work.
__device__ __forceinline__ u64 block_index(int k, int t, int blocks, int tiles) {
    const int pair = k & ~1, width = min(2, blocks - pair);
    return (u32)(tiles * pair + t * width + (k - pair));
}

// One warp's ring of chunks, each a few blocks of a tile: `start` fetches, `wait` makes one readable by the warp.
struct Ring {
    u8* slots;
    u32 barriers;
    int stages, chunk, blocks, tiles;       // blocks in a chunk; blocks and tiles of the whole matrix
    const u8* weights;
    int first, chunks;                      // the chunks of every tile that are ours
    int tile, tile_step;                    // being fetched; to our next one
    int slot_in, chunk_in, left;            // next to fetch, of the tile; left: chunks of all tiles
    int slot_out;
    u32 phase;
#if BULK
    u64 policy;
#endif

    // Fetches as many chunks as the ring holds: on Hopper each by a lane of its own.
    __device__ __forceinline__ void begin(int lane) {
        slot_in = slot_out = chunk_in = 0;
        phase = 0;
#if BULK
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        if (lane < stages) init_barrier(barriers + 8 * lane);
        __syncwarp();
        int n = min(stages, left);
        if (lane < n) fetch(lane, first + lane % chunks, tile + lane / chunks * tile_step);
        if (n > 0) {
            tile += n / chunks * tile_step;
            chunk_in = n % chunks;
            left -= n;
            slot_in = n == stages ? 0 : n;
        }
#else
        for (int i = 0; i < stages; i++) start(lane);
#endif
    }

    // The last chunk of a tile may be short.
    __device__ __forceinline__ int blocks_of(int c) { return min(chunk, blocks - c * chunk); }
    __device__ __forceinline__ const u8* address(int c, int t) {
        return weights + block_index(c * chunk, t, blocks, tiles) * BLOCK;
    }

#if BULK
    // One thread: a chunk into a slot, which announces its arrival.
    __device__ __forceinline__ void fetch(int slot, int c, int t) {
        u32 bytes = blocks_of(c) * BLOCK, barrier = barriers + 8 * slot;
        expect_bytes(barrier, bytes);
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
            ::"r"(shared_address(slots) + slot * chunk * BLOCK), "l"(address(c, t)), "r"(bytes), "r"(barrier), "l"(policy)
            : "memory");
    }
#endif

    __device__ __forceinline__ void start(int lane) {
        if (left > 0) {
            const int c = first + chunk_in;
#if BULK
            if (one_lane()) fetch(slot_in, c, tile);
#else
            for (int i = lane * 16; i < blocks_of(c) * BLOCK; i += 512)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                             ::"r"(shared_address(slots) + slot_in * chunk * BLOCK + i), "l"(address(c, tile) + i) : "memory");
#endif
            if (++chunk_in == chunks) {
                chunk_in = 0;
                tile += tile_step;
            }
            left--;
            if (++slot_in == stages) slot_in = 0;
        }
#if !BULK
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    __device__ __forceinline__ const u8* wait() {
#if BULK
        wait_barrier(barriers + 8 * slot_out, phase);
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(RING - 1) : "memory");
        __syncwarp();
#endif
        return slots + slot_out * chunk * BLOCK;
    }

    __device__ __forceinline__ void release(int lane) {
        if (++slot_out == stages) {
            slot_out = 0;
            phase ^= 1;
        }
        __syncwarp();  // the whole warp has read the chunk
        start(lane);
    }
};

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
        if (threadIdx.x < p.tokens)
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

// The sums of a pass travel from every split to the CTA of the cluster that owns their rows: stores into its memory that
// its barrier counts. Two buffers; one is written again only when the whole cluster has read it (`may_send`).
struct Exchange {
    u32 buffers, barriers;
    int bytes;

    __device__ __forceinline__ void begin() {
#if BULK
        if (threadIdx.x < 3) init_barrier(barriers + 8 * threadIdx.x);  // the third is for x
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    }
    __device__ __forceinline__ u32 buffer(int pass) { return buffers + (pass & 1) * bytes; }
    __device__ __forceinline__ u32 barrier(int pass) { return barriers + (pass & 1) * 8; }

    // `expected`: bytes of this pass that come to this CTA.
    __device__ __forceinline__ void may_send(int pass, u32 expected) {
#if BULK
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
        // Only now: expecting no bytes ends the phase, and a thread may have been waiting for the one before.
        if (threadIdx.x == 0) expect_bytes(barrier(pass), expected);
#else
        __syncthreads();
#endif
    }
    __device__ __forceinline__ void wait_for(int pass) {
#if BULK
        wait_barrier(barrier(pass), pass >> 1 & 1);
#else
        __syncthreads();
#endif
    }
    // After a buffer has been read, which is before the outputs made of it are stored: there is nothing to release, and
    // a release would wait for those stores. Every arrival is followed by a `may_send`.
    __device__ __forceinline__ void have_read() {
#if BULK
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    }
};

__device__ __forceinline__ void send(u32 to, float v, u32 barrier) {
#if BULK
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
                 ::"r"(to), "r"(__float_as_uint(v)), "r"(barrier) : "memory");
#else
    store_shared_float(to, v);
#endif
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
