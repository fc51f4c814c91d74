/* Causal attention in bfloat16 on CPUs with vectors of it (AVX512_BF16): scores and sums in float32, weights rounded to
   bfloat16 before they multiply values, as torch's own operator has it; keys that a query does not see are not multiplied.

   Shapes: S sequences, H heads of queries, K of keys and values (H / K queries share one), T tokens, D width (a multiple of 32).
   Pairs are those of vectors.h. */
#include <math.h>
#include <stdlib.h>

#include "call.h"
#include "vectors.h"

#define ROWS 8   /* queries at a time */
#define KEYS 32  /* keys at a time: two vectors of sums a query */

typedef struct {
    const uint16_t *at;
    int64_t sequence, head, token;  /* strides; a token's numbers are side by side */
} Heads;

/* e^x for x <= 0, to two units in the last place, next to 0 below -87; what is no number stays none. */
static inline __m512 exponential(__m512 x) {
    const __m512 turns = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-87.3f), x), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(turns, 0), rest = _mm512_sub_ps(turns, whole);
    __m512 sum = _mm512_set1_ps(1.5353362e-4f);
    const float terms[6] = {1.3398874e-3f, 9.6184373e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.0f};
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(sum, whole);
}

/* Keys as [KEYS of them][pair of the width][key], values as [pair of keys][width]; zeros behind the last token. */
static void lay_out(const uint16_t *k, int64_t k_token, const uint16_t *v, int64_t v_token, int64_t T, int64_t D, uint32_t *keys,
                    uint32_t *values) {
    const int64_t padded = (T + KEYS - 1) / KEYS * KEYS;
    for (int64_t t = 0; t < padded; t++)
        for (int64_t pair = 0; pair < D / 2; pair++) {
            uint32_t both = 0;
            if (t < T) memcpy(&both, k + t * k_token + 2 * pair, 4);
            keys[(t / KEYS * (D / 2) + pair) * KEYS + t % KEYS] = both;
        }
    for (int64_t t = 0; t < padded; t += 2)
        for (int64_t d = 0; d < D; d++) {
            const uint32_t one = t < T ? v[t * v_token + d] : 0, two = t + 1 < T ? v[(t + 1) * v_token + d] : 0;
            values[t / 2 * D + d] = one | two << 16;
        }
}

/* Sums of `pairs` pairs: those of ROWS rows, one after the other, times those of 32 columns, `apart` further each time. */
static inline void products(const uint16_t *const *rows, const uint32_t *columns, int64_t apart, int64_t pairs, __m512 *low,
                            __m512 *high) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++, columns += apart) {
        const __m512bh one = (__m512bh)_mm512_load_si512(columns), two = (__m512bh)_mm512_load_si512(columns + 16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512bh both = pair_at(rows[r] + 2 * pair);
            low[r] = _mm512_dpbf16_ps(low[r], both, one), high[r] = _mm512_dpbf16_ps(high[r], both, two);
        }
    }
}

/* Scores of the queries q with KEYS keys. */
static void score(const uint16_t *const *q, const uint32_t *keys, int64_t D, __m512 scale, float *to, int64_t apart) {
    __m512 low[ROWS], high[ROWS];
    products(q, keys, KEYS, D / 2, low, high);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        _mm512_store_ps(to + r * apart, _mm512_mul_ps(low[r], scale));
        _mm512_store_ps(to + r * apart + 16, _mm512_mul_ps(high[r], scale));
    }
}

/* The first `seen` of `padded` scores as weights; what they have to be divided by. */
static inline float weigh(float *scores, int64_t seen, int64_t padded, uint16_t *weights) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < padded; at += 16) {
        const __mmask16 in = seen - at >= 16 ? 0xffff : seen > at ? (1u << (seen - at)) - 1 : 0;
        const __m512 these = _mm512_mask_load_ps(_mm512_set1_ps(-INFINITY), in, scores + at);
        _mm512_store_ps(scores + at, these);
        most = _mm512_max_ps(most, these);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t at = 0; at < padded; at += 16) {
        const __mmask16 in = seen - at >= 16 ? 0xffff : seen > at ? (1u << (seen - at)) - 1 : 0;
        const __m512 each = _mm512_maskz_mov_ps(in, exponential(_mm512_sub_ps(_mm512_load_ps(scores + at), top)));
        sum = _mm512_add_ps(sum, each);
        _mm256_store_si256((__m256i *)(weights + at), (__m256i)_mm512_cvtneps_pbh(each));
    }
    return _mm512_reduce_add_ps(sum);
}

/* 32 of the width, from d on, of the answers of `rows` queries. */
static void answer(const uint16_t *const *weights, int64_t pairs, const uint32_t *values, int64_t D, int64_t d, const float *sums,
                   uint16_t *const *to, int rows) {
    __m512 low[ROWS], high[ROWS];
    products(weights, values + d, D, pairs, low, high);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        if (r == rows) break;
        const __m512 by = _mm512_set1_ps(1.0f / sums[r]);
        _mm256_storeu_si256((__m256i *)(to[r] + d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(low[r], by)));
        _mm256_storeu_si256((__m256i *)(to[r] + d + 16), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(high[r], by)));
    }
}

/* Heads of keys begin .. end-1 of S x K: out, S x T x H x D. */
void attend(const int64_t *a, int64_t begin, int64_t end) {
    Heads q, k, v, *all[3] = {&q, &k, &v};
    for (int i = 0; i < 3; i++)
        *all[i] = (Heads){(const uint16_t *)a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]};
    uint16_t *out = (uint16_t *)a[12];
    const int64_t H = a[13], K = a[14], T = a[15], D = a[16], longest = (T + KEYS - 1) / KEYS * KEYS;
    const __m512 scale = _mm512_set1_ps(*(const float *)a[17]);
    uint32_t *keys = aligned_alloc(64, 4 * longest * D / 2), *values = aligned_alloc(64, 4 * longest * D / 2);
    float *scores = aligned_alloc(64, 4 * ROWS * longest), sums[ROWS];
    uint16_t *weights = aligned_alloc(64, 2 * ROWS * longest);
    for (int64_t one = begin; one < end; one++) {
        const int64_t sequence = one / K, head = one % K;
        lay_out(k.at + sequence * k.sequence + head * k.head, k.token, v.at + sequence * v.sequence + head * v.head, v.token, T, D, keys,
                values);
        for (int64_t h = head * (H / K); h < (head + 1) * (H / K); h++)
            for (int64_t first = 0; first < T; first += ROWS) {
                const int rows = T - first < ROWS ? (int)(T - first) : ROWS;
                const int64_t padded = (first + rows + KEYS - 1) / KEYS * KEYS;
                const uint16_t *from[ROWS];
                uint16_t *to[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    const int64_t token = first + (r < rows ? r : rows - 1);
                    from[r] = q.at + sequence * q.sequence + h * q.head + token * q.token;
                    to[r] = out + ((sequence * T + token) * H + h) * D;
                }
                for (int64_t at = 0; at < padded; at += KEYS) score(from, keys + at * (D / 2), D, scale, scores + at, longest);
                const uint16_t *by[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    by[r] = weights + r * longest;
                    sums[r] = weigh(scores + r * longest, first + (r < rows ? r : rows - 1) + 1, padded, weights + r * longest);
                }
                for (int64_t d = 0; d < D; d += 32) answer(by, padded / 2, values, D, d, sums, to, rows);
            }
    }
    free(keys), free(values), free(scores), free(weights);
}
