// One row of an entropy-coded ternary matrix times x in shared memory: columns added up and taken away. The macros are
// those of sub1.cu.

// x of up to M tokens as one element of a column: a float for one token, else 16 bits each.
template <int M> struct Element {
    static constexpr int BYTES = M == 1 ? 4 : 2 * M;
};

// ---- adding columns: PTX, so that no lane goes its own way ------------------------------------------------------------

// Predicate n: there is something to add here; s is 1 or -1.
#define REGISTERS ".reg .pred n; .reg .u32 g, f, q; .reg .f32 s, x; .reg .b16 l, h; "
#if BF16
#define PAIR(W, A, B) \
    "shl.b32 g, " W ", 16; mov.b32 x, g; @n fma.rn.f32 " A ", x, s, " A "; " \
    "and.b32 g, " W ", 0xffff0000; mov.b32 x, g; @n fma.rn.f32 " B ", x, s, " B "; "
#else
#define PAIR(W, A, B) \
    "mov.b32 {l, h}, " W "; cvt.f32.f16 x, l; @n fma.rn.f32 " A ", x, s, " A "; " \
    "cvt.f32.f16 x, h; @n fma.rn.f32 " B ", x, s, " B "; "
#endif
// The column at AT into registers, and from there into the sums; LOAD under a predicate.
#define LOAD_1(IF, AT) IF "ld.shared.u32 %2, [" AT "]; "
#define LOAD_2(IF, AT) IF "ld.shared.u32 %3, [" AT "]; "
#define LOAD_4(IF, AT) IF "ld.shared.v2.u32 {%5, %6}, [" AT "]; "
#define LOAD_8(IF, AT) IF "ld.shared.v4.u32 {%9, %10, %11, %12}, [" AT "]; "
#define ADD_1 "mov.b32 x, %2; @n fma.rn.f32 %1, x, s, %1; "
#define ADD_2 PAIR("%3", "%1", "%2")
#define ADD_4 PAIR("%5", "%1", "%2") PAIR("%6", "%3", "%4")
#define ADD_8 PAIR("%9", "%1", "%2") PAIR("%10", "%3", "%4") PAIR("%11", "%5", "%6") PAIR("%12", "%7", "%8")
#define SUMS_1 "+f"(acc[0])
#define SUMS_2 SUMS_1, "+f"(acc[1])
#define SUMS_4 SUMS_2, "+f"(acc[2]), "+f"(acc[3])
#define SUMS_8 SUMS_4, "+f"(acc[4]), "+f"(acc[5]), "+f"(acc[6]), "+f"(acc[7])
#define HELD_1 "+r"(held[0])
#define HELD_2 HELD_1
#define HELD_4 HELD_2, "+r"(held[1])
#define HELD_8 HELD_4, "+r"(held[2]), "+r"(held[3])

// A symbol, the bits of `v` from LOW on: a gap leads on from `at`, and the column there is added or, by the sign below
// the gap, taken away. A gap of all ones is an escape: G columns that were zero, or 2 G. Seven instructions
// (and half a shift):
// * the gap is taken with its bits turned over, so that the same instruction says whether this is an escape, where none
//   is left. `at` then moves back by it, and G + 1 columns a symbol ahead, which the offsets of the loads hold;
// * an escape moves `at` by -1 or G - 1 columns, which is one product: y, an odd constant (1 / G modulo 2^32) or that
//   less 1 by the sign, times -G columns. It is written beside the other step, not after it, into a new register: one
//   that a load has its address from cannot be overwritten before that has read it;
// * what is in place LOW is not shifted: factors are divided by 2^LOW instead, and y is multiplied by it;
// * y's bit of the sign, the lowest that can be set, becomes that of a float: 1 where it is set, else -1;
// * a multiprocessor multiplies integers beside whatever else it does, and adds them at half the rate of floats.
// What is loaded goes into registers of the caller's, since one that is written under a predicate alone is alive from
// the beginning on. (Written with the opposite predicate, setp.eq, this does not come out of ptxas 13.0.)
#define SYMBOL(LOAD, ADD, V, GAPS, BACK, FAR, SIGN, ODD, TOP, HERE) \
    "{ " REGISTERS "lop3.b32 g, " V ", " GAPS ", " GAPS ", 0x0c; setp.ne.u32 n, g, 0; " \
    "lop3.b32 f, " V ", " SIGN ", " ODD ", 0x6a; mad.lo.u32 q, g, " BACK ", %0; @!n mad.lo.u32 q, f, " FAR ", %0; " \
    LOAD("@n ", "q+" HERE) "mad.lo.u32 f, f, " TOP ", 0xbf800000; mov.b32 s, f; mov.u32 %0, q; " ADD "}"

__device__ constexpr u32 inverse(u32 odd) {  // modulo 2^32
    u32 found = odd;
    for (int i = 0; i < 5; i++) found *= 2 - odd * found;
    return found;
}

template <int B, int M, int S, int LOW> __device__ __forceinline__ void add_symbol(
    float (&acc)[M], u32 (&held)[(M + 1) / 2], u32& at, u32 v) {
    constexpr int ONE = 1 << LOW, GAPS = ((1 << B) - 2) * ONE, G = (1 << (B - 1)) - 1;
    constexpr int BACK = -STRIDE / 2 / ONE, FAR = -G * STRIDE / ONE, HERE = (S * (G + 1) + G) * STRIDE;
    constexpr u32 ODD = inverse(G) * ONE, TOP = 0x80000000 / ONE;
#define GIVEN "r"(v), "n"(GAPS), "n"(BACK), "n"(FAR), "n"(ONE), "n"(ODD), "n"(TOP), "n"(HERE)
#define SYMBOL_OF(M, ...) asm volatile(SYMBOL(LOAD_##M, ADD_##M, __VA_ARGS__) : "+r"(at), SUMS_##M, HELD_##M : GIVEN)
    if constexpr (M == 1) SYMBOL_OF(1, "%3", "%4", "%5", "%6", "%7", "%8", "%9", "%10");
    if constexpr (M == 2) SYMBOL_OF(2, "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11");
    if constexpr (M == 4) SYMBOL_OF(4, "%7", "%8", "%9", "%10", "%11", "%12", "%13", "%14");
    if constexpr (M == 8) SYMBOL_OF(8, "%13", "%14", "%15", "%16", "%17", "%18", "%19", "%20");
}

// A flag, a bit of `flags`: if it is set, the column at `at` is added or, by the highest bit of `sign`, taken away, and
// that bit of `sign` is used up.
#define FLAG(LOAD, ADD, AT, FLAGS, BIT, ONE) \
    "{ " REGISTERS "and.b32 g, " FLAGS ", " BIT "; setp.ne.u32 n, g, 0; lop3.b32 f, %0, 0x80000000, " ONE ", 0xea; " \
    "mov.b32 s, f; " LOAD("", AT) ADD "@n mad.lo.u32 %0, %0, 2, 0; }"

template <int M> __device__ __forceinline__ void add_flag(float (&acc)[M], u32& sign, u32 at, u32 flags, u32 bit) {
    u32 held[(M + 1) / 2] = {};
#define GIVEN_FLAG "r"(at), "r"(flags), "r"(bit), "r"(0x3f800000)
    if constexpr (M == 1) asm volatile(FLAG(LOAD_1, ADD_1, "%3", "%4", "%5", "%6") : "+r"(sign), SUMS_1, HELD_1 : GIVEN_FLAG);
    if constexpr (M == 2) asm volatile(FLAG(LOAD_2, ADD_2, "%4", "%5", "%6", "%7") : "+r"(sign), SUMS_2, HELD_2 : GIVEN_FLAG);
    if constexpr (M == 4) asm volatile(FLAG(LOAD_4, ADD_4, "%7", "%8", "%9", "%10") : "+r"(sign), SUMS_4, HELD_4 : GIVEN_FLAG);
    if constexpr (M == 8) asm volatile(FLAG(LOAD_8, ADD_8, "%13", "%14", "%15", "%16") : "+r"(sign), SUMS_8, HELD_8 : GIVEN_FLAG);
}

// ---- one row ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 word_at(u32 row, int i, int words, u32 behind) { return i < words ? load_shared(row + 4 * i) : behind; }

__device__ __forceinline__ u32 word_or_ones(u32 at, int is_there) {
    u32 v;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.u32 %0, 0xffffffff; @p ld.shared.u32 %0, [%1]; }"
                 : "=&r"(v) : "r"(at), "r"(is_there));
    return v;
}

// What of B words is from symbol S on: so many bits, and others behind them.
template <int B, int S, int BITS> __device__ __forceinline__ u32 bits_at(const u32 (&w)[B]) {
    constexpr int word = S * B / 32, bit = S * B % 32, next = word + 1 < B ? word + 1 : word;
    return bit + BITS > 32 ? __funnelshift_r(w[word], w[next], bit) : w[word] >> bit;
}

// Symbols S and S + 1 of B words: one shift for both, where a column is wide enough for the second to be left in place.
template <int B, int M, int S> __device__ __forceinline__ void add_two(
    float (&acc)[M], u32 (&held)[(M + 1) / 2], u32 (&then)[(M + 1) / 2], u32& at, const u32 (&w)[B]) {
    constexpr int LOW = STRIDE >= 2 << B ? B : 0;
    const u32 v = bits_at<B, S, B + LOW>(w);
    add_symbol<B, M, S, 0>(acc, held, at, v);
    add_symbol<B, M, S + 1, LOW>(acc, then, at, LOW ? v : bits_at<B, S + 1, B>(w));
}

// Runs: 32 symbols are B words. Behind a row's last word there are ones, which are escapes. As long as all 32 rows go on
// no word is asked whether it is there; then, after every eight symbols, whether there are more in any row.
template <int B, int M> __device__ __forceinline__ void sum_runs(
    float (&acc)[M], u32 row, int words, int shortest, int longest, u32 at) {
    constexpr int AHEAD = M <= 2 ? 8 : 4;  // columns on their way
    u32 held[AHEAD][(M + 1) / 2] = {}, w[B];
#define TWO(S) add_two<B, M, S>(acc, held[(S) % AHEAD], held[(S + 1) % AHEAD], at, w);
#define EIGHT(S) TWO(S) TWO(S + 2) TWO(S + 4) TWO(S + 6)
    int first = 0;
    for (; first + B <= shortest; first += B) {
#pragma unroll
        for (int i = 0; i < B; i++) w[i] = load_shared(row + 4 * i);
        row += 4 * B;
        EIGHT(0) EIGHT(8) EIGHT(16) EIGHT(24)
        at += 32 * STRIDE << (B - 1);
    }
    for (; first < longest; first += B) {
#pragma unroll
        for (int i = 0; i < B; i++) w[i] = word_or_ones(row + 4 * i, first + i < words);
        row += 4 * B;
        const int left = longest - first;
        EIGHT(0)
        if (left <= B / 4) break;
        EIGHT(8)
        if (left <= B / 2) break;
        EIGHT(16)
        if (left <= 3 * B / 4) break;
        EIGHT(24)
        at += 32 * STRIDE << (B - 1);
    }
}

// Bitmaps: a flag a column, then a bit for each flag that is set. All lanes look at the same column.
template <int M> __device__ __forceinline__ void sum_bitmap(float (&acc)[M], u32 row, int words, int columns, u32 x) {
    const int flags = (columns + 31) / 32;
    int bits = flags * 32;
    for (int i = 0; i < flags; i++) {
        const u32 set = word_at(row, i, words, 0);
        u32 sign = __brev(__funnelshift_r(word_at(row, bits / 32, words, 0), word_at(row, bits / 32 + 1, words, 0), bits & 31));
        bits += __popc(set);
#pragma unroll
        for (int j = 0; j < 32; j++) add_flag<M>(acc, sign, x + j * Element<M>::BYTES, set, 1u << j);
        x += 32 * Element<M>::BYTES;
    }
}
