// Blocks of weights of which two of four neighbouring columns are stored (SPARSE), in the registers of a warp that multiplies
// by them with the sparse products of the tensor cores. In place of what wna16.cu and blocks.cuh do with dense ones; after
// blocks.cuh, numbers.cuh and Params.

// All codes of a lane, a word for each unit of 32 columns and half tile; and of lanes t = 2h, 2h + 1 in a word for each unit
// the places of rows g (lower half) and g + 8 of half tile h: the first and the last 16 columns, two bits each place.
struct Codes {
    u32 of[2][4], places[4], zeros[2][2];  // zeros: half tile; row or row + 8

    __device__ __forceinline__ static void load_words(u32 (&words)[4], const u8* from) {
        uint4 v = *(const uint4*)from;
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    __device__ __forceinline__ void load(const u8* block, int, int lane) {
        load_words(of[0], block + lane * 16);
        load_words(of[1], block + CODES / 2 + lane * 16);
        load_words(places, block + BLOCK - PLACES + lane * 16);
    }
    __device__ __forceinline__ void load_zeros(const u8* block, int part, int g) {
        u32 v = ZEROS ? *(const u32*)(block + CODES + SCALE_BYTES + (part * 8 + g) * 4) : MIDDLE * 0x01010101u;
#pragma unroll
        for (int h = 0; h < 2; h++) zeros_of(zeros[h], v >> 16 * h & 255, v >> 16 * h + 8 & 255);
    }
    // Code minus zero of half tile h and a unit, as the registers of m16n8k32: rows g and g + 8 in turn, columns 4t .. 4t + 3,
    // then 16 further on.
    __device__ __forceinline__ void take(u32 (&a)[4], int h, int unit) const {
        code_minus_zero(a[0], a[1], of[h][unit], zeros[h]);
        code_minus_zero(a[2], a[3], of[h][unit] >> 8, zeros[h]);
    }
};

#if BF16
#define SPARSE_PRODUCT "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
#else
#define SPARSE_PRODUCT "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
#endif
// H: which pair of each four lanes' places count.
template <int H>
__device__ __forceinline__ void multiply_kept(float (&c)[4], const u32 (&a)[4], const uint4& b, u32 places) {
    asm(SPARSE_PRODUCT "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,%13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(places), "n"(H));
}

template <int NT>
__device__ __forceinline__ void begin_group(float (&acc)[2][NT][4], Codes& codes, const u8* block, const u8*, int part, int lane) {
    codes.load_zeros(block, part, lane >> 2);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[h][n][e] = 0;
}

template <int NT>
__device__ __forceinline__ void multiply_unit(float (&acc)[2][NT][4], const Codes& codes, const uint4 (&b)[NT], int unit) {
    u32 a[4];
    codes.take(a, 0, unit);
#pragma unroll
    for (int n = 0; n < NT; n++) multiply_kept<0>(acc[0][n], a, b[n], codes.places[unit]);
    codes.take(a, 1, unit);
#pragma unroll
    for (int n = 0; n < NT; n++) multiply_kept<1>(acc[1][n], a, b[n], codes.places[unit]);
}

// A unit of 32 columns as floats, which begins at `column`, of a block's rows.
__device__ __forceinline__ void store_weights(const Params& p, Codes& codes, const u8* block, int unit, int row, int column, int lane) {
    const int g = lane >> 2, t = lane & 3, part = unit * 32 / GROUP;
    const Four scales = load_scales(block, part, g);
    codes.load_zeros(block, part, g);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 a[4];
        codes.take(a, h, unit);
#pragma unroll
        for (int r = 0; r < 4; r++) {  // of a row's four columns two
            const u32 all = __shfl_sync(0xffffffffu, codes.places[unit], lane & ~3 | 2 * h | r / 2);
            const int places = all >> r % 2 * 16 + t * 4, first = places & 3, second = places >> 2 & 3;
            const u64 low = float_to_activation(activation_to_float((u16)a[r]) * scales.of[h][r % 2]);
            const u64 high = float_to_activation(activation_to_float((u16)(a[r] >> 16)) * scales.of[h][r % 2]);
            const int at = row + h * 16 + r % 2 * 8 + g, first_column = column + r / 2 * 16 + t * 4;
            if (at < p.rows && first_column < p.columns)
                *(u64*)(p.y + (u64)at * p.columns + first_column) = low << 16 * first | high << 16 * second;
        }
    }
}
