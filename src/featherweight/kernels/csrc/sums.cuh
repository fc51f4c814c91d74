// From the sums of warps that split the columns to rows of y, for wna16.cu: which says what Params are.

// Sums travel as the tensor cores leave them: four floats a lane, of two rows and two tokens; `lanes` in four have any.
__device__ __forceinline__ int lanes_with_tokens(int tokens, int n) { return min(4, (tokens + 1) / 2 - n * 4); }

template <int NT>
__device__ __forceinline__ void send_partials(const Params& p, const float (&total)[2][NT][4], const Exchange& exchange, u32 ring, int part, int rank, int tile, int lane) {
    const int g = lane >> 2, t = lane & 3, half_bytes = (p.tokens + 1) / 2 * 128;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int half = tile * 2 + h, owner = quotient(half, p.by_owned);
        const int before = p.own && part >= (owner + 1) * p.warp_splits ? part - p.warp_splits : part;
        u32 to = exchange.buffer + before * p.part_bytes + (half - owner * p.owned) * half_bytes, there = exchange.barrier;
        if (p.own && owner == rank) to = ring + h * half_bytes;
#if BULK
        to = remote_address(to, owner);
        there = remote_address(there, owner);
#endif
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int lanes = lanes_with_tokens(p.tokens, n);
            if (t < lanes) send(to + n * 512 + (g * lanes + t) * 16, total[h][n], there);
        }
    }
}

// Sums of all splits for the half tiles this CTA owns, rounded once. Of the cluster's tiles, `step` apart, `here` halves
// are in this pass, from `tile` on; ours begin with half `first`.
template <int NT>
__device__ __forceinline__ void store_rows(const Params& p, u32 partials, u32 rings, int splits, int tile, int step, int here, int first, int warp, int lane) {
    const int g = lane >> 2, t = lane & 3, half_bytes = (p.tokens + 1) / 2 * 128;
    for (int i = warp; i < p.owned * NT; i += blockDim.x / 32) {
        const int n = i % NT, half = first + i / NT, lanes = lanes_with_tokens(p.tokens, n);
        if (half >= here || t >= lanes) continue;
        const u32 in_half = n * 512 + (g * lanes + t) * 16, ring_bytes = p.stages * p.chunk * BLOCK;
        float sum[4] = {};
        auto add = [&](u32 at, u32 apart, int count) {
#pragma unroll 4
            for (int s = 0; s < count; s++, at += apart) {
                float4 v = load_shared_floats(at);
                sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
            }
        };
        if (p.own) add(rings + half / 2 * ring_bytes + half % 2 * half_bytes + in_half, p.row_warps * ring_bytes, p.warp_splits);
        add(partials + i / NT * half_bytes + in_half, p.part_bytes, p.own ? splits - p.warp_splits : splits);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = (tile + half / 2 * step) * ROWS + half % 2 * 16 + e / 2 * 8 + g, token = n * 8 + t * 2 + e % 2;
            if (row >= p.rows || token >= p.tokens) continue;
            p.y[(u64)token * p.rows + row] = float_to_activation(sum[e] * (e / 2 ? 1 / STEP / ODD : 1 / STEP));
        }
    }
}
