// Streams of blocks from device memory into shared memory, one a warp, and sums from CTA to CTA of a cluster.
// The including file says BLOCK, the bytes of a block, CHUNK, how many lie together, and RING, the stages of a ring on GPUs
// without bulk copies.

// Where block k of tile t lies. Chunks of all tiles lie side by side, as the CTAs that read them work.
__device__ __forceinline__ u64 block_index(int k, int t, int blocks, int tiles) {
    const int first = k & ~(CHUNK - 1), width = min(CHUNK, blocks - first);
    return (u32)(tiles * first + t * width + (k - first));
}

// One warp's ring of chunks, each a few blocks of a tile: `start` fetches, `wait` makes one readable by the warp.
struct Ring {
    u8* slots;
    u32 barriers;
    int stages, chunk, blocks, tiles;       // blocks in a chunk; blocks and tiles of the whole matrix
    const u8* weights;
    int first, chunks;                      // the chunks of every tile that are ours
    int tile, tile_step;                    // being fetched; to our next one
    int slot_in, chunk_in, left;            // next to fetch, of the tile; left: chunks of all tiles
    int slot_out;
    u32 phase;
#if BULK
    u64 policy;
#endif

    // Fetches as many chunks as the ring holds.
    __device__ __forceinline__ void begin(int lane) {
        slot_in = slot_out = chunk_in = 0;
        phase = 0;
#if BULK
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        if (lane < stages) init_barrier(barriers + 8 * lane);
        __syncwarp();
#endif
        for (int i = 0; i < stages; i++) start(lane);
    }

    // The last chunk of a tile may be short.
    __device__ __forceinline__ int blocks_of(int c) { return min(chunk, blocks - c * chunk); }
    __device__ __forceinline__ const u8* address(int c, int t) {
        return weights + block_index(c * chunk, t, blocks, tiles) * BLOCK;
    }

#if BULK
    // One thread: a chunk into a slot, which announces its arrival.
    __device__ __forceinline__ void fetch(int slot, int c, int t) {
        u32 bytes = blocks_of(c) * BLOCK, barrier = barriers + 8 * slot;
        expect_bytes(barrier, bytes);
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
            ::"r"(shared_address(slots) + slot * chunk * BLOCK), "l"(address(c, t)), "r"(bytes), "r"(barrier), "l"(policy)
            : "memory");
    }
#endif

    __device__ __forceinline__ void start(int lane) {
        if (left > 0) {
            const int c = first + chunk_in;
#if BULK
            if (one_lane()) fetch(slot_in, c, tile);
#else
            for (int i = lane * 16; i < blocks_of(c) * BLOCK; i += 512)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                             ::"r"(shared_address(slots) + slot_in * chunk * BLOCK + i), "l"(address(c, tile) + i) : "memory");
#endif
            if (++chunk_in == chunks) {
                chunk_in = 0;
                tile += tile_step;
            }
            left--;
            if (++slot_in == stages) slot_in = 0;
        }
#if !BULK
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    __device__ __forceinline__ const u8* wait() {
#if BULK
        wait_barrier(barriers + 8 * slot_out, phase);
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(RING - 1) : "memory");
        __syncwarp();
#endif
        return slots + slot_out * chunk * BLOCK;
    }

    __device__ __forceinline__ void release(int lane) {
        if (++slot_out == stages) {
            slot_out = 0;
            phase ^= 1;
        }
        __syncwarp();  // the whole warp has read the chunk
        start(lane);
    }
};

// The sums of a pass travel from every split to the CTA of the cluster that owns their rows: stores into its memory that
// its barrier counts. It is written again only when the whole cluster has read it (`may_send`).
struct Exchange {
    u32 buffer, barrier;

    __device__ __forceinline__ void begin() {
#if BULK
        if (threadIdx.x < 2) init_barrier(barrier + 8 * threadIdx.x);  // the second is for x
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    }
    // `expected`: bytes of this pass that come to this CTA.
    __device__ __forceinline__ void may_send(u32 expected) {
#if BULK
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
        // Only now: expecting no bytes ends the phase, and a thread may have been waiting for the one before.
        if (threadIdx.x == 0) expect_bytes(barrier, expected);
#else
        __syncthreads();
#endif
    }
    __device__ __forceinline__ void wait_for(int pass) {
#if BULK
        wait_barrier(barrier, pass & 1);
#else
        __syncthreads();
#endif
    }
    // After the buffer has been read, which is before the outputs made of it are stored: there is nothing to release, and
    // a release would wait for those stores. Every arrival is followed by a `may_send`.
    __device__ __forceinline__ void have_read() {
#if BULK
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    }
};

__device__ __forceinline__ void send(u32 to, const float (&v)[4], u32 barrier) {
#if BULK
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
                 ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier) : "memory");
#else
    store_shared_floats(to, make_float4(v[0], v[1], v[2], v[3]));
#endif
}
