/* Products by 4-bit codes on CPUs, in the order of codes that amx.c has too.

   few      y = x V^T for some tokens: sums of codes times x, in whole numbers, group by group, then scaled
   floats   rows of V as bfloat16, rounded as the reference rounds them, for torch to multiply many tokens by

   Whole numbers: x of a group is a power of two times numbers of 16 bits, in two bytes each, which four codes at a time
   are multiplied by. An x above 1/128 of its group's largest is exact, any other off by at most 2^-15 of that.

   Compiled at first use by the machine's own C compiler, for the widest vectors it has (native/__init__.py).

   Layouts (columns a multiple of 32, groups too):
     codes  [panel][column / 8][32 rows]       a word holds 8 neighbouring columns of one row, the first in its low bits
     scale  [panel][group][32 rows] float, zero likewise in bytes */
#include <stdint.h>
#include <stdlib.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "call.h"

#define INLINE static inline __attribute__((always_inline))
#define ROWS 32                 /* of a panel */
#define HALF 16
#define AHEAD 2048              /* bytes before they are wanted, codes are called into the cache */
#ifdef __AVX512F__
#define LANES 16
#define TOGETHER 4              /* panels times tokens whose sums stay in registers */
#elif defined(__AVX2__)
#define LANES 8
#define TOGETHER 2
#else
#define LANES 4
#define TOGETHER 1
#endif
#define PARTS (ROWS / LANES)

typedef int32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES), aligned(2)));
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1)));
typedef float Floats8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t Words8 __attribute__((vector_size(32), aligned(4)));
typedef uint16_t Halves8 __attribute__((vector_size(16), aligned(2)));

typedef struct {
    const int32_t *x;           /* [tokens][column / 8][4]: columns 0 2 4 6 of 8, their low bytes and their high, then 1 3 5 7 */
    const float *steps, *sums;  /* [tokens][group]: the power of two, and the sum of the whole numbers */
    const int32_t *codes;
    const float *scale;
    const uint8_t *zero;
    uint16_t *y;
    int64_t tokens, columns, group, rows;
} Few;

/* sum + the products of four bytes without sign and four with, one of the two being codes. */
INLINE Words dot(Words sum, Words bytes, Words with_sign) {
#if defined(__AVX512VNNI__)
    return (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)with_sign);
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)bytes, (__m512i)with_sign);
    return sum + (Words)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)bytes, (__m256i)with_sign);
    return sum + (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    const Words field = (Words){0} + 0x00ff00ff;
    const Shorts even = (Shorts)(bytes & field) * ((Shorts)(with_sign << 8) >> 8);
    const Shorts odd = (Shorts)(bytes >> 8 & field) * ((Shorts)with_sign >> 8);
    const Words pairs = (Words)(even + odd);
    return sum + (pairs << 16 >> 16) + (pairs >> 16);
#endif
}

INLINE Words all(int32_t word) { return word - (Words){0}; }

INLINE float from_bits(uint32_t bits) {
    const union { uint32_t bits; float value; } same = {bits};
    return same.value;
}

/* bfloat16 rounded to nearest, ties to even; of NaN, the one kind that `split` makes. */
#define ROUNDED(bits) (((bits) + 0x7fff + ((bits) >> 16 & 1)) >> 16)

/* The power of two that makes whole numbers below 2^15 of a group's x. */
static float step_of(const uint16_t *x, int64_t group) {
    enum { EXPONENT = 0x7f80, LEAST = 15 << 7 };
    int32_t most = LEAST;
    for (int64_t i = 0; i < group; i++) most = (x[i] & EXPONENT) > most ? x[i] & EXPONENT : most;
    return from_bits(most == EXPONENT ? 0x7fc00000 : (uint32_t)(most - (14 << 7)) << 16);
}

static void split(const uint16_t *x, const Few *f, int32_t *to, float *steps, float *sums) {
    const float whole = 1.5f * (1 << 23);               /* added to a number, its last bit is worth one */
    for (int64_t token = 0; token < f->tokens; token++)
        for (int64_t first = 0; first < f->columns; first += f->group) {
            const float step = *steps++ = step_of(x, f->group), back = step == step ? 1 / step : 0;
            uint32_t sum = 0;
            for (int64_t i = 0; i < f->group; i += 8, x += 8, to += 4)
                for (int j = 0; j < 8; j++) {
                    const union { float value; uint32_t bits; } moved = {from_bits((uint32_t)x[j] << 16) * back + whole};
                    const uint32_t number = moved.bits - 0x4b400000;
                    uint8_t *bytes = (uint8_t *)(to + j % 2 * 2);
                    sum += number;
                    bytes[j / 2] = number, bytes[4 + j / 2] = number >> 8;
                }
            *sums++ = (int32_t)sum;
        }
}

/* Some panels by some tokens: several of either, so that codes come in several streams and x is fetched less often. */
INLINE void block(const Few *f, int64_t panel, int64_t token, const int panels, const int tokens) {
    const int64_t groups = f->columns / f->group, words = f->columns / 8 * ROWS, width = f->columns / 2;
    const int32_t *codes = f->codes + panel * words, *x = f->x + token * width;
    Floats total[TOGETHER][PARTS] = {0};
    for (int64_t group = 0; group < groups; group++) {
        Words low[TOGETHER][PARTS] = {0}, high[TOGETHER][PARTS] = {0};
        for (int64_t column = 0; column < f->group; column += 8, codes += ROWS, x += 4)
#pragma GCC unroll 8
            for (int at = 0; at < panels * PARTS; at++) {
                const int32_t *from = codes + at / PARTS * words + at % PARTS * LANES;
                if (at % (PARTS / 2) == 0) __builtin_prefetch((const char *)from + AHEAD);
                const Words both = *(const Words *)from, even = both & 0x0f0f0f0f, odd = both >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) {
                    Words *l = &low[at / PARTS * tokens + t][at % PARTS], *h = &high[at / PARTS * tokens + t][at % PARTS];
                    *l = dot(dot(*l, all(x[t * width]), even), all(x[t * width + 2]), odd);
                    *h = dot(dot(*h, even, all(x[t * width + 1])), odd, all(x[t * width + 3]));
                }
            }
        for (int at = 0; at < panels * PARTS; at++) {
            const int64_t field = ((panel + at / PARTS) * groups + group) * ROWS + at % PARTS * LANES;
            const Floats scale = *(const Floats *)(f->scale + field);
            const Floats zero = __builtin_convertvector(*(const Bytes *)(f->zero + field), Floats);
            for (int t = 0; t < tokens; t++) {
                const int64_t of = (token + t) * groups + group, sum = at / PARTS * tokens + t, part = at % PARTS;
                const Floats bytes = __builtin_convertvector(low[sum][part], Floats);
                const Floats both = __builtin_convertvector(high[sum][part], Floats) * 256 + bytes;
                total[sum][part] += (both - zero * f->sums[of]) * (scale * f->steps[of]);
            }
        }
    }
    for (int at = 0; at < panels * PARTS; at++)
        for (int t = 0; t < tokens; t++) {
            const int64_t row = (panel + at / PARTS) * ROWS + at % PARTS * LANES;
            const Unsigned bits = (Unsigned)total[at / PARTS * tokens + t][at % PARTS];
            if (row < f->rows)
                *(Halves *)(f->y + (token + t) * f->rows + row) = __builtin_convertvector(ROUNDED(bits), Halves);
        }
}

/* Panels begin .. end-1 of y (tokens x rows). */
void few(const int64_t *arguments, int64_t begin, int64_t end) {
    Few f = {.codes = (const int32_t *)arguments[3], .scale = (const float *)arguments[4],
             .zero = (const uint8_t *)arguments[5], .y = (uint16_t *)arguments[8], .tokens = arguments[1],
             .columns = arguments[2], .group = arguments[6], .rows = arguments[7]};
    const int64_t numbers = f.tokens * f.columns / 2, groups = f.tokens * f.columns / f.group;
    int32_t *x = malloc(sizeof(int32_t) * (numbers + 2 * groups));
    float *steps = (float *)(x + numbers), *sums = steps + groups;
    f.x = x, f.steps = steps, f.sums = sums;
    split((const uint16_t *)arguments[0], &f, x, steps, sums);
    for (int64_t panel = begin; panel < end; panel += TOGETHER) {      /* in the cache, for all tokens */
        const int64_t stop = panel + TOGETHER < end ? panel + TOGETHER : end;
        int64_t token = 0;
#define TAKE(PANELS, TOKENS)                                                                                       \
    for (; f.tokens - token >= TOKENS; token += TOKENS) {                                                          \
        int64_t at = panel;                                                                                        \
        for (; at + PANELS <= stop; at += PANELS) block(&f, at, token, PANELS, TOKENS);                            \
        for (; at < stop; at++) block(&f, at, token, 1, TOKENS);                                                   \
    }
#if TOGETHER == 4
        TAKE(1, 4)
        TAKE(2, 2)
#endif
        TAKE(TOGETHER, 1)
    }
    free(x);
}

#ifdef __AVX512BW__
/* Half a panel's group: a row has 16 values there, which its codes look up, 32 at a time. */
static void group_of(const int32_t *codes, const float *scale, const uint8_t *zero, int64_t width, int64_t columns,
                     uint16_t *to) {
    const Floats fields = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i mask = _mm512_set1_epi32(0x000f000f);
    Halves values[LANES];
    for (int row = 0; row < LANES; row++) {
        const Unsigned bits = (Unsigned)((fields - (float)zero[row]) * scale[row]);
        values[row] = __builtin_convertvector(ROUNDED(bits), Halves);
    }
    for (int64_t column = 0; column < width; column += 32, codes += 4 * ROWS, to += 32) {
        __m512i words[4], pairs[4];
        uint8_t bytes[4][4][16] __attribute__((aligned(64)));          /* rows 0 4 8 12, then 1 5 9 13, ... */
        for (int i = 0; i < 4; i++) words[i] = _mm512_loadu_si512(codes + i * ROWS);
        for (int i = 0; i < 2; i++) {
            pairs[i] = _mm512_unpacklo_epi32(words[2 * i], words[2 * i + 1]);
            pairs[2 + i] = _mm512_unpackhi_epi32(words[2 * i], words[2 * i + 1]);
        }
        for (int i = 0; i < 2; i++) {
            _mm512_store_si512(bytes[2 * i], _mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]));
            _mm512_store_si512(bytes[2 * i + 1], _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
        }
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) {
            const __m512i byte = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *)bytes[row % 4][row / 4]));
            const __m512i code = _mm512_and_si512(_mm512_or_si512(byte, _mm512_slli_epi32(byte, 12)), mask);
            const __m512i table = _mm512_castsi256_si512((__m256i)values[row]);
            _mm512_storeu_si512(to + row * columns, _mm512_permutexvar_epi16(code, table));
        }
    }
}
#else
static void group_of(const int32_t *codes, const float *scale, const uint8_t *zero, int64_t width, int64_t columns,
                     uint16_t *to) {
    for (int row = 0; row < HALF; row++, to += columns - width)
        for (int64_t column = 0; column < width; column += 8, to += 8) {
            const uint32_t word = codes[column / 8 * ROWS + row];
            const Words8 fields = (word - (Words8){0}) >> (Words8){0, 4, 8, 12, 16, 20, 24, 28} & 15;
            const Words8 bits = (Words8)((__builtin_convertvector((Ints8)fields, Floats8) - (float)zero[row]) * scale[row]);
            *(Halves8 *)to = __builtin_convertvector(ROUNDED(bits), Halves8);
        }
}
#endif

/* Panels begin .. end-1 of V as rows of bfloat16. */
void floats(const int64_t *arguments, int64_t begin, int64_t end) {
    const int32_t *codes = (const int32_t *)arguments[0];
    const float *scale = (const float *)arguments[1];
    const uint8_t *zero = (const uint8_t *)arguments[2];
    const int64_t columns = arguments[3], group = arguments[4], groups = columns / group;
    uint16_t *to = (uint16_t *)arguments[5];
    for (int64_t panel = begin; panel < end; panel++)
        for (int half = 0; half < ROWS; half += HALF)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t field = (panel * groups + g) * ROWS + half;
                group_of(codes + (panel * columns + g * group) / 8 * ROWS + half, scale + field, zero + field, group,
                         columns, to + (panel * ROWS + half) * columns + g * group);
            }
}
