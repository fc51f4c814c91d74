// Rows of entropy-coded matrices made floats, for a dense product with many tokens. Matrix is that of sub1.cu.

struct Dense {
    const Matrix* matrices;
    const u8* zeros;         // of each row and group of each matrix, or none: symmetric grids
    u16* y;                  // matrices x rows x columns
    int count, rows, columns, groups;
    int first_row, last_row;  // of every matrix, a multiple of 32 the first; y has these rows alone
};

constexpr int PITCH = ROWS + 1;  // words of two-bit codes, 16 columns of each of a tile's rows, and one more for other banks

// What decoding knows of a matrix: bits of `kind`, see Matrix; bits 8 to 15 are the codes of the four levels.
__device__ __forceinline__ u32 code_of(const Matrix& matrix, u32 level) { return matrix.kind >> (8 + 2 * level) & 3; }

__device__ __forceinline__ void put_code(u32* codes, int column, u32 code, int lane) {
    codes[(column >> 4) * PITCH + lane] |= code << 2 * (column & 15);
}

__device__ __forceinline__ void decode_runs(const Matrix& matrix, const u32* words, int count, int columns, u32* codes, int lane) {
    const int b = matrix.bits, v = matrix.kind >> 16 & 3, gaps = ((1 << b) - 1) / v;
    const u32 mask = (1u << b) - 1;
    u32 low = count > 0 ? words[0] : ~0u, high = count > 1 ? words[1] : ~0u;
    int next = 2, bit = 0, left = count * 32;
    for (int column = 0; left >= b && column < columns; left -= b) {
        const int s = __funnelshift_r(low, high, bit) & mask;
        bit += b;
        if (bit >= 32) bit -= 32, low = high, high = next < count ? words[next] : ~0u, next++;
        const int gap = v == 1 ? s : v == 2 ? s >> 1 : s * 171 >> 9;
        if (s >= v * gaps) {
            column += (s - v * gaps + 1) * gaps;
        } else {
            column += gap;
            if (column < columns) put_code(codes, column, code_of(matrix, s - gap * v + 1), lane);
            column++;
        }
    }
}

__device__ __forceinline__ void decode_bitmap(const Matrix& matrix, const u32* words, int count, int columns, u32* codes, int lane) {
    const int flags = (columns + 31) / 32;
    int bits = flags * 32;
    for (int i = 0; i < flags && i < count; i++)
        for (u32 left = words[i]; left; left &= left - 1, bits++) {
            const int column = i * 32 + __ffs(left) - 1;
            const u32 sign = bits < count * 32 ? words[bits >> 5] >> (bits & 31) & 1 : 0;
            if (column < columns) put_code(codes, column, code_of(matrix, 1 + sign), lane);
        }
}

__device__ __forceinline__ void decode_plain(const Matrix& matrix, const u32* words, int count, int columns, u32* codes, int lane) {
    const int b = matrix.bits;
    for (int c = 0; c < columns && c * b < count * 32; c++)
        put_code(codes, c, code_of(matrix, words[c * b >> 5] >> (c * b & 31) & ((1 << b) - 1)), lane);
}

// A warp's tile of codes from shared memory to floats: 16 columns a lane.
__device__ __forceinline__ void store_dense(const Dense& p, const Matrix& matrix, int at, int first, const u32* codes, int lane) {
    const int width = p.columns / p.groups;
    for (int r = 0; r < min(ROWS, p.last_row - first); r++) {
        const u64 row = (u64)at * p.rows + first + r;  // of all matrices, among scales' and zeros' rows
        u16* to = p.y + ((u64)at * (p.last_row - p.first_row) + first + r - p.first_row) * p.columns;
        for (int c = lane * 16; c < p.columns; c += 512) {
            const u32 word = codes[(c >> 4) * PITCH + r];
            const int group = c / width;
            const u16 stored = matrix.scales[(u64)(first + r) * p.groups + group];
            const float scale = matrix.kind >> 30 & 1 ? bfloat_to_float(stored) : half_to_float(stored);
            const int zero = p.zeros ? p.zeros[row * p.groups + group] : 2;
            u32 out[8];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int steps = (int)((word >> 2 * i) + zero & 3) - zero;
                const u32 value = float_to_activation((float)steps * scale);
                out[i / 2] = i % 2 ? out[i / 2] | value << 16 : value;
            }
            *(uint4*)(to + c) = make_uint4(out[0], out[1], out[2], out[3]);
            *(uint4*)(to + c + 8) = make_uint4(out[4], out[5], out[6], out[7]);
        }
    }
}

// A tile a warp. Columns are a multiple of 16, and so is a group.
extern "C" __global__ void __launch_bounds__(128) sub1_dense(const __grid_constant__ Dense p) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, words = p.columns / 16;
    const int tiles = (p.last_row - p.first_row + ROWS - 1) / ROWS;
    const u64 index = (u64)blockIdx.x * (blockDim.x >> 5) + warp;
    if (index >= (u64)tiles * p.count) return;
    const int at = (int)(index / tiles), first = p.first_row + (int)(index % tiles) * ROWS;
    u32* codes = (u32*)memory + warp * words * PITCH;
    for (int i = 0; i < words; i++) codes[i * PITCH + lane] = 0;
    const Matrix matrix = p.matrices[at];
    if (first + lane < p.last_row) {
        const u32 begin = matrix.starts[first + lane], count = matrix.starts[first + lane + 1] - begin;
        const u32* own = matrix.words + begin;
        const int kind = matrix.kind & 0xff;
        if (kind == PLAIN) decode_plain(matrix, own, count, p.columns, codes, lane);
        else if (kind == BITMAP) decode_bitmap(matrix, own, count, p.columns, codes, lane);
        else decode_runs(matrix, own, count, p.columns, codes, lane);
    }
    __syncwarp();
    store_dense(p, matrix, at, first, codes, lane);
}
