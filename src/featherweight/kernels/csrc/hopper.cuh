// What only Hopper (sm_90a) has, by name: warpgroup products, tensor copies, barriers that copies arrive at, registers
// handed from warp to warp. After gpu.cuh.

// ---- warpgroup products: d += a b, a 64 x 16 in registers, b 16 x N in shared memory ---------------------------------
// Sparse ones: a is what is kept, two of four, of 64 x 32, and `places` says which; those of every four lanes' first two count.

#define P8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define P32_0 P8(0,1,2,3,4,5,6,7) "," P8(8,9,10,11,12,13,14,15) "," P8(16,17,18,19,20,21,22,23) "," P8(24,25,26,27,28,29,30,31)
#define P32_1 P8(32,33,34,35,36,37,38,39) "," P8(40,41,42,43,44,45,46,47) "," P8(48,49,50,51,52,53,54,55) "," P8(56,57,58,59,60,61,62,63)
#define P32_2 P8(64,65,66,67,68,69,70,71) "," P8(72,73,74,75,76,77,78,79) "," P8(80,81,82,83,84,85,86,87) "," P8(88,89,90,91,92,93,94,95)
#define P32_3 P8(96,97,98,99,100,101,102,103) "," P8(104,105,106,107,108,109,110,111) "," P8(112,113,114,115,116,117,118,119) "," P8(120,121,122,123,124,125,126,127)
#define F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define F32(d, i) F8(d, i), F8(d, i + 8), F8(d, i + 16), F8(d, i + 24)

#if BF16
#define KIND ".f32.bf16.bf16"
#else
#define KIND ".f32.f16.f16"
#endif
#if SPARSE
#define SHAPE(N) ".sp.sync.aligned.m64n" #N "k32"
#define CHOSEN(PLACES) PLACES ", 0, "
#else
#define SHAPE(N) ".sync.aligned.m64n" #N "k16"
#define CHOSEN(PLACES) ""
#endif
// b: descriptor of N rows (of the transposed b) x 16 (32) columns; add: 0 to begin a new sum.
#define WARPGROUP_PRODUCT(N, OUTS, A0, A1, A2, A3, B, ADD, PLACES, ...)                                                \
    __device__ __forceinline__ void warpgroup_product(float (&d)[N / 2], const u32 (&a)[4], u32 places, u64 b, u32 add) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                  \
                     "wgmma.mma_async" SHAPE(N) KIND " {" OUTS "}, {" A0 "," A1 "," A2 "," A3 "}, "                    \
                     B ", " CHOSEN(PLACES) "p, 1, 1, 0;\n}"                                                            \
                     : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "r"(places));       \
    }
WARPGROUP_PRODUCT(64, P32_0, "%32", "%33", "%34", "%35", "%36", "%37", "%38", F32(d, 0))
WARPGROUP_PRODUCT(128, P32_0 "," P32_1, "%64", "%65", "%66", "%67", "%68", "%69", "%70", F32(d, 0), F32(d, 32))
WARPGROUP_PRODUCT(256, P32_0 "," P32_1 "," P32_2 "," P32_3, "%128", "%129", "%130", "%131", "%132", "%133", "%134",
                  F32(d, 0), F32(d, 32), F32(d, 64), F32(d, 96))

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps what reads a sum behind the wait, and what writes it before the product.
template <int N> __device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// Rows of 128 bytes, of which eight share a swizzle (a tensor copy with 128-byte swizzle writes them so).
__device__ __forceinline__ u64 operand_of(u32 address) {
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | (u64)((address & 0x3ffff) >> 4);
}

// ---- copies and barriers ----------------------------------------------------------------------------------------------

struct __align__(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int x, int y, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 to, const u8* from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
__device__ __forceinline__ u64 evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ u64 evict_last() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Into the shared memory of another CTA of the cluster, whose barrier counts the bytes; both addresses as in ours.
__device__ __forceinline__ void send(u32 to, float a, float b, float c, float d, u32 barrier, u32 rank) {
    to = remote_address(to, rank), barrier = remote_address(barrier, rank);
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier) : "memory");
}
// After publish_barriers.
__device__ __forceinline__ void arrive_at_the_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_the_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// ---- warps --------------------------------------------------------------------------------------------------------------

// By all warps of a warpgroup.
template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// Four 8 x 8 matrices, turned over: lane l says where row l % 8 of matrix l / 8 goes.
__device__ __forceinline__ void store_turned(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- counters of device memory ------------------------------------------------------------------------------------------

// After everything that the warp has stored, of which it has passed a __syncwarp.
__device__ __forceinline__ void add_one_after_stores(u32* at) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
}
__device__ __forceinline__ u32 add_one(u32* at) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
}
__device__ __forceinline__ u32 read_counter(const u32* at) {
    u32 now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
    return now;
}
