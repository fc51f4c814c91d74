// What the kernels ask of a GPU, by name: PTX wrapped, with what older GPUs do instead. BF16 says what activations are.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define BULK (__CUDA_ARCH__ >= 900)

// ---- instructions ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 load_shared(u32 a) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a));
    return v;
}
__device__ __forceinline__ float4 load_shared_floats(u32 a) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(a));
    return v;
}
__device__ __forceinline__ void store_shared_floats(u32 a, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(a), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float bfloat_to_float(u16 h) { return __uint_as_float((u32)h << 16); }
__device__ __forceinline__ float activation_to_float(u16 h) { return BF16 ? bfloat_to_float(h) : half_to_float(h); }
__device__ __forceinline__ u16 float_to_activation(float f) {
    u16 h;
    if (BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// The bits of `a` where the mask's are set, else those of `b`; spelt out, since the compiler makes two operations of it.
__device__ __forceinline__ u32 select_bits(u32 mask, u32 a, u32 b) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(v) : "r"(a), "r"(b), "r"(mask));
    return v;
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// n / d from d's inverse, 2^31 / d + 1: exact while n d < 2^31. The compiler's own division takes tens of instructions.
__device__ __forceinline__ int quotient(int n, u32 inverse) { return (int)((u64)(u32)n * inverse >> 31); }

// ---- what Hopper and its successors have: clusters, bulk copies, dependent launches ------------------------------------

__device__ __forceinline__ u32 cluster_index() {
    u32 v = blockIdx.x;
#if BULK
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(v));
#endif
    return v;
}
__device__ __forceinline__ u32 cluster_count() {
    u32 v = gridDim.x;
#if BULK
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(v));
#endif
    return v;
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 v = 0;
#if BULK
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
#endif
    return v;
}
__device__ __forceinline__ u32 cluster_size() {
    u32 v = 1;
#if BULK
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
#endif
    return v;
}
#if BULK
__device__ __forceinline__ void init_barrier(u32 barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// True in one lane of a whole warp, in a way that tells the compiler so.
__device__ __forceinline__ bool one_lane() {
    u32 yes;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(yes));
    return yes;
}
// The barrier's one arrival: its phase ends when so many bytes have come.
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred ready;\nagain:\nmbarrier.try_wait.parity.shared.b64 ready, [%0], %1;\n@!ready bra again;\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}
// Address `a` of our shared memory in that of the cluster's CTA `rank`.
__device__ __forceinline__ u32 remote_address(u32 a, u32 rank) {
    u32 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(rank));
    return v;
}
#endif
__device__ __forceinline__ void let_the_next_kernel_start() {
#if BULK
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Brings memory, from a multiple of 16 bytes on and so many, as near as the L2 cache.
__device__ __forceinline__ void prefetch(const void* from, u32 bytes) {
#if BULK
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
