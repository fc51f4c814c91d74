/* Products on CPUs that multiply tiles of bfloat16 into float32 (AMX), which torch has no operators for.

   multiply   y = x V^T, V = (code - zero) * scale of 4-bit codes, rounded to bfloat16 as the reference rounds it
   few        the same for up to 32 tokens, V never rounded: sums of codes times x, group by group, then scaled

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

#include "call.h"

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

static void configure(void) { /* static: gcc believes that only the first bytes are read, and may leave others unwritten */
    static const Shape shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

/* What `few` knows of a call. x: [column / 32][tokens][32]; sums: [tokens][group], of x. */
typedef struct {
    const uint16_t *x;
    const float *sums;
    const uint32_t *codes;
    const float *scale;
    const uint8_t *zero;
    uint16_t *y;
    int64_t tokens, columns, group, rows;
} Few;

#define AHEAD 2048              /* bytes before they are wanted, codes are called into the cache */

/* x so that its pairs meet those of `integers`: columns 0 and 4 of a word, 1 and 5, 2 and 6, 3 and 7. */
static void lay_out_few(const uint16_t *x, int64_t tokens, int64_t columns, int64_t group, uint16_t *to, float *sums) {
    for (int64_t token = 0; token < tokens; token++, x += columns)
        for (int64_t first = 0; first < columns; first += group) {
            __m256 sum = _mm256_setzero_ps();
            for (int64_t column = first; column < first + group; column += 8) {
                const __m128i eight = _mm_loadu_si128((const __m128i *)(x + column));
                uint16_t *at = to + (column / STEP * tokens + token) * STEP + column % STEP;
                _mm_storeu_si128((__m128i *)at, _mm_unpacklo_epi16(eight, _mm_srli_si128(eight, 8)));
                sum = _mm256_add_ps(sum, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16)));
            }
            const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            *sums++ = _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
        }
}

/* 32 columns of half a panel as 16 + code, exactly: a bfloat16 of that size has three bits behind its point, so a code
   moved to bits 3 to 6 and 16's own bits are one. Four rows of a tile are made of each 16 words. */
static inline __attribute__((always_inline)) void integers(const uint32_t *codes, int64_t ahead, uint16_t *to) {
    const __m512i field = _mm512_set1_epi32(0x00780078), sixteen = _mm512_set1_epi32(0x41804180);
    for (int word = 0; word < 4; word++, codes += 32, to += 4 * STEP) {
        _mm_prefetch((const char *)codes + ahead, _MM_HINT_T0);
        const __m512i words = _mm512_loadu_si512(codes);
#define ROW(i, moved) _mm512_store_si512(to + i * STEP, _mm512_ternarylogic_epi32(moved, field, sixteen, 0xEA))
        ROW(0, _mm512_slli_epi32(words, 3));
        ROW(1, _mm512_srli_epi32(words, 1));
        ROW(2, _mm512_srli_epi32(words, 5));
        ROW(3, _mm512_srli_epi32(words, 9));
    }
}

/* What one step of 32 columns makes (`to`, or NULL) and multiplies (`v`, made a step before, or NULL): of two panels or
   one with up to 16 tokens, of one panel with up to 32. Making and multiplying take turns half by half, so that a core
   that shares its buffers with another thread can still do both at once. */
static inline __attribute__((always_inline)) void step_of(const uint16_t *x, const uint16_t *v, const uint32_t *codes,
                                                          int64_t words, int64_t ahead, uint16_t *to, const int panels,
                                                          const int blocks) {
    if (v) _tile_loadd(4, x, 64);
    if (v && blocks == 2) _tile_loadd(5, x + TILE, 64);
    if (to) integers(codes, ahead, to);
    if (v && blocks == 1) { _tile_loadd(5, v, 64); _tile_dpbf16ps(0, 4, 5); }
    if (v && blocks == 2) { _tile_loadd(6, v, 64); _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6); }
    if (to) integers(codes + 16, ahead, to + TILE);
    if (v && blocks == 1) { _tile_loadd(6, v + TILE, 64); _tile_dpbf16ps(1, 4, 6); }
    if (v && blocks == 2) { _tile_loadd(7, v + TILE, 64); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7); }
    if (panels == 1) return;
    if (to) integers(codes + words, ahead, to + 2 * TILE);
    if (v) { _tile_loadd(7, v + 2 * TILE, 64); _tile_dpbf16ps(2, 4, 7); }
    if (to) integers(codes + words + 16, ahead, to + 3 * TILE);
    if (v) { _tile_loadd(5, v + 3 * TILE, 64); _tile_dpbf16ps(3, 4, 5); }
}

/* The sums of a group leave the tiles, and are scaled: totals += (sum - (16 + zero) * sum of x) * scale. */
static inline __attribute__((always_inline)) void end_group(const Few *f, int64_t panel, int64_t at, float *totals,
                                                            const int panels, const int blocks) {
    float sums[64 * 16] __attribute__((aligned(64)));
    const int64_t groups = f->columns / f->group;
    _tile_stored(0, sums, 64); _tile_stored(1, sums + 256, 64);
    _tile_zero(0); _tile_zero(1);
    if (panels + blocks > 2) {
        _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64);
        _tile_zero(2); _tile_zero(3);
    }
    for (int tile = 0; tile < 2 * panels * blocks; tile++) {
        const int64_t token = blocks == 2 ? tile / 2 * 16 : 0, of = panels == 2 ? panel + tile / 2 : panel;
        const int64_t field = ((of * groups + at) * 2 + tile % 2) * 16, tokens = least(f->tokens - token, 16);
        const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(f->zero + field)));
        const __m512 scale = _mm512_loadu_ps(f->scale + field), away = _mm512_cvtepi32_ps(zero) + 16;
        for (int64_t t = 0; t < tokens; t++) {
            float *total = totals + tile * 256 + t * 16;
            const __m512 x = _mm512_set1_ps(f->sums[(token + t) * groups + at]);
            const __m512 sum = _mm512_fnmadd_ps(away, x, _mm512_load_ps(sums + tile * 256 + t * 16));
            _mm512_store_ps(total, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(total)));
        }
    }
}

/* Weights are made a step before they are multiplied, so that tiles never wait for stores. */
static inline __attribute__((always_inline)) void few_panels(const Few *f, int64_t panel, const int panels,
                                                             const int blocks) {
    uint16_t made[2][2 * 2 * TILE] __attribute__((aligned(64)));
    float totals[64 * 16] __attribute__((aligned(64))) = {0};
    const int64_t steps = f->columns / STEP, words = f->columns * 4, per_group = f->group / STEP;
    const uint32_t *codes = f->codes + panel * words;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    step_of(NULL, NULL, codes, words, AHEAD, made[0], panels, blocks);
    for (int64_t step = 1, in_group = 0, at = 0; step <= steps; step++) {
        const int64_t ahead = AHEAD + (step * 512 + AHEAD < words * 4 ? 0 : (panels - 1) * words * 4);
        const uint16_t *x = f->x + (step - 1) * f->tokens * STEP, *v = made[step - 1 & 1];
        if (step < steps) step_of(x, v, codes + step * 128, words, ahead, made[step & 1], panels, blocks);
        else step_of(x, v, NULL, 0, 0, NULL, panels, blocks);
        if (++in_group < per_group) continue;
        end_group(f, panel, at++, totals, panels, blocks);
        in_group = 0;
    }
    for (int tile = 0; tile < 2 * panels * blocks; tile++) {
        const int64_t token = blocks == 2 ? tile / 2 * 16 : 0, of = panels == 2 ? panel + tile / 2 : panel;
        const int64_t row = 32 * of + 16 * (tile % 2), tokens = least(f->tokens - token, 16);
        if (row < f->rows) store(totals + tile * 256, f->y + token * f->rows + row, tokens, f->rows);
    }
}

/* Panels begin .. end-1 of y (tokens x rows), up to 32 tokens. */
void few(const int64_t *arguments, int64_t begin, int64_t end) {
    Few f = {.codes = (const uint32_t *)arguments[3], .scale = (const float *)arguments[4],
             .zero = (const uint8_t *)arguments[5], .y = (uint16_t *)arguments[8], .tokens = arguments[1],
             .columns = arguments[2], .group = arguments[6], .rows = arguments[7]};
    /* A tile is read as if it had all its rows. */
    uint16_t *x = aligned_alloc(64, 2 * STEP * (f.columns / STEP * f.tokens + 32));
    float *sums = aligned_alloc(64, 64 * (f.columns / f.group * f.tokens / 16 + 1));
    lay_out_few((const uint16_t *)arguments[0], f.tokens, f.columns, f.group, x, sums);
    f.x = x, f.sums = sums;
    Shape shape = {.palette = 1};
    const int64_t first = least(f.tokens, 16), second = f.tokens > 16 ? f.tokens - 16 : first;
    const uint8_t rows[8] = {first, first, second, second, first, f.tokens > 16 ? second : 16, 16, 16};
    memcpy(shape.rows, rows, sizeof rows);
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64;
    _tile_loadconfig(&shape);
    int64_t panel = begin;
    if (f.tokens > 16)
        for (; panel < end; panel++) few_panels(&f, panel, 1, 2);
    for (; panel + 1 < end; panel += 2) few_panels(&f, panel, 2, 1);
    if (panel < end) few_panels(&f, panel, 1, 1);
    _tile_release();
    free(x);
    free(sums);
}
