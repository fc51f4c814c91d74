// A block of weights in shared memory, as `wna16_layout.py` packs it, in the registers of a warp that multiplies by it.
//
// Macros: BITS (2, 3, 4, 8), GROUP (32, 64, 128), SCALE (0 float16, 1 bfloat16, 2 float32), ZEROS (0: the middle code),
// SPARSE (1: of four neighbouring columns two are stored, as codes of 4 bits, and which; see kept.cuh).

constexpr int ROWS = 32, COLUMNS = 128, PARTS = COLUMNS / GROUP;
constexpr int CODES = ROWS * COLUMNS * BITS / 8 / (SPARSE ? 2 : 1), PLACES = SPARSE ? ROWS * COLUMNS / 8 : 0;
constexpr int SCALE_BYTES = PARTS * ROWS * (SCALE == 2 ? 4 : 2), ZERO_BYTES = ZEROS ? PARTS * ROWS / (BITS < 4 ? 2 : 1) : 0;
constexpr int BLOCK = CODES + SCALE_BYTES + ZERO_BYTES + PLACES;
constexpr int CHUNK = BITS == 2 ? 4 : BITS == 8 ? 1 : 2;  // blocks of a tile that lie together in memory

// A code is used as it lies: its bits, anded out of a word, are the subnormal float16 q * 2^-24 (or the bfloat16
// q * 2^-133) where they are the lowest, and ODD times that where they are the second nibble, as those of odd rows are.
[[maybe_unused]] constexpr u32 FIELD = ((1u << BITS) - 1) * 0x00010001u;
constexpr int ODD = BITS == 8 || SPARSE ? 1 : 16, MIDDLE = 1 << (BITS - 1);

// The words of codes of both half tiles that come with one 16-byte load each: for UNITS units of 32 columns.
constexpr int UNITS = BITS == 8 ? 1 : BITS == 4 && !SPARSE ? 2 : 4;
#if !SPARSE
struct Codes {
    u32 of[2][4];
#if BITS == 3
    u32 third[4];
#endif

    __device__ __forceinline__ static void load_words(u32 (&words)[4], const u8* from) {
        uint4 v = *(const uint4*)from;
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
    __device__ __forceinline__ void load(const u8* block, int unit, int lane) {
        constexpr int HALF = ROWS / 2 * COLUMNS * (BITS == 3 ? 2 : BITS) / 8;
        load_words(of[0], block + unit / UNITS * 512 + lane * 16);
        load_words(of[1], block + HALF + unit / UNITS * 512 + lane * 16);
#if BITS == 3
        load_words(third, block + 2 * HALF + lane * 16);
#endif
    }
    // The codes of half tile h, product j of a unit, as the registers of m16n8k16.
    __device__ __forceinline__ void take(u32 (&a)[4], int h, int unit, int j) const {
#if BITS == 8
        u32 low = of[h][2 * j], high = of[h][2 * j + 1];
        a[0] = low & FIELD, a[1] = low >> 8 & FIELD, a[2] = high & FIELD, a[3] = high >> 8 & FIELD;
#else
        u32 w = BITS == 4 ? of[h][unit % 2 * 2 + j] : of[h][unit] >> 2 * j;
#if BITS == 3
        const int e = unit % 2 * 2 + j;  // the place of the third bits in their nibbles; they belong in place 2
        u32 bits = third[h * 2 + unit / 2];
        bits = e < 3 ? bits << (2 - e) : bits >> 1;
        w = select_bits(0x33333333u, w, bits);
#endif
        a[0] = w & FIELD, a[1] = w & FIELD << 4, a[2] = w >> 8 & FIELD, a[3] = w >> 8 & FIELD << 4;
#endif
    }
};
#endif

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

// Zeros in steps of 2^-24, those of odd rows times ODD: subnormals as codes are, read as float16 whatever activations are.
__device__ __forceinline__ Four load_zeros(const u8* block, int part, int g) {
    const u8* at = block + CODES + SCALE_BYTES + (part * 8 + g) * (BITS < 4 ? 2 : 4);
    u32 even, odd;
    if (BITS < 4) {  // a byte of two nibbles for each half tile
        u32 v = *(const u16*)at;
        v = (v | v << 8) & 0x00ff00ffu;
        even = v & 0x000f000fu, odd = v & 0x00f000f0u;
    } else {
        u32 v = *(const u32*)at;
        even = v & 0x00ff00ffu;
        odd = BITS == 8 ? v >> 8 & 0x00ff00ffu : v >> 4 & 0x01f001f0u;  // a zero of 4 bits can be 16
    }
    Four z;
    z.of[0][0] = half_to_float((u16)even), z.of[1][0] = half_to_float((u16)(even >> 16));
    z.of[0][1] = half_to_float((u16)odd), z.of[1][1] = half_to_float((u16)(odd >> 16));
    return z;
}
