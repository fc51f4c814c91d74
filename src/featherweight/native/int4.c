/* Products by 4-bit codes on CPUs without a matrix unit, in the order of codes that amx.c has too.

   few      y = x V^T for some tokens: sums of codes times x in float32, group by group, then scaled
   floats   rows of V as bfloat16, rounded as the reference rounds them, for torch to multiply many tokens by

   Compiled at first use by the machine's own C compiler, for the widest vectors it has (native/__init__.py).

   Layouts (columns a multiple of 32, groups too):
     codes  [panel][column / 8][half][16]      a word holds 8 neighbouring columns of one row, the first in its low bits
     scale  [panel][group][half][16] float, zero likewise in bytes */
#include <stdint.h>
#include <stdlib.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "call.h"

#define INLINE static inline __attribute__((always_inline))
#define LANES 16                /* rows of half a panel */
#define AHEAD 2048              /* bytes before they are wanted, codes are called into the cache */

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Words __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Unsigned __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1)));
typedef float Floats8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t Words8 __attribute__((vector_size(32), aligned(4)));
typedef uint16_t Halves8 __attribute__((vector_size(16), aligned(2)));

typedef struct {
    const float *x, *sums;      /* [tokens][columns] and, of x, [tokens][group] */
    const int32_t *codes;
    const float *scale;
    const uint8_t *zero;
    uint16_t *y;
    int64_t tokens, columns, group, rows;
} Few;

/* The codes in the fields that begin at bit 4 i of 16 words. */
INLINE Floats codes_of(Words words, int i) {
#ifdef __AVX512F__
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, 4 * i), table);
#else
    return __builtin_convertvector(words >> 4 * i & 15, Floats);
#endif
}

/* bfloat16 rounded to nearest, ties to even; no NaN comes here. */
#define ROUNDED(bits) (((bits) + 0x7fff + ((bits) >> 16 & 1)) >> 16)

static void widen(const uint16_t *x, const Few *f, float *to, float *sums) {
    for (int64_t token = 0; token < f->tokens; token++)
        for (int64_t first = 0; first < f->columns; first += f->group) {
            Floats8 sum = {0};
            for (int64_t column = first; column < first + f->group; column += 8, x += 8, to += 8) {
                const Words8 bits = __builtin_convertvector(*(const Halves8 *)x, Words8) << 16;
                *(Floats8 *)to = (Floats8)bits;
                sum += (Floats8)bits;
            }
            *sums++ = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
        }
}

/* Both halves of a panel by `tokens` tokens from `token` on. With one token, columns take turns in four sums. */
INLINE void panel_of(const Few *f, int64_t panel, int64_t token, const int tokens) {
    enum { HALVES = 2, SUMS = 4 };
    const int64_t groups = f->columns / f->group;
    const int32_t *codes = f->codes + panel * f->columns * 4;
    const float *x = f->x + token * f->columns, *sums = f->sums + token * groups;
    const int turns = SUMS / tokens;
    Floats total[HALVES][SUMS] = {0};
    for (int64_t group = 0; group < groups; group++) {
        Floats sum[HALVES][SUMS] = {0};
        for (int64_t column = group * f->group; column < (group + 1) * f->group; column += 8, codes += HALVES * LANES)
            for (int half = 0; half < HALVES; half++) {
                __builtin_prefetch((const char *)(codes + half * LANES) + AHEAD);
                const Words words = *(const Words *)(codes + half * LANES);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    const Floats code = codes_of(words, i);
#pragma GCC unroll 4
                    for (int t = 0; t < tokens; t++)
                        sum[half][t * turns + i % turns] += code * x[t * f->columns + column + i];
                }
            }
        for (int half = 0; half < HALVES; half++) {
            const int64_t at = ((panel * groups + group) * 2 + half) * LANES;
            const Floats scale = *(const Floats *)(f->scale + at);
            const Floats zero = __builtin_convertvector(*(const Bytes *)(f->zero + at), Floats);
            for (int t = 0; t < tokens; t++) {
                Floats all = sum[half][t * turns];
                for (int turn = 1; turn < turns; turn++) all += sum[half][t * turns + turn];
                total[half][t] += (all - zero * sums[t * groups + group]) * scale;
            }
        }
    }
    for (int half = 0; half < HALVES && panel * 32 + half * LANES < f->rows; half++)
        for (int t = 0; t < tokens; t++) {
            const Unsigned bits = (Unsigned)total[half][t];
            uint16_t *y = f->y + (token + t) * f->rows + panel * 32 + half * LANES;
            *(Halves *)y = __builtin_convertvector(ROUNDED(bits), Halves);
        }
}

/* Panels begin .. end-1 of y (tokens x rows). */
void few(const int64_t *arguments, int64_t begin, int64_t end) {
    Few f = {.codes = (const int32_t *)arguments[3], .scale = (const float *)arguments[4],
             .zero = (const uint8_t *)arguments[5], .y = (uint16_t *)arguments[8], .tokens = arguments[1],
             .columns = arguments[2], .group = arguments[6], .rows = arguments[7]};
    float *x = malloc(sizeof(float) * f.tokens * (f.columns + f.columns / f.group));
    f.x = x, f.sums = x + f.tokens * f.columns;
    widen((const uint16_t *)arguments[0], &f, x, x + f.tokens * f.columns);
    for (int64_t panel = begin; panel < end; panel++)
        for (int64_t token = 0; token < f.tokens;) {
            const int64_t left = f.tokens - token;
            if (left >= 4) panel_of(&f, panel, token, 4), token += 4;
            else if (left >= 2) panel_of(&f, panel, token, 2), token += 2;
            else panel_of(&f, panel, token, 1), token += 1;
        }
    free(x);
}

/* Panels begin .. end-1 of V as rows of bfloat16. */
void floats(const int64_t *arguments, int64_t begin, int64_t end) {
    const int32_t *codes = (const int32_t *)arguments[0];
    const float *scale = (const float *)arguments[1];
    const uint8_t *zero = (const uint8_t *)arguments[2];
    const int64_t columns = arguments[3], group = arguments[4], groups = columns / group;
    uint16_t *to = (uint16_t *)arguments[5];
    for (int64_t row = begin * 32; row < end * 32; row++) {
        const int64_t panel = row / 32, lane = row % 32;
        for (int64_t g = 0; g < groups; g++) {
            const float step = scale[(panel * groups + g) * 32 + lane];
            const float away = zero[(panel * groups + g) * 32 + lane];
            for (int64_t column = g * group; column < (g + 1) * group; column += 8) {
                const uint32_t word = codes[(panel * columns / 8 + column / 8) * 32 + lane];
                const Words8 fields = (word - (Words8){0}) >> (Words8){0, 4, 8, 12, 16, 20, 24, 28} & 15;
                const Words8 bits = (Words8)((__builtin_convertvector((Ints8)fields, Floats8) - away) * step);
                *(Halves8 *)to = __builtin_convertvector(ROUNDED(bits), Halves8);
                to += 8;
            }
        }
    }
}
