/* Pairs of bfloat16: two neighbouring numbers, which one instruction multiplies by two others and adds up in float32. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* The pair at an address in all lanes. */
static inline __m512bh pair_at(const uint16_t *at) {
    int32_t both;
    memcpy(&both, at, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}
