// What slabs.cu asks of a GPU in its own words: copies into shared memory that nobody waits for, and loads at their place.

// 16 or 4 bytes, of which `bytes` are read and the rest is zero.
__device__ __forceinline__ void copy_four(float* to, const float* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_one(float* to, const float* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all groups but the last N are there.
template <int N> __device__ __forceinline__ void wait_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ float load_now(const float* from, bool inside, float otherwise) {
    float v;  // not when it is used, as the compiler would
    asm volatile("{\n.reg .pred is;\nsetp.ne.b32 is, %2, 0;\nmov.f32 %0, %3;\n@is ld.global.f32 %0, [%1];\n}"
                 : "=&f"(v) : "l"(from), "r"((int)inside), "f"(otherwise));
    return v;
}
