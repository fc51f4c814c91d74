/* Products on CPUs that multiply tiles of bfloat16 into float32 (AMX), which torch has no operators for.

   multiply     y = x V^T, V = (code - zero) * scale of 4-bit codes, rounded to bfloat16 as the reference rounds it
   accumulate   sum += a^T b in float32, of bfloat16 a and b: every product is exact

   Compiled at first use by the machine's own C compiler (native/__init__.py). A tile is 16 rows of 32 bfloat16, or 16
   pairs of rows of 16. A panel is 32 rows of V, or 32 columns of a or b.

   Layouts (columns a multiple of 32, groups too):
     codes  [panel][column / 8][half][16]      a word holds 8 neighbouring columns of one row, the first in its low bits
     scale  [panel][group][half][16] float, zero likewise in bytes
     x      [32 rows][column / 32][half][16][32], zeros behind the last row
     pairs  [panel][token / 32][half][16 pairs of tokens][16 columns][2], zeros behind the last column */
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

/* Panels begin .. end-1 of a (tokens x columns, tokens a multiple of 32) as pairs. */
void pair_up(const int64_t *arguments, int64_t begin, int64_t end) {
    const uint16_t *a = (const uint16_t *)arguments[0];
    const int64_t tokens = arguments[1], columns = arguments[2];
    uint16_t *to = (uint16_t *)arguments[3] + begin * tokens * 32;
    for (int64_t panel = begin; panel < end; panel++)
        for (int64_t token = 0; token < tokens; token += 32)
            for (int64_t column = 32 * panel; column < 32 * panel + 32; column += 16)
                for (int64_t pair = 0; pair < 16; pair++, to += 32) {
                    const int64_t wanted = columns - column;
                    const __mmask16 mask = wanted >= 16 ? 0xffff : wanted > 0 ? (1 << wanted) - 1 : 0;
                    const uint16_t *from = a + (token + 2 * pair) * columns + column;
                    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
                    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + columns));
                    _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
                }
}

/* Rows of a tile of pairs as columns (a gather for each column takes twice as long). */
static void turn(const uint16_t *pairs, uint16_t *to) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(pairs + 32 * i);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) { /* r[i + j]: columns j, 4 + j, 8 + j, 12 + j of rows i .. i + 3 */
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_si512(to + 32 * j, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(to + 32 * (4 + j), _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(to + 32 * (8 + j), _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(to + 32 * (12 + j), _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}

#define SPAN 16 /* steps of tokens at a time: two panels of them fit a core's nearest cache */

/* Rows 32 begin .. of sum (ca x cb, `ld` apart; both multiples of 16), of pairs of a and of b. */
void accumulate(const int64_t *arguments, int64_t begin, int64_t end) {
    const uint16_t *a = (const uint16_t *)arguments[0], *b = (const uint16_t *)arguments[1];
    const int64_t tokens = arguments[2], ca = arguments[3], cb = arguments[4], ld = arguments[6];
    float *sum = (float *)arguments[5];
    uint16_t turned[SPAN * 2 * TILE] __attribute__((aligned(64)));
    const int64_t steps = tokens / STEP, size = steps * 2 * TILE;
    configure();
    for (int64_t first = 0; first < steps; first += SPAN) {
        const int64_t count = steps - first < SPAN ? steps - first : SPAN;
        for (int64_t row = begin; row < end; row++) {
            const int lower = ca - 32 * row > 16;
            for (int64_t tile = 0; tile < 2 * count; tile++) turn(a + row * size + (2 * first + tile) * TILE, turned + tile * TILE);
            for (int64_t panel = 0; 32 * panel < cb; panel++) {
                const int right = cb - 32 * panel > 16;
                float *to = sum + 32 * row * ld + 32 * panel;
                const uint16_t *x = turned, *v = b + panel * size + 2 * first * TILE;
                _tile_loadd(0, to, 4 * ld);
                if (right) _tile_loadd(1, to + 16, 4 * ld);
                if (lower) _tile_loadd(2, to + 16 * ld, 4 * ld);
                if (right && lower) _tile_loadd(3, to + 16 * ld + 16, 4 * ld);
                for (int64_t step = 0; step < count; step++, x += 2 * TILE, v += 2 * TILE) {
                    _tile_loadd(4, x, 64); _tile_loadd(6, v, 64); _tile_loadd(7, v + TILE, 64); _tile_loadd(5, x + TILE, 64);
                    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, to, 4 * ld);
                if (right) _tile_stored(1, to + 16, 4 * ld);
                if (lower) _tile_stored(2, to + 16 * ld, 4 * ld);
                if (right && lower) _tile_stored(3, to + 16 * ld + 16, 4 * ld);
            }
        }
    }
    _tile_release();
}
