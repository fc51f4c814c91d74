// The column loops of the sweep and the descent: a CTA takes a slab's columns of ROWS rows one after the other.
//
// E layers, C columns of the layer, S columns of the slab from `start` on, G groups of columns, R rows; all tensors are
// contiguous. Columns go by *tiles* of 32. The first warp decides a tile, a row a lane: all of the row's columns are in
// registers, each by its own name, so that a step is some ten dependent operations and no memory. It asks for
// what a column needs before the one in front is decided (shared memory answers in 30 cycles), and writes nowhere else.
//
// Meanwhile the other warps serve it: they write out the tile before, fetch the tile after, make reciprocals and bounds
// of its scales and zeros, and add up what the tiles before owe to it, each a share of these (`owed`). What the tile just
// decided owes to the next is left, and is shared by all warps (`settle`): the only time that the first one waits.
//
//            | settle | first warp: decide tile t                                        |
//   tile t   |  all   | others: write out t - 1; fetch t + 1; sums of 0 .. t - 1 for t + 1 |
//
// Macros: ROWS (16 or 32), WARPS (of a CTA).

typedef unsigned char u8;
typedef long long i64;

constexpr int TILE = 32, CHUNK = 8, STAGES = 4;     // columns; rows of the matrix fetched at a time, and how many times
constexpr int SERVING = (WARPS - 1) * 32;           // threads: each has a row of every so many columns
constexpr int APART = SERVING / ROWS, EACH = (TILE + APART - 1) / APART;
constexpr int HIGH = ROWS / 4;                      // rows of a lane in a product; it has 4 columns
constexpr int PITCH = ROWS + 4;                     // floats between the columns of sums: lanes store to different banks
constexpr float MAGIC = 12582912.0f;                // 1.5 x 2^23: added and taken off again, it rounds half to even
constexpr int SWEEP = 0, DESCENT = 1, PRICED = 2;

struct Params {
    const float* given;   // E x S x R, pulls
    const float* matrix;  // E x C x C: R with H = R R^T, or H
    const float* scale;   // E x G x R
    const float* zero;    // E x G x R
    const i64* group;     // E x C; of a descent none: groups are equally wide
    const float* keep;    // E x C x R, 1 where a weight may differ from zero; or none
    const float* value;   // E x C x R: weights, or what they are rounded to so far
    const float* price;   // E, of a weight that is not zero
    float* delta;         // E x C x R, of a descent: brought up to date
    float* found;         // E x S x R, written: what columns moved by
    u8* codes;            // E x C x R, written
    float* total;         // E x R, added to: losses, or what they fall by
    int rows, all_columns, groups, start, columns, bottom, top;
    int blocks;   // CTAs of a layer
    int aligned;  // whether rows of the matrix can be read 4 floats at a time
};

// Shared memory, in floats. What begins with two: of this tile and of the next.
constexpr int WEIGHTS = TILE * ROWS, BLOCK = TILE * TILE;
constexpr int RING = STAGES * CHUNK * TILE;         // of a warp
constexpr int SUMS = TILE * PITCH;                  // of a warp; they lie where the rings are
constexpr int AT_LEVELS = 0;                        // 2 x TILE x ROWS x (1 / scale, scale, lowest, highest level)
constexpr int AT_NOW = AT_LEVELS + 8 * WEIGHTS;     // 2 x TILE x ROWS: what is to be decided, then the level
constexpr int AT_ZEROS = AT_NOW + 2 * WEIGHTS;      // 2 x TILE x ROWS
constexpr int AT_VALUES = AT_ZEROS + 2 * WEIGHTS;   // 2 x TILE x ROWS
constexpr int AT_OWN = AT_VALUES + 2 * WEIGHTS;     // 2 x TILE x TILE: the tile's rows of the matrix
constexpr int AT_PIVOTS = AT_OWN + 2 * BLOCK;       // 2 x TILE x (1 / pivot, pivot, price / pivot, 0)
constexpr int AT_BESIDE = AT_PIVOTS + 8 * TILE;     // TILE x TILE: the rows of the tile before
constexpr int AT_RINGS = AT_BESIDE + BLOCK;
constexpr int AT_FOUND = AT_RINGS + WARPS * (RING > SUMS ? RING : SUMS);  // S x ROWS; then the groups of S columns

extern __shared__ __align__(128) float memory[];

#include "async.cuh"

// Where a CTA, and a thread of it, stands.
struct Here {
    i64 layer, first;  // first: the slab's first column among all layers'
    int row, warp, lane, tiles;
    const float* slab;  // the slab's own block of the matrix

    __device__ explicit Here(const Params& p) {
        layer = blockIdx.x / p.blocks;
        row = blockIdx.x % p.blocks * ROWS;
        first = layer * p.all_columns + p.start;
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        tiles = (p.columns + TILE - 1) / TILE;
        slab = p.matrix + first * p.all_columns + p.start;
    }
    __device__ const int* groups() const { return (const int*)(memory + AT_FOUND + tiles * WEIGHTS); }
};

#include "slab_sums.cuh"
#include "slab_tiles.cuh"

template <int KIND>
__device__ __forceinline__ void go(const Params& p) {
    const Here here(p);
    int* groups = (int*)(memory + AT_FOUND + here.tiles * WEIGHTS);
    for (int c = threadIdx.x; c < here.tiles * TILE; c += WARPS * 32) {
        const int column = min(c, p.columns - 1);
        groups[c] = KIND == SWEEP ? (int)p.group[here.first + column] : (p.start + column) / (p.all_columns / p.groups);
    }
    float sums[4][HIGH] = {};
    const bool deciding = here.warp == 0 && here.lane < ROWS, inside = deciding && here.row + here.lane < p.rows;
    float* own_total = p.total + here.layer * p.rows + here.row + here.lane;
    float total = inside ? *own_total : 0.0f;
    __syncthreads();
    for (int tile = -1; tile < here.tiles; tile++) {
        if (tile > 0) settle(sums, here, tile);
#pragma unroll
        for (int i = 0; i < 4 * HIGH; i++) sums[i / HIGH][i % HIGH] = 0.0f;
        if (deciding && tile >= 0) total = decide<KIND>(tile, here.lane, total);
        if (here.warp) serve<KIND>(sums, p, here, tile);
        __syncthreads();
    }
    if (here.warp) {
        Back<KIND> back;
        back.look(p, here, here.tiles - 1);
        back.write(p, here, here.tiles - 1);
    }
    if (inside) *own_total = total;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) sweep_slab(const Params p) { go<SWEEP>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) descend_slab(const Params p) { go<DESCENT>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) descend_slab_priced(const Params p) { go<PRICED>(p); }
