// x in shared memory, and its sums over groups, for wna16.cu: which says what Params are.

#if SPARSE
constexpr float STEP = 1.0f;
#elif BF16
constexpr float STEP = 1.0f / (1ull << 63) / 64;                             // 2^-69: a code's 2^-133 by x's 2^64
#else
constexpr float STEP = 1.0f / (1 << 24);
#endif

constexpr bool SCALED = BF16 && !SPARSE;                                        // x
constexpr float X_SCALE = 2.0f * (1ull << 63);

__device__ __forceinline__ u32 scaled(u32 pair) {
    float low = activation_to_float((u16)pair) * X_SCALE, high = activation_to_float((u16)(pair >> 16)) * X_SCALE;
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);  // exact: bfloat16 is half a float
}

// The columns of x that a CTA needs, in shared memory, for dense bfloat16 products times 2^64.
struct Slice {
    u8* x;
    u32 barrier;
    int first_column, columns;

    __device__ __forceinline__ int present(const Params& p) const { return max(0, min(columns, p.columns - first_column)); }

    // Says what is to come, once, after the barrier was made and before `load`.
    __device__ __forceinline__ void expect(const Params& p) const {
#if BULK
        if (threadIdx.x == 0) expect_bytes(barrier, p.tokens * present(p) * 2);
#endif
    }

    // All threads; where they may all read it afterwards.
    __device__ __forceinline__ void load(const Params& p) const {
        const int here = present(p), chunks = columns / 8;
#if BULK
        for (int token = threadIdx.x / 32; token < p.tokens && here > 0; token += blockDim.x / 32)
            if (one_lane())
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                             ::"r"(shared_address(x + token * p.x_stride)), "l"(p.x + (u64)token * p.columns + first_column),
                             "r"(here * 2), "r"(barrier) : "memory");
        wait_barrier(barrier, 0);
#endif
        if (BULK && !SCALED && here == columns) return;
        for (int i = threadIdx.x; i < p.tokens * chunks; i += blockDim.x) {
            int token = i / chunks, column = (i - token * chunks) * 8;
            uint4* at = (uint4*)(x + token * p.x_stride + column * 2);
            uint4 v = make_uint4(0, 0, 0, 0);
            if (column < here) v = BULK ? *at : *(const uint4*)(p.x + (u64)token * p.columns + first_column + column);
            if (SCALED) v.x = scaled(v.x), v.y = scaled(v.y), v.z = scaled(v.z), v.w = scaled(v.w);
            *at = v;
        }
        __syncthreads();
    }
};

// 8 tokens x 32 columns as the registers of products; `x` is where this lane's row of the four matrices begins: of lane l row
// l % 8 of the eight columns l / 8.
__device__ __forceinline__ uint4 load_unit(u32 x) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(x) : "memory");
    return v;
}

#if !SPARSE
// What zeros take away: the middle code (or 1, for zeros that are stored) times minus the sum of x over each group, by the
// tensor cores, in the steps of even and of odd rows' codes. Four floats a lane t, 8 tokens and group, as an accumulator
// holds them; the latter two are as the former where zeros are stored, whose odd rows come in their own steps.
template <int NT>
__device__ __forceinline__ void sum_x(const u32 (&x)[NT], u8* sums, int groups, int warp, int lane) {
    const u32 one = BF16 ? 0x89008900u : 0xbc00bc00u;  // -2^-109: steps of 2^-24 and x's 2^64 make codes' 2^-69; -1
    const u32 even = ZEROS ? one : 0x80008000u | MIDDLE * 0x00010001u, odd = ZEROS ? one : 0x80008000u | MIDDLE * ODD * 0x00010001u;
    const u32 away[4] = {even, odd, even, odd};
    for (int group = warp; group < groups; group += blockDim.x / 32) {
        float acc[NT][2][4] = {};  // short chains: one product waits for another
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int unit = 0; unit < GROUP / 32; unit++) {
                uint4 b = load_unit(x[n] + (group * (GROUP / 32) + unit) * 64);
                multiply(acc[n][0], away, b.x, b.y);
                multiply(acc[n][1], away, b.z, b.w);
            }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const float(&a)[4] = acc[n][0], (&b)[4] = acc[n][1];
            if (lane < 4)
                *(float4*)(sums + (group * NT + n) * 64 + lane * 16) = make_float4(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]);
        }
    }
}
#endif
