// What earlier tiles of a slab owe to a tile: M[:K, tile]^T @ found[:K], 32 columns x ROWS rows, shared among warps by K.
//
// A lane has 4 columns and HIGH rows: with 32 rows three loads of 16 bytes for 32 multiplications.

// COUNT rows of the slab's block of the matrix from `from` on, in TILE columns from `column` on; zeros outside.
template <int COUNT, int THREADS>
__device__ __forceinline__ void fetch(float* to, const Params& p, const float* slab, int from, int column, int thread) {
    if (p.aligned) {
        constexpr int ACROSS = TILE / 4, STEP = THREADS / ACROSS;
        const int k = thread / ACROSS, n = thread % ACROSS * 4;
        const int wide = min(max(p.columns - column - n, 0), 4) * 4;
        const float* at = slab + (i64)(from + k) * p.all_columns + column + n;
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) {
            if (COUNT % STEP && i + k >= COUNT) break;
            const int bytes = from + i + k < p.columns ? wide : 0;
            copy_four(to + (i + k) * TILE + n, bytes ? at + (i64)i * p.all_columns : slab, bytes);
        }
    } else {
        const int k = thread / TILE, n = thread % TILE;
        for (int i = k; i < COUNT; i += THREADS / TILE) {
            const bool inside = from + i < p.columns && column + n < p.columns;
            copy_one(to + i * TILE + n, inside ? slab + (i64)(from + i) * p.all_columns + column + n : slab, inside ? 4 : 0);
        }
    }
}

// sums += block^T @ found, K rows of each.
template <int K>
__device__ __forceinline__ void multiply(float (&sums)[4][HIGH], const float* block, const float* found, int lane) {
    const float4* columns = (const float4*)block + lane / 4;
    const float4* rows = (const float4*)found + lane % 4;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const float4 m = columns[k * (TILE / 4)];
#pragma unroll
        for (int q = 0; q < HIGH / 4; q++) {
            const float4 f = rows[k * (ROWS / 4) + q * 4];
            const float ms[4] = {m.x, m.y, m.z, m.w}, fs[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
            for (int c = 0; c < 4; c++)
#pragma unroll
                for (int r = 0; r < 4; r++) sums[c][q * 4 + r] = fmaf(ms[c], fs[r], sums[c][q * 4 + r]);
        }
    }
}

// Adds a serving warp's share of what tiles 0 .. tile - 1 owe to tile + 1, through its own ring.
__device__ __forceinline__ void owed(float (&sums)[4][HIGH], const Params& p, const Here& here, int tile) {
    const int chunks = tile * (TILE / CHUNK), step = WARPS - 1, first = here.warp - 1, lane = here.lane;
    // `fetch` of CHUNK rows by a warp, with what stays the same worked out before: those rows are all in the slab
    const int k = p.aligned ? lane / 8 : 0, n = (tile + 1) * TILE + (p.aligned ? lane % 8 * 4 : lane);
    const int bytes = min(max(p.columns - n, 0), p.aligned ? 4 : 1) * 4;
    const i64 across = p.all_columns, stride = step * CHUNK * across;
    const float* from = here.slab + (first * CHUNK + k) * across + (bytes ? n : 0);
    float* ring = memory + AT_RINGS + here.warp * RING;
    auto start = [&](int chunk, int slot) {
        float* to = ring + slot * CHUNK * TILE + (p.aligned ? lane * 4 : lane);
        if (chunk < chunks && p.aligned) {
#pragma unroll
            for (int i = 0; i < CHUNK; i += 4) copy_four(to + i * TILE, from + i * across, bytes);
        } else if (chunk < chunks) {
#pragma unroll 1
            for (int i = 0; i < CHUNK; i++) copy_one(to + i * TILE, from + i * across, bytes);
        }
        from += stride;
        commit();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) start(first + s * step, s);
    int slot = 0;
#pragma unroll 1
    for (int chunk = first; chunk < chunks; chunk += step) {
        wait_but<STAGES - 2>();
        __syncwarp();
        start(chunk + (STAGES - 1) * step, (slot + STAGES - 1) % STAGES);
        multiply<CHUNK>(sums, ring + slot * CHUNK * TILE, memory + AT_FOUND + chunk * CHUNK * ROWS, lane);
        slot = (slot + 1) % STAGES;
    }
}

// The last of what is owed to a tile: all warps add what the tile before owes, and their sums are taken off.
__device__ __forceinline__ void settle(float (&sums)[4][HIGH], const Here& here, int tile) {
    constexpr int SHARE = TILE / WARPS;
    const int from = here.warp * SHARE;
    const float* found = memory + AT_FOUND + ((tile - 1) * TILE + from) * ROWS;
    multiply<SHARE>(sums, memory + AT_BESIDE + from * TILE, found, here.lane);
    float* own = memory + AT_RINGS + here.warp * SUMS + here.lane / 4 * 4 * PITCH + here.lane % 4 * 4;
#pragma unroll
    for (int c = 0; c < 4; c++)
#pragma unroll
        for (int q = 0; q < HIGH / 4; q++) {
            const float* s = &sums[c][q * 4];
            *(float4*)(own + c * PITCH + q * 16) = make_float4(s[0], s[1], s[2], s[3]);
        }
    __syncthreads();
    float4* now = (float4*)(memory + AT_NOW + tile % 2 * WEIGHTS);
    for (int i = threadIdx.x; i < WEIGHTS / 4; i += WARPS * 32) {
        float4 v = now[i];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const int at = w * SUMS + i / (ROWS / 4) * PITCH + i % (ROWS / 4) * 4;
            const float4 s = *(const float4*)(memory + AT_RINGS + at);
            v.x -= s.x, v.y -= s.y, v.z -= s.z, v.w -= s.w;
        }
        now[i] = v;
    }
    __syncthreads();
}
