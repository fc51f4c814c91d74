/* Loops of small operations on CPUs, for which every call of a library costs more than its work: the column loops of the
   sweeps and the descent, and the search for scales. Plain C that compilers vectorise; every sum is in float32.

   A task is LANES rows of one layer: what it works on stays in a core's cache. Shapes: E layers, C columns, R rows, G groups,
   N columns of a slab, K candidates. Names of arguments follow core/compiled.py. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"

#define LANES 64
#define EACH for (int r = 0; r < LANES; r++)
#define BIG 12582912.0f /* 1.5 x 2^23: adding and taking it off again rounds to the nearest whole number, ties to even */

typedef float Lanes[LANES];

static inline void load(float *to, const float *from, int64_t rows) {
    if (rows >= LANES) memcpy(to, from, sizeof(Lanes));
    else memset(to, 0, sizeof(Lanes)), memcpy(to, from, rows * sizeof(float));
}

static inline void store(float *to, const float *from, int64_t rows) {
    memcpy(to, from, (rows < LANES ? rows : LANES) * sizeof(float));
}

/* now -= the sum of owed[i] x found[i]. Two halves, so that what is added up stays in registers. */
static inline void settle(float *restrict now, const float *restrict owed, const Lanes *restrict found, int64_t count) {
    float even[LANES], odd[LANES];
    EACH even[r] = now[r];
    EACH odd[r] = 0;
    int64_t i = 0;
    for (; i + 1 < count; i += 2) {
        const float one = owed[i], two = owed[i + 1];
        EACH even[r] -= one * found[i][r];
        EACH odd[r] -= two * found[i + 1][r];
    }
    if (i < count) EACH even[r] -= owed[i] * found[i][r];
    EACH now[r] = even[r] + odd[r];
}

/* The scale, its reciprocal, and the lowest and the highest level of every group: G x 4 x LANES. */
static void tables(Lanes *to, const float *scale, const float *zero, int64_t groups, int64_t stride, int64_t rows,
                   float lowest, float highest) {
    for (int64_t g = 0; g < groups; g++, to += 4) {
        Lanes at;
        load(to[0], scale + g * stride, rows);
        load(at, zero + g * stride, rows);
        EACH to[1][r] = 1 / (to[0][r] == 0 ? 1 : to[0][r]);
        EACH to[2][r] = lowest - at[r];
        EACH to[3][r] = highest - at[r];
    }
}

static inline float *room(int64_t lanes) { return aligned_alloc(64, lanes * sizeof(Lanes)); }

/* pull E x N x R, owed E x N x N (R transposed), weight E x C x R, scale and zero E x G x R, group E x C, keep E x C x R or none:
   writes what was moved by E x N x R (layers `apart` numbers apart) and codes E x C x R, and adds to loss E x R. */
void sweep_slab(const int64_t *a, int64_t begin, int64_t end) {
    const float *pull = (float *)a[0], *owed = (float *)a[1], *weight = (float *)a[2];
    const float *scale = (float *)a[3], *zero = (float *)a[4];
    const int64_t *group = (int64_t *)a[5];
    const float *keep = (float *)a[6];
    float *moved = (float *)a[7], *loss = (float *)a[9];
    uint8_t *codes = (uint8_t *)a[8];
    const int64_t R = a[10], C = a[11], G = a[12], start = a[13], N = a[14], lowest = a[15], highest = a[16], apart = a[17];
    const int64_t blocks = (R + LANES - 1) / LANES;
    Lanes *found = (Lanes *)room(N + 4 * G), *table = found + N;
    for (int64_t task = begin; task < end; task++) {
        const int64_t e = task / blocks, first = task % blocks * LANES, rows = R - first < LANES ? R - first : LANES;
        Lanes lost = {0};
        tables(table, scale + e * G * R + first, zero + e * G * R + first, G, R, rows, lowest, highest);
        for (int64_t j = 0; j < N; j++) {
            const float *row = owed + (e * N + j) * N, pivot = row[j], curve = 1 / pivot;
            const int64_t at = (e * C + start + j) * R + first;
            const Lanes *t = table + 4 * group[e * C + start + j];
            Lanes now, was, step, kept;
            load(now, pull + (e * N + j) * R + first, rows);
            settle(now, row, found, j);
            load(was, weight + at, rows);
            if (keep) load(kept, keep + at, rows);
            else EACH kept[r] = 1;
            EACH {
                const float low = t[2][r] * kept[r], high = t[3][r] * kept[r]; /* a pruned weight has one level left, zero */
                float s = ((was[r] + now[r] * curve) * t[1][r] + BIG) - BIG;
                s = s < high ? s : high;
                s = s > low ? s : low;
                step[r] = s;
                const float move = s * t[0][r] - was[r], error = now[r] - move * pivot;
                found[j][r] = move;
                lost[r] += error * error;
            }
            store(moved + e * apart + j * R + first, found[j], rows);
            uint8_t code[LANES];
            EACH code[r] = (uint8_t)(int32_t)(step[r] + ((float)lowest - t[2][r]));
            memcpy(codes + at, code, rows);
        }
        for (int64_t r = 0; r < rows; r++) loss[e * R + first + r] += lost[r];
    }
    free(found);
}

/* pull E x N x R, hessian E x C x C, value E x C x R, scale and zero E x G x R, free E x C x R or none, price E or none:
   brings delta and codes E x C x R up to date and adds to gain E x R. */
void descend_slab(const int64_t *a, int64_t begin, int64_t end) {
    const float *pull = (float *)a[0], *hessian = (float *)a[1], *value = (float *)a[2], *scale = (float *)a[3];
    const float *zero = (float *)a[4], *freed = (float *)a[5], *price = (float *)a[6];
    float *delta = (float *)a[7], *gain = (float *)a[9];
    uint8_t *codes = (uint8_t *)a[8];
    const int64_t R = a[10], C = a[11], G = a[12], start = a[13], N = a[14], lowest = a[15], highest = a[16];
    const int64_t blocks = (R + LANES - 1) / LANES;
    Lanes *found = (Lanes *)room(N + 4 * G), *table = found + N;
    for (int64_t task = begin; task < end; task++) {
        const int64_t e = task / blocks, first = task % blocks * LANES, rows = R - first < LANES ? R - first : LANES;
        const float cost = price ? price[e] : 0;
        Lanes won = {0};
        tables(table, scale + e * G * R + first, zero + e * G * R + first, G, R, rows, lowest, highest);
        for (int64_t j = 0; j < N; j++) {
            const float *row = hessian + (e * C + start + j) * C + start, diagonal = row[j], curve = 1 / diagonal;
            const float least = price ? cost * curve : -1; /* what is given up for a weight is never below zero */
            const int64_t at = (e * C + start + j) * R + first;
            const Lanes *t = table + 4 * ((start + j) / (C / G));
            Lanes now, was, kept, step, left;
            load(now, pull + (e * N + j) * R + first, rows);
            settle(now, row, found, j);
            load(was, value + at, rows);
            load(left, delta + at, rows);
            if (freed) load(kept, freed + at, rows);
            else EACH kept[r] = 1;
            EACH {
                const float low = t[2][r] * kept[r], high = t[3][r] * kept[r];
                const float goal = now[r] * curve + was[r];
                float s = (goal * t[1][r] + BIG) - BIG;
                s = s < high ? s : high;
                s = s > low ? s : low;
                const float v = s * t[0][r];
                s = price && !((2 * goal - v) * v > least) ? 0 : s; /* what it takes off the loss against what it costs */
                step[r] = s;
                const float move = s * t[0][r] - was[r];
                found[j][r] = move;
                left[r] -= move;
                won[r] += (2 * now[r] - move * diagonal) * move;
            }
            store(delta + at, left, rows);
            uint8_t code[LANES];
            EACH code[r] = (uint8_t)(int32_t)(step[r] + ((float)lowest - t[2][r]));
            memcpy(codes + at, code, rows);
        }
        for (int64_t r = 0; r < rows; r++) gain[e * R + first + r] += won[r];
    }
    free(found);
}

#define LARGEST 32 /* columns of an N:M group */

/* Of M columns keeps the `keep` with the most worth, of equals the last ones; a column has LANES rows. */
static void choose(const Lanes *worth, uint8_t (*kept)[LANES], int64_t M, int64_t keep) {
    for (int64_t i = 0; i < M; i++) {
        int32_t below[LANES] = {0}; /* how many are worth less */
        for (int64_t k = 0; k < M; k++)
            if (k < i) EACH below[r] += worth[k][r] <= worth[i][r];
            else if (k > i) EACH below[r] += worth[k][r] < worth[i][r];
        EACH kept[i][r] = below[r] >= M - keep;
    }
}

/* weight and kept (bytes) C x R of columns start .. start+N-1, owed N x N (U transposed), price N: prunes in place what is not
   kept and writes errors N x R; with M, what is kept is first chosen for every M columns, as these stand by then. */
void prune_slab(const int64_t *a, int64_t begin, int64_t end) {
    float *weight = (float *)a[0], *errors = (float *)a[4];
    uint8_t *kept = (uint8_t *)a[1];
    const float *owed = (float *)a[2], *price = (float *)a[3];
    const int64_t R = a[5], N = a[6], M = a[7], keep = a[8], wide = M ? M : 1;
    Lanes *found = (Lanes *)room(N), now[LARGEST], worth[LARGEST];
    for (int64_t task = begin; task < end; task++) {
        const int64_t first = task * LANES, rows = R - first < LANES ? R - first : LANES;
        for (int64_t j = 0; j < N; j += wide) {
            uint8_t held[LARGEST][LANES];
            for (int64_t i = 0; i < wide; i++) {
                load(now[i], weight + (j + i) * R + first, rows);
                settle(now[i], owed + (j + i) * N, found, j);
                EACH worth[i][r] = now[i][r] * now[i][r] * price[j + i];
                if (!M) memset(held, 0, sizeof held[0]), memcpy(held, kept + j * R + first, rows);
            }
            if (M) choose(worth, held, M, keep);
            for (int64_t i = 0; i < wide; i++) {
                const float *row = owed + (j + i) * N, pivot = 1 / row[j + i];
                Lanes value;
                settle(now[i], row + j, found + j, i);
                EACH value[r] = held[i][r] ? now[i][r] : 0;
                EACH found[j + i][r] = (now[i][r] - value[r]) * pivot;
                store(weight + (j + i) * R + first, value, rows);
                store(errors + (j + i) * R + first, found[j + i], rows);
                if (M) memcpy(kept + (j + i) * R + first, held[i], rows);
            }
        }
    }
    free(found);
}

#define PART 16 /* weights of a group at a time */

/* Groups begin .. end-1 of weight (groups x N): of K candidates each, given as scale K x groups (below zero: the mirrored grid)
   and zero (K x groups, or none: every zero is `middle`), the one of the least sum of importance x error^2, if that is
   below what cost (groups) holds: writes cost and place. Importance is I x N, of group n number n % I. */
void least(const int64_t *a, int64_t begin, int64_t end) {
    const float *weight = (float *)a[0], *importance = (float *)a[1], *scale = (float *)a[2];
    const uint8_t *zero = (uint8_t *)a[3];
    float *cost = (float *)a[4];
    int64_t *place = (int64_t *)a[5];
    const int64_t groups = a[6], N = a[7], K = a[8], I = a[9], bottom = a[10], top = a[11], middle = a[12];
    const int64_t parts = (N + PART - 1) / PART;
    float *w = aligned_alloc(64, 3 * parts * PART * sizeof(float)), *p = w + parts * PART, *step = p + parts * PART;
    memset(w, 0, 3 * parts * PART * sizeof(float));
    for (int64_t n = begin; n < end; n++) {
        memcpy(w, weight + n * N, N * sizeof(float));
        memcpy(p, importance + n % I * N, N * sizeof(float));
        float before = 0, best = cost[n];
        int64_t which = -1;
        for (int64_t k = 0; k < K; k++) {
            const float given = scale[k * groups + n], size = given < 0 ? -given : given, inverse = 1 / size;
            const float centre = zero ? zero[k * groups + n] : middle;
            const float low = given < 0 ? centre - top : bottom - centre, high = given < 0 ? centre - bottom : top - centre;
            if (size != before) /* not for the mirror image of the one before */
                for (int64_t i = 0; i < parts * PART; i++) step[i] = (w[i] * inverse + BIG) - BIG;
            before = size;
            float sum[PART] = {0};
            for (int64_t i = 0; i < parts * PART; i += PART)
                for (int l = 0; l < PART; l++) {
                    float s = step[i + l];
                    s = s > low ? s : low;
                    s = s < high ? s : high;
                    const float error = w[i + l] - s * size;
                    sum[l] += p[i + l] * error * error;
                }
            for (int half = PART / 2; half; half /= 2)
                for (int l = 0; l < half; l++) sum[l] += sum[l + half];
            if (sum[0] < best) best = sum[0], which = k;
        }
        if (which >= 0) cost[n] = best, place[n] = which;
    }
    free(w);
}
