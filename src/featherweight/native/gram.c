/* Sums of products over tokens on CPUs that multiply tiles of bfloat16 into float32 (AMX), or vectors of it (AVX512_BF16):
   exact products, float32 sums, which torch has no operator for. Which of the two is up to the compiler's flags.

   lay_out   T tokens x C channels (rows `stride` apart) as tiles: `pairs`, [panel][32 tokens][half][16 pairs of tokens][16
             channels][2], and, if wanted, `turned`, [panel][32 tokens][half][16 channels][32 tokens]
   add_up    sum (A x B, rows `stride` apart) += a^T b, of a turned and b in pairs; with `upper`, only panels on or above the
             diagonal. All tokens of a call at once: the sum goes through memory, and its pages, once a call.
   weigh     K H K^T of every row of codes K, by groups of columns, of H in pairs

   A panel is 32 channels. Behind the last channel and the last token there are zeros. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "call.h"

#define TILE (16 * 32)   /* bfloat16 of one tile */
#define PANEL 32
#define HIGH 4           /* panels of a by */
#define WIDE 16          /* panels of b in one task */

#ifdef __AMX_BF16__
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Shape;

/* A constant: compilers do not see that the instruction reads more than its first bytes. */
static const Shape SHAPE = {
    .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static void begin_products(void) { _tile_loadconfig(&SHAPE); }
static void end_products(void) { _tile_release(); }
#else
#define NEAR 8           /* steps of 32 tokens of two panels that stay in the first cache: 16 KB of each */
#define ROWS 8           /* whose sums are in registers at once, 32 channels of each */

#include "vectors.h"

static void begin_products(void) {}
static void end_products(void) {}
#endif

/* 16 x 16 words of 32 bits, turned. */
static void turn(const uint16_t *from, uint16_t *to) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(from + 32 * i);
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, r[i]);
}

/* Steps begin .. end-1 of 32 tokens. */
void lay_out(const int64_t *arguments, int64_t begin, int64_t end) {
    const uint16_t *x = (const uint16_t *)arguments[0];
    const int64_t tokens = arguments[1], channels = arguments[2], stride = arguments[3], steps = arguments[6];
    uint16_t *pairs = (uint16_t *)arguments[4], *turned = (uint16_t *)arguments[5];
    const int64_t panels = (channels + PANEL - 1) / PANEL;
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    uint16_t scratch[2 * TILE] __attribute__((aligned(64)));
    for (int64_t step = begin; step < end; step++)
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t here = (panel * steps + step) * 2 * TILE, left = channels - panel * PANEL;
            const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
            uint16_t *to = pairs ? pairs + here : scratch;
            for (int pair = 0; pair < 16; pair++) {
                const int64_t token = step * 32 + 2 * pair;
                const uint16_t *row = x + token * stride + panel * PANEL;
                const __m512i one = _mm512_maskz_loadu_epi16(token < tokens ? mask : 0, row);
                const __m512i two = _mm512_maskz_loadu_epi16(token + 1 < tokens ? mask : 0, row + stride);
                _mm512_store_si512(to + 32 * pair, _mm512_permutex2var_epi16(one, low, two));
                _mm512_store_si512(to + TILE + 32 * pair, _mm512_permutex2var_epi16(one, high, two));
            }
            if (turned) turn(to, turned + here), turn(to + TILE, turned + here + TILE);
        }
}

/* sum += a^T b of a panel each and `steps` steps; the sum is at least 32 x 32. */
#ifdef __AMX_BF16__
static void block(const uint16_t *a, const uint16_t *b, int64_t steps, float *sum, int64_t stride) {
    const int64_t bytes = 4 * stride;
    _tile_loadd(0, sum, bytes); _tile_loadd(1, sum + 16, bytes);
    _tile_loadd(2, sum + 16 * stride, bytes); _tile_loadd(3, sum + 16 * stride + 16, bytes);
    for (int64_t step = 0; step < steps; step++, a += 2 * TILE, b += 2 * TILE) {
        _tile_loadd(4, a, 64); _tile_loadd(6, b, 64); _tile_loadd(7, b + TILE, 64); _tile_loadd(5, a + TILE, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, bytes); _tile_stored(1, sum + 16, bytes);
    _tile_stored(2, sum + 16 * stride, bytes); _tile_stored(3, sum + 16 * stride + 16, bytes);
}
#else
/* Sums of so few tokens apart: each product is rounded into its sum. */
static void block(const uint16_t *a, const uint16_t *b, int64_t steps, float *sum, int64_t stride) {
    for (int64_t first = 0; first < steps; first += NEAR) {
        const int64_t last = first + NEAR < steps ? first + NEAR : steps;
        for (int row = 0; row < PANEL; row += ROWS) {
            float *to = sum + row * stride;
            const uint16_t *rows = a + row / 16 * TILE + row % 16 * 32;
            __m512 low[ROWS], high[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) low[r] = high[r] = _mm512_setzero_ps();
            for (int64_t step = first; step < last; step++)
#pragma GCC unroll 2
                for (int pair = 0; pair < 16; pair++) {
                    const uint16_t *x = rows + step * 2 * TILE + 2 * pair, *y = b + step * 2 * TILE + 32 * pair;
                    const __m512bh one = (__m512bh)_mm512_load_si512(y), two = (__m512bh)_mm512_load_si512(y + TILE);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) {
                        const __m512bh k = pair_at(x + 32 * r);
                        low[r] = _mm512_dpbf16_ps(low[r], k, one), high[r] = _mm512_dpbf16_ps(high[r], k, two);
                    }
                }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                float *at = to + r * stride;
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), low[r]));
                _mm512_storeu_ps(at + 16, _mm512_add_ps(_mm512_loadu_ps(at + 16), high[r]));
            }
        }
    }
}
#endif

/* The same at an edge, where `rows` x `columns` of the sum are there. */
static void edge(const uint16_t *a, const uint16_t *b, int64_t steps, float *sum, int64_t stride, int64_t rows,
                 int64_t columns) {
    float whole[PANEL * PANEL] __attribute__((aligned(64))) = {0};
    for (int64_t row = 0; row < rows; row++) memcpy(whole + PANEL * row, sum + row * stride, 4 * columns);
    block(a, b, steps, whole, PANEL);
    for (int64_t row = 0; row < rows; row++) memcpy(sum + row * stride, whole + PANEL * row, 4 * columns);
}

/* Takes tasks, HIGH panels of a by WIDE of b, from a counter until there are none left. */
void add_up(const int64_t *arguments, int64_t begin, int64_t end) {
    (void)begin, (void)end;
    const uint16_t *a = (const uint16_t *)arguments[0], *b = (const uint16_t *)arguments[1];
    const int64_t steps = arguments[2], rows = arguments[3], columns = arguments[4], stride = arguments[6];
    float *sum = (float *)arguments[5];
    const int upper = arguments[7];
    int64_t *next = (int64_t *)arguments[8];
    const int64_t high = (rows + PANEL - 1) / PANEL, wide = (columns + PANEL - 1) / PANEL;
    const int64_t across = (wide + WIDE - 1) / WIDE, tasks = (high + HIGH - 1) / HIGH * across;
    begin_products();
    for (int64_t task; (task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < tasks;) {
        const int64_t i0 = task / across * HIGH, i1 = i0 + HIGH < high ? i0 + HIGH : high;
        const int64_t j0 = task % across * WIDE, j1 = j0 + WIDE < wide ? j0 + WIDE : wide;
        for (int64_t j = upper && j0 < i0 ? i0 : j0; j < j1; j++)
            for (int64_t i = i0; i < i1 && (!upper || i <= j); i++) {
                const uint16_t *x = a + i * steps * 2 * TILE, *y = b + j * steps * 2 * TILE;
                float *at = sum + i * PANEL * stride + j * PANEL;
                const int64_t r = rows - i * PANEL, c = columns - j * PANEL;
                if (r >= PANEL && c >= PANEL) block(x, y, steps, at, stride);
                else edge(x, y, steps, at, stride, r < PANEL ? r : PANEL, c < PANEL ? c : PANEL);
            }
    }
    end_products();
}

/* 16 rows of codes k (rows C apart) times 32 columns of H's two parts, `steps` steps down, as two tiles of 16 columns. */
#ifdef __AMX_BF16__
static void two_tiles(const uint16_t *k, int64_t C, const uint16_t *high, const uint16_t *low, int64_t steps, float (*tiles)[256]) {
    _tile_zero(0); _tile_zero(1);
    for (int64_t at = 0; at < steps * 2 * TILE; at += 2 * TILE, k += 32) {
        _tile_loadd(4, k, 2 * C);
        _tile_loadd(6, high + at, 64); _tile_loadd(7, high + at + TILE, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, low + at, 64); _tile_loadd(7, low + at + TILE, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, tiles[0], 64); _tile_stored(1, tiles[1], 64);
}
#else
static void two_tiles(const uint16_t *k, int64_t C, const uint16_t *high, const uint16_t *low, int64_t steps, float (*tiles)[256]) {
    for (int half = 0; half < 2; half++) {
        __m512 sums[16];
#pragma GCC unroll 16
        for (int row = 0; row < 16; row++) sums[row] = _mm512_setzero_ps();
        for (int64_t step = 0; step < steps; step++)
            for (int pair = 0; pair < 16; pair++) {
                const int64_t at = step * 2 * TILE + half * TILE + 32 * pair;
                const __m512bh one = (__m512bh)_mm512_load_si512(high + at), two = (__m512bh)_mm512_load_si512(low + at);
#pragma GCC unroll 16
                for (int row = 0; row < 16; row++) {
                    const __m512bh code = pair_at(k + row * C + 32 * step + 2 * pair);
                    sums[row] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(sums[row], code, one), code, two);
                }
            }
#pragma GCC unroll 16
        for (int row = 0; row < 16; row++) _mm512_store_ps(tiles[half] + 16 * row, sums[row]);
    }
}
#endif

/* 16 rows of 16 floats times the codes k (rows `stride` apart), added to sums by row. */
static inline void gather(const float *tile, const uint16_t *k, int64_t stride, __m512 *sums) {
    for (int row = 0; row < 16; row++) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(k + row * stride)));
        sums[row] = _mm512_fmadd_ps(_mm512_load_ps(tile + 16 * row), _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
                                    sums[row]);
    }
}

/* Rows 16 begin .. 16 end-1 of codes (R x C bfloat16, R a multiple of 16), H in two parts (high and what that leaves) in pairs,
   C x C: out R x G x G, its lower triangle, is the sum of k_c H_cd k_d over the columns c of one group and d of another, of
   `width` columns, a multiple of 32. */
void weigh(const int64_t *arguments, int64_t begin, int64_t end) {
    const uint16_t *codes = (const uint16_t *)arguments[0];
    const uint16_t *parts[2] = {(const uint16_t *)arguments[1], (const uint16_t *)arguments[2]};
    float *out = (float *)arguments[3];
    const int64_t C = arguments[4], width = arguments[5], G = C / width, steps = C / 32, inside = width / 32;
    float tiles[2][256] __attribute__((aligned(64)));
    begin_products();
    for (int64_t g = 0; g < G; g++)
        for (int64_t h = 0; h <= g; h++)
            for (int64_t rows = begin; rows < end; rows++) {
                const uint16_t *k = codes + 16 * rows * C;
                __m512 sums[16];
                for (int row = 0; row < 16; row++) sums[row] = _mm512_setzero_ps();
                for (int64_t panel = h * inside; panel < (h + 1) * inside; panel++) {
                    const int64_t at = (panel * steps + g * inside) * 2 * TILE;
                    two_tiles(k + 32 * g * inside, C, parts[0] + at, parts[1] + at, inside, tiles);
                    gather(tiles[0], k + 32 * panel, C, sums);
                    gather(tiles[1], k + 32 * panel + 16, C, sums);
                }
                for (int row = 0; row < 16; row++) out[((16 * rows + row) * G + g) * G + h] = _mm512_reduce_add_ps(sums[row]);
            }
    end_products();
}
