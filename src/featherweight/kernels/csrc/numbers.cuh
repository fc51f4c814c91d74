// 4-bit codes as 16-bit floats, code minus zero, both at once for two columns: what ors a code into a number's last bits
// and takes that number and the zero away again. Exact in either dtype. After gpu.cuh.
//
// Codes of rows g lie in the lowest nibbles of a word's halves, of rows g + 8 in the second.

__device__ __forceinline__ u32 masked_or(u32 v, u32 mask, u32 bits) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
    return r;
}
__device__ __forceinline__ u32 pair_of(u16 v) { return (u32)v << 16 | v; }
__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 c;
#if BF16 && __CUDA_ARCH__ >= 900
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#elif BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
#else
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#endif
    return c;
}
__device__ __forceinline__ u32 times_plus(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Zeros of rows g and g + 8 as `code_minus_zero` takes them.
__device__ __forceinline__ void zeros_of(u32 (&zeros)[2], u32 z0, u32 z1) {
    if (BF16)
        zeros[0] = pair_of(0x4300 | z0), zeros[1] = pair_of(0x4300 | z1);       // 128 + z
    else
        zeros[0] = pair_of(0x6400 | z0), zeros[1] = pair_of(0xd400 | z1 << 4);  // 1024 + z; -(64 + z)
}

// Pairs of rows g and g + 8 out of the first two nibbles of both halves of v.
__device__ __forceinline__ void code_minus_zero(u32& a0, u32& a1, u32 v, const u32 (&zeros)[2]) {
    if (BF16) {
        a0 = minus(masked_or(v, 0x000f000fu, 0x43004300u), zeros[0]);
        a1 = minus(masked_or(v >> 4, 0x000f000fu, 0x43004300u), zeros[1]);
    } else {
        a0 = minus(masked_or(v, 0x000f000fu, 0x64006400u), zeros[0]);
        a1 = times_plus(masked_or(v, 0x00f000f0u, 0x64006400u), 0x2c002c00u, zeros[1]);  // 1/16: exact
    }
}
