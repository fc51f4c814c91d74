/* What transformers' blocks do between their products, in one pass over memory on a CPU: norms, gates and rotations of
   bfloat16, each rounded where torch's own operators round. Plain C that compilers vectorise.

   Shapes: N rows, D width; S sequences, T tokens, H heads. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "call.h"

#define LANES 16

static inline float wide(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The nearest bfloat16, ties to even. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

static inline float rounded(float value) { return wide(narrow(value)); }

/* e^x to a unit or two in the last place, for x that neither overflows nor comes near zero: |x| < 87. */
static inline float exponential(float x) {
    const float turns = x * 1.44269504f + 12582912.0f, whole = turns - 12582912.0f; /* to the nearest whole number */
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1;
    uint32_t bits;
    memcpy(&bits, &turns, 4);
    bits = (bits << 23) + 0x3f800000; /* the whole number is in the lowest bits: 2^whole */
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

/* Rows begin .. end-1 of N x D: out = x / sqrt(mean x^2 + eps), times weight (`plus_one`: 1 + weight) in float32, or
   rounded before it is multiplied (`early`). */
void rms_norm(const int64_t *a, int64_t begin, int64_t end) {
    const uint16_t *x = (const uint16_t *)a[0], *weight = (const uint16_t *)a[1];
    uint16_t *restrict out = (uint16_t *)a[2];
    const int64_t D = a[3], plus_one = a[5], early = a[6];
    const float eps = *(const float *)a[4];
    for (int64_t n = begin; n < end; n++) {
        const uint16_t *row = x + n * D;
        uint16_t *restrict to = out + n * D;
        float sums[LANES] = {0}, sum = 0;
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES)
            for (int l = 0; l < LANES; l++) sums[l] += wide(row[d + l]) * wide(row[d + l]);
        for (; d < D; d++) sum += wide(row[d]) * wide(row[d]);
        for (int l = 0; l < LANES; l++) sum += sums[l];
        const float scale = 1 / sqrtf(sum / (float)D + eps);
        if (early)
            for (int64_t i = 0; i < D; i++) to[i] = narrow(wide(weight[i]) * rounded(wide(row[i]) * scale));
        else
            for (int64_t i = 0; i < D; i++) to[i] = narrow((wide(weight[i]) + (float)plus_one) * (wide(row[i]) * scale));
    }
}

/* Rows begin .. end-1 of N x D: out = silu(gate) * up; rows of both lie apart. */
void gate(const int64_t *a, int64_t begin, int64_t end) {
    const uint16_t *gates = (const uint16_t *)a[0], *ups = (const uint16_t *)a[1];
    uint16_t *restrict out = (uint16_t *)a[2];
    const int64_t D = a[3], gate_apart = a[4], up_apart = a[5];
    const volatile float beyond = 86; /* compilers divide four times where they know what lies beyond it */
    const float most = beyond;
    for (int64_t n = begin; n < end; n++) {
        const uint16_t *one = gates + n * gate_apart, *other = ups + n * up_apart;
        uint16_t *restrict to = out + n * D;
        for (int64_t d = 0; d < D; d++) {
            const float x = wide(one[d]), above = x < -most ? 0 : x; /* below, nothing is left of it; a NaN passes */
            float bound = x < most ? x : most;
            bound = bound > -most ? bound : -most;
            to[d] = narrow(rounded(above / (1 + exponential(-bound))) * wide(other[d]));
        }
    }
}

static inline void turn(const uint16_t *x, const uint16_t *c, const uint16_t *s, uint16_t *restrict to, int64_t half) {
    for (int64_t d = 0; d < half; d++) to[d] = narrow(rounded(wide(x[d]) * wide(c[d])) - rounded(wide(x[half + d]) * wide(s[d])));
}

static inline void turned(const uint16_t *x, const uint16_t *c, const uint16_t *s, uint16_t *restrict to, int64_t half) {
    for (int64_t d = 0; d < half; d++) to[d] = narrow(rounded(wide(x[half + d]) * wide(c[d])) + rounded(wide(x[d]) * wide(s[d])));
}

/* Tokens begin .. end-1 of S x T: out = x cos + (-x2, x1) sin of every head, x1 and x2 the halves of its D numbers; x and
   out lie alike, S, T and H so many numbers apart; cos and sin T x D, or S x T x D that are `angles` apart. */
void rotate(const int64_t *a, int64_t begin, int64_t end) {
    const uint16_t *x = (const uint16_t *)a[0], *cosines = (const uint16_t *)a[2], *sines = (const uint16_t *)a[3];
    uint16_t *restrict out = (uint16_t *)a[1];
    const int64_t T = a[4], H = a[5], D = a[6], by_s = a[7], by_t = a[8], by_h = a[9], angles = a[10], half = D / 2;
    for (int64_t n = begin; n < end; n++) {
        const uint16_t *c = cosines + n / T * angles + n % T * D, *s = sines + n / T * angles + n % T * D;
        for (int64_t h = 0; h < H; h++) {
            const int64_t at = n / T * by_s + n % T * by_t + h * by_h;
            turn(x + at, c, s, out + at, half);
            turned(x + at, c + half, s + half, out + at + half, half);
        }
    }
}
