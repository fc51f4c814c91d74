// Tiles of y: which of them a CTA computes, whole or in part, and how it stores them. After gpu.cuh and hopper.cuh; the
// including file says Params and the constants of its tiles.

// ---- who computes what --------------------------------------------------------------------------------------------------

struct Piece {
    int tile, first, end;  // blocks of columns
};

// The pieces of a CTA: `whole` tiles, then its stretch of the shared tiles' blocks, which begins and may end inside one. Where
// those have owners, CTA after CTA, a stretch is a tile's blocks but the first `helped`, or one of all tiles' first. Where
// MEET CTAs share each tile, one piece, by our rank.
__device__ __forceinline__ int rank() { return blockIdx.x % MEET; }

struct Pieces {
    int index, unit, unit_end;

    // Blocks of a shared tile that our stretch goes through.
    static __device__ __forceinline__ int span(const Params& p) { return p.helped && blockIdx.x >= p.shared ? p.helped : p.blocks; }

    __device__ __forceinline__ explicit Pieces(const Params& p) : index(0) {
        if (MEET > 1) return;
        u32 cta = blockIdx.x, sharers = p.sharers;
        unit = cta * p.blocks + p.helped, unit_end = (cta + 1) * p.blocks;
        if (p.helped) {
            if (cta < p.shared) return;
            cta -= p.shared, sharers -= p.shared;
        }
        const u32 units = p.shared * span(p);
        unit = cta < sharers ? units * cta / sharers : 0;
        unit_end = cta < sharers ? units * (cta + 1) / sharers : 0;
    }
    __device__ __forceinline__ bool next(const Params& p, Piece& piece) {
        if (MEET > 1) {
            piece = {(int)blockIdx.x / MEET, p.blocks * rank() / MEET, p.blocks * (rank() + 1) / MEET};
            return index++ == 0;
        }
        if (index < p.whole) {
            piece = {(int)(blockIdx.x + index * gridDim.x), 0, p.blocks};
            index++;
            return true;
        }
        if (unit >= unit_end) return false;
        const int blocks = span(p), t = unit / blocks;
        piece.tile = p.whole * gridDim.x + t;
        piece.first = unit - t * blocks;
        piece.end = min(blocks, unit_end - t * blocks);
        unit += piece.end - piece.first;
        return true;
    }
};

__device__ __forceinline__ int row_tile_of(const Params& p, int tile, int& token_tile) {
    int per_band = p.band * p.row_tiles, band = tile / per_band, width = min(p.band, p.token_tiles - band * p.band);
    int in_band = tile - band * per_band;
    token_tile = band * p.band + in_band % width;
    return in_band / width;
}

// ---- y --------------------------------------------------------------------------------------------------------------------

// 16 rows x 16 * COUNT tokens of a warp, from the registers of two products' eights of tokens each.
template <int COUNT>
__device__ __forceinline__ void store_sixteens(
    const Params& p, u8* staging, const float (&v)[COUNT][8], int count, const float (&bias)[2], int row, int token, int lane) {
    // Token k's 32 bytes are two sixteens, of which tokens 4 to 7 of eight hold the second first: other banks.
    const int to_token = (lane >> 4) * 8 + (lane & 7), to_half = (lane >> 3 & 1) ^ (to_token >> 2 & 1);
    const int from_token = lane >> 1, half = lane & 1, from_half = half ^ (from_token >> 2 & 1);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            packed[i] = (u32)float_to_activation(v[c][2 * i] + bias[i & 1]) | (u32)float_to_activation(v[c][2 * i + 1] + bias[i & 1]) << 16;
        store_turned(shared_address(staging) + c * 512 + to_token * 32 + to_half * 16, packed[0], packed[1], packed[2], packed[3]);
    }
    __syncwarp();
    row += half * 8;
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        const int at = token + c * 16 + from_token;
        if (c >= count || at >= p.tokens) continue;
        uint4 line = *(const uint4*)(staging + c * 512 + from_token * 32 + from_half * 16);
        u16* y = p.y + (u64)at * p.rows + row;
        if (p.rows % 8 == 0) {
            if (row < p.rows) *(uint4*)y = line;
        } else {
            u32 words[4] = {line.x, line.y, line.z, line.w};
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (row + i < p.rows) y[i] = (u16)(words[i / 2] >> 16 * (i & 1));
        }
    }
}

__device__ __forceinline__ void load_bias(float (&bias)[2], const Params& p, int row, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = row + (lane >> 2) + 8 * h;
        bias[h] = p.bias && r < p.rows ? activation_to_float(p.bias[r]) : 0;
    }
}

__device__ __forceinline__ void store_tile(const Params& p, const float (&sum)[TOKENS / 2], int tile, u8* staging, int warp, int lane) {
    int token_tile, row = row_tile_of(p, tile, token_tile) * WARPGROUPS * 64 + warp * 16;
    float bias[2];
    load_bias(bias, p, row, lane);
#pragma unroll
    for (int i = 0; i < SIXTEENS; i += 2) {
        const int token = token_tile * TOKENS + i * 16;
        if (token >= p.tokens) break;
        float v[2][8];
#pragma unroll
        for (int e = 0; e < 16; e++) v[e / 8][e % 8] = sum[8 * i + e];
        store_sixteens<2>(p, staging, v, 2, bias, row, token, lane);
    }
}

// ---- shared tiles -----------------------------------------------------------------------------------------------------------
// A warp's part of a tile is summed up with the same warp's of other CTAs: no warp waits for others of its own CTA.

__device__ __forceinline__ u32* counter_of(const Params& p, int tile, int warp) {
    return p.counters + (tile - p.whole * gridDim.x) * 16 + warp;
}

__device__ __forceinline__ void store_partial(const Params& p, const float (&sum)[TOKENS / 2], int tile, int slot, int warp, int lane) {
    float4* to = p.partials + (u64)slot * QUADS * CONSUMERS + threadIdx.x;
#pragma unroll
    for (int q = 0; q < QUADS; q++) __stcg(to + q * CONSUMERS, make_float4(sum[4 * q], sum[4 * q + 1], sum[4 * q + 2], sum[4 * q + 3]));
    __syncwarp();
    if (lane == 0) add_one_after_stores(counter_of(p, tile, warp));
}

// To an owner's sums of a tile: what one or two helpers have made of its first blocks.
__device__ __forceinline__ void add_help(const Params& p, float (&sum)[TOKENS / 2], int tile, int warp, int lane) {
    const u32 t = tile - p.whole * gridDim.x, units = p.shared * p.helped, helpers = p.sharers - p.shared;
    const u32 first = (t * p.helped + 1) * helpers - 1, last = (t + 1) * p.helped * helpers - 1;
    const int parts = last / units - first / units + 1;
    u32* counter = counter_of(p, tile, warp);
    if (lane == 0)
        while (read_counter(counter) < (u32)parts) {}
    __syncwarp();
    for (int i = 0; i < parts; i++) {
        const float4* from = p.partials + (u64)(t * 2 + i) * QUADS * CONSUMERS + threadIdx.x;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const float4 part = __ldcg(from + q * CONSUMERS);
            sum[4 * q] += part.x, sum[4 * q + 1] += part.y, sum[4 * q + 2] += part.z, sum[4 * q + 3] += part.w;
        }
    }
    __syncwarp();
    if (lane == 0) *counter = 0;
}

// WIDE sixteens of tokens from `i` on, summed up over all who shared in the tile, DEEP of them at a time.
template <int WIDE, int DEEP>
__device__ __forceinline__ void sum_sixteens(float (&v)[WIDE][8], const Params& p, int i, int count, int first, int last, int first_slot) {
    for (int c = first; c <= last; c += DEEP) {
        float4 part[DEEP][2 * WIDE];
#pragma unroll
        for (int d = 0; d < DEEP; d++) {
            const int slot = c + d == first ? first_slot : 0;
            const float4* from = p.partials + ((u64)((c + d) * 2 + slot) * QUADS + 2 * i) * CONSUMERS + threadIdx.x;
#pragma unroll
            for (int q = 0; q < 2 * WIDE; q++)
                part[d][q] = c + d <= last && q < 2 * count ? __ldcg(from + q * CONSUMERS) : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int d = 0; d < DEEP; d++)
#pragma unroll
            for (int q = 0; q < 2 * WIDE; q++) {
                float* to = v[q / 2] + q % 2 * 4;
                to[0] += part[d][q].x, to[1] += part[d][q].y, to[2] += part[d][q].z, to[3] += part[d][q].w;
            }
    }
}

// Our share of a tile's sums: of its sixteens of tokens, as many as of everybody who shared in it.
__device__ __forceinline__ void sum_partials(const Params& p, int tile, u8* staging, int warp, int lane) {
    const u32 t = tile - p.whole * gridDim.x, units = p.shared * p.blocks, all = p.sharers;
    // The CTA of unit u is the last whose stretch begins at u or before.
    const int first = (int)(((t * p.blocks + 1) * all + units - 1) / units) - 1;
    const int last = (int)(((t + 1) * p.blocks * all + units - 1) / units) - 1;
    const int first_slot = units * first / all >= t * p.blocks ? 0 : 1;
    const int sharers = last - first + 1, us = blockIdx.x - first, end = SIXTEENS * (us + 1) / sharers;
    int token_tile, row = row_tile_of(p, tile, token_tile) * WARPGROUPS * 64 + warp * 16;
    float bias[2];
    load_bias(bias, p, row, lane);
    u32* counter = counter_of(p, tile, warp);
    if (lane == 0)
        while (read_counter(counter) < (u32)sharers) {}
    __syncwarp();
    for (int i = SIXTEENS * us / sharers; i < end; i += 2) {
        const int count = min(2, end - i), token = token_tile * TOKENS + i * 16;
        if (token >= p.tokens) break;
        float v[2][8] = {};
        if (sharers <= 2)
            sum_sixteens<2, 2>(v, p, i, count, first, last, first_slot);
        else
            sum_sixteens<2, 4>(v, p, i, count, first, last, first_slot);
        store_sixteens<2>(p, staging, v, count, bias, row, token, lane);
    }
    __syncwarp();
    if (lane == 0 && add_one(counter) == (u32)(2 * sharers - 1)) *counter = 0;  // the last to leave
}

// ---- tiles that a cluster shares --------------------------------------------------------------------------------------------
// Each CTA has sums of its part of the columns, and sends the others those of their tokens, a warp the same warp of each: into a box
// for each sender and each of the sixteens that the receiver sums up.

constexpr int SHARE = (SIXTEENS + MEET - 1) / MEET;  // sixteens of tokens that a CTA sums up, at most

__device__ __forceinline__ constexpr int owner_of(int sixteen) { return sixteen * MEET / SIXTEENS; }
__device__ __forceinline__ constexpr int first_of(int rank) { return (rank * SIXTEENS + MEET - 1) / MEET; }

// A warp's, at which all that it is sent arrives.
__device__ __forceinline__ u32 meeting_barrier(const Params& p, u32 base, int warp) {
    return base + p.at_barriers + 16 * p.stages + 8 * warp;
}

__device__ __forceinline__ void begin_meeting(const Params& p, u32 base) {
    for (int warp = 0; warp < WARPS; warp++) {
        const u32 barrier = meeting_barrier(p, base, warp);
        init_barrier(barrier, 1);
        expect_bytes(barrier, (MEET - 1) * (first_of(rank() + 1) - first_of(rank())) * 32 * 32);
    }
}

__device__ __forceinline__ void meet(
    const Params& p, const float (&sum)[TOKENS / 2], int tile, u8* memory, u8* staging, int warp, int lane) {
    const u32 base = shared_address(memory), boxes = base + p.at_meeting + threadIdx.x * 16, barrier = meeting_barrier(p, base, warp);
    const int first = first_of(rank()), count = first_of(rank() + 1) - first;
    float v[SHARE][8] = {};
#pragma unroll
    for (int i = 0; i < SIXTEENS; i++) {
        const int to = owner_of(i), place = i - first_of(to), from = (rank() - to + MEET) % MEET - 1;
        if (to == rank()) continue;
        const u32 box = boxes + (from * SHARE + place) * 2 * CONSUMERS * 16;
        send(box, sum[8 * i], sum[8 * i + 1], sum[8 * i + 2], sum[8 * i + 3], barrier, to);
        send(box + CONSUMERS * 16, sum[8 * i + 4], sum[8 * i + 5], sum[8 * i + 6], sum[8 * i + 7], barrier, to);
    }
#pragma unroll
    for (int i = 0; i < SIXTEENS; i++)
        if (owner_of(i) == rank())
#pragma unroll
            for (int e = 0; e < 8; e++) v[i - first_of(owner_of(i))][e] = sum[8 * i + e];
    wait_barrier(barrier, 0);
#pragma unroll
    for (int c = 0; c < (MEET - 1) * SHARE; c++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (c % SHARE >= count) continue;
            const float4 part = load_shared_floats(boxes + (c * 2 + h) * CONSUMERS * 16);
            float* to = v[c % SHARE] + 4 * h;
            to[0] += part.x, to[1] += part.y, to[2] += part.z, to[3] += part.w;
        }
    int token_tile, row = row_tile_of(p, tile, token_tile) * WARPGROUPS * 64 + warp * 16;
    float bias[2];
    load_bias(bias, p, row, lane);
    constexpr int AT_ONCE = SHARE > 1 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < SHARE; i += AT_ONCE) {
        float now[AT_ONCE][8];
#pragma unroll
        for (int e = 0; e < 8 * AT_ONCE; e++) now[e / 8][e % 8] = v[min(i + e / 8, SHARE - 1)][e % 8];
        const int token = token_tile * TOKENS + (first + i) * 16;
        if (token < p.tokens && i < count) store_sixteens<AT_ONCE>(p, staging, now, count - i, bias, row, token, lane);
    }
}
