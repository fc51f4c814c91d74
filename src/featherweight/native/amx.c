/* Products on CPUs that multiply tiles of bfloat16 into float32 (AMX), which torch has no operators for.

   multiply   y = x V^T, V = (code - zero) * scale of 4-bit codes, rounded to bfloat16 as the reference rounds it

   Compiled at first use by the machine's own C compiler (native/__init__.py). A tile is 16 rows of 32 bfloat16, or 16
   pairs of rows of 16. A panel is 32 rows of V.

   Layouts (columns a multiple of 32, groups too):
     codes  [panel][column / 8][half][16]      a word holds 8 neighbouring columns of one row, the first in its low bits
     scale  [panel][group][half][16] float, zero likewise in bytes
     x      [32 rows][column / 32][half][16][32], zeros behind the last row */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STEP 32                 /* columns of one instruction */
#define TILE (16 * 32)          /* bfloat16 of one tile */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Shape;

/* A panel's weights as pairs of columns: [column / 32][half][16 pairs][16 rows][2]. */
static void decode(const uint32_t *codes, const float *scale, const uint8_t *zero, uint16_t *out, int64_t columns,
                   int64_t group) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t first = 0; first < columns; first += group, scale += 32, zero += 32)
        for (int half = 0; half < 2; half++) {
            const __m512 step = _mm512_loadu_ps(scale + 16 * half);
            const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(zero + 16 * half)));
            const __m512 back = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_cvtepi32_ps(at)), step);
            for (int64_t column = first; column < first + group; column += 8) {
                const __m512i word = _mm512_loadu_si512(codes + (column / 8 * 2 + half) * 16);
                uint16_t *to = out + (column / STEP * 2 + half) * TILE + column % STEP / 2 * 32;
#define PAIR(i)                                                                                                    \
    {                                                                                                              \
        const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(word, 8 * i), table);                          \
        const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(word, 8 * i + 4), table);                       \
        const __m512bh both =                                                                                      \
            _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(odd, step, back), _mm512_fmadd_ps(even, step, back));              \
        _mm512_storeu_si512(to + 32 * i, _mm512_permutexvar_epi16(pairs, (__m512i)both));                          \
    }
                PAIR(0) PAIR(1) PAIR(2) PAIR(3)
            }
        }
}

static void configure(void) {
    Shape shape = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64, shape.rows[tile] = 16;
    _tile_loadconfig(&shape);
}

static void store(const float *from, uint16_t *y, int64_t rows, int64_t ldy) {
    for (int64_t row = 0; row < rows; row++)
        _mm256_storeu_si256((__m256i *)(y + row * ldy), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + 16 * row)));
}

/* 32 tokens of x by one panel; `tokens` of them are wanted, and `halves` of the panel's rows. */
static void block(const uint16_t *x, const uint16_t *v, int64_t columns, uint16_t *y, int64_t ldy, int64_t tokens,
                  int halves) {
    float out[4][256] __attribute__((aligned(64)));
    const int64_t steps = columns / STEP;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    if (tokens > 16)
        for (int64_t step = 0; step < steps; step++, x += 2 * TILE, v += 2 * TILE) {
            _tile_loadd(4, x, 64); _tile_loadd(6, v, 64); _tile_loadd(7, v + TILE, 64); _tile_loadd(5, x + TILE, 64);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
    else
        for (int64_t step = 0; step < steps; step++, x += 2 * TILE, v += 2 * TILE) {
            _tile_loadd(4, x, 64); _tile_loadd(6, v, 64); _tile_loadd(7, v + TILE, 64);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        }
    _tile_stored(0, out[0], 64); _tile_stored(1, out[1], 64); _tile_stored(2, out[2], 64); _tile_stored(3, out[3], 64);
    const int64_t first = tokens < 16 ? tokens : 16;
    for (int half = 0; half < halves; half++) {
        store(out[half], y + 16 * half, first, ldy);
        if (tokens > 16) store(out[2 + half], y + 16 * ldy + 16 * half, tokens - 16, ldy);
    }
}

/* Blocks begin .. end-1 of 32 tokens of x (tokens x columns) in tiles. */
void lay_out(const int64_t *arguments, int64_t begin, int64_t end) {
    const uint16_t *x = (const uint16_t *)arguments[0];
    const int64_t tokens = arguments[1], columns = arguments[2];
    uint16_t *to = (uint16_t *)arguments[3] + begin * columns * 32;
    for (int64_t first = 32 * begin; first < 32 * end; first += 32)
        for (int64_t step = 0; step < columns / STEP; step++)
            for (int64_t row = 0; row < 32; row++, to += STEP)
                if (first + row < tokens) memcpy(to, x + (first + row) * columns + step * STEP, 2 * STEP);
                else memset(to, 0, 2 * STEP);
}

/* What one of several threads does of a call: `number` and `threads` are OpenMP's, which this library does not link. */
typedef struct {
    void (*work)(const int64_t *arguments, int64_t begin, int64_t end);
    int (*number)(void), (*threads)(void);
    int64_t count;
    const int64_t *arguments;
} Call;

void part(void *call) {
    const Call *c = call;
    const int64_t number = c->number(), threads = c->threads();
    c->work(c->arguments, c->count * number / threads, c->count * (number + 1) / threads);
}

/* Panels begin .. end-1 of y (tokens x rows), `together` panels at a time. */
void multiply(const int64_t *arguments, int64_t begin, int64_t end) {
    const uint16_t *x = (const uint16_t *)arguments[0];
    const int64_t tokens = arguments[1], columns = arguments[2], group = arguments[6], rows = arguments[7];
    const uint32_t *codes = (const uint32_t *)arguments[3];
    const float *scale = (const float *)arguments[4];
    const uint8_t *zero = (const uint8_t *)arguments[5];
    uint16_t *y = (uint16_t *)arguments[8];
    const int64_t together = arguments[9], groups = columns / group;
    uint16_t *scratch = aligned_alloc(64, 64 * together * columns); /* 32 rows of 2 bytes */
    configure();
    for (int64_t panel = begin; panel < end; panel += together) {
        const int64_t stop = panel + together < end ? panel + together : end;
        for (int64_t p = panel; p < stop; p++)
            decode(codes + p * columns * 4, scale + p * groups * 32, zero + p * groups * 32,
                   scratch + (p - panel) * columns * 32, columns, group);
        for (int64_t first = 0; first < tokens; first += 32)
            for (int64_t p = panel; p < stop; p++)
                block(x + first * columns, scratch + (p - panel) * columns * 32, columns, y + first * rows + p * 32, rows,
                      tokens - first < 32 ? tokens - first : 32, rows - 32 * p > 16 ? 2 : 1);
    }
    _tile_release();
    free(scratch);
}
