// What is done with one tile: the first warp decides it, the others fetch it before and write it out after.

// What a column needs, asked for ahead: its own levels, value and pivot, two columns before.
template <int KIND>
struct Column {
    float4 level, pivot;
    float value;

    __device__ __forceinline__ void look(int parity, int j, int lane) {
        level = ((const float4*)(memory + AT_LEVELS))[parity * WEIGHTS + j * ROWS + lane];
        const float4* pivots = (const float4*)(memory + AT_PIVOTS) + parity * TILE;
        pivot.x = pivots[j].x, pivot.y = pivots[j].y;
        if (KIND == PRICED) pivot.z = pivots[j].z;
        value = memory[AT_VALUES + parity * WEIGHTS + j * ROWS + lane];
    }
    // The level for what is there now, and what the columns to come are to be told of; adds to the total.
    __device__ __forceinline__ float step(float now, float& found, float& total) const {
        const float goal = fmaf(now, pivot.x, value);
        float step = fminf(fmaxf(__fmul_rn(goal, level.x), level.z), level.w);
        step = __fadd_rn(__fadd_rn(step, MAGIC), -MAGIC);
        if (KIND == SWEEP) {
            found = fmaf(step, level.y, -value);
            const float left = fmaf(-found, pivot.y, now);
            total = fmaf(left, left, total);
            return step;
        }
        float made = __fmul_rn(step, level.y);
        if (KIND == PRICED) {  // what it takes off the loss against what it costs
            const bool pays = __fmul_rn(fmaf(2.0f, goal, -made), made) > pivot.z;
            step = pays ? step : 0.0f, made = pays ? made : 0.0f;
        }
        found = __fadd_rn(made, -value);  // exactly zero where nothing moves
        total = fmaf(found, fmaf(-found, pivot.y, __fadd_rn(now, now)), total);
        return step;
    }
};

// Row j of the tile's block of the matrix from column j + 1 on.
__device__ __forceinline__ void look_at_row(float4 (&row)[TILE / 4], int parity, int j) {
    const float4* rows = (const float4*)(memory + AT_OWN + parity * BLOCK) + j * (TILE / 4);
#pragma unroll
    for (int q = 0; q < TILE / 4; q++)
        if (q >= (j + 1) / 4) row[q] = rows[q];
}

// Inlined, it would share its registers with `serve`, which the compiler then spills.
template <int KIND>
__device__ __noinline__ float decide(int tile, int lane, float total) {
    const int parity = tile % 2;
    float* levels = memory + AT_NOW + parity * WEIGHTS + lane;
    float* found = memory + AT_FOUND + tile * WEIGHTS + lane;
    float now[TILE];
#pragma unroll
    for (int j = 0; j < TILE; j++) now[j] = levels[j * ROWS];
    Column<KIND> columns[3];
    float4 row[2][TILE / 4];
    columns[0].look(parity, 0, lane), columns[1].look(parity, 1, lane);
    look_at_row(row[0], parity, 0);
#pragma unroll
    for (int j = 0; j < TILE; j++) {
        if (j + 2 < TILE) columns[(j + 2) % 3].look(parity, j + 2, lane);
        if (j + 1 < TILE) look_at_row(row[(j + 1) % 2], parity, j + 1);
        float e;
        levels[j * ROWS] = columns[j % 3].step(now[j], e, total);
        found[j * ROWS] = e;
#pragma unroll
        for (int n = j + 1; n < TILE; n++) {
            const float4 m = row[j % 2][n / 4];
            now[n] = fmaf(n % 4 == 0 ? -m.x : n % 4 == 1 ? -m.y : n % 4 == 2 ? -m.z : -m.w, e, now[n]);
        }
    }
    return total;
}

// A serving thread's weights of a tile: in one row, in columns from `column` on, APART from each other.
struct Strip {
    int row, column;  // in the tile
    bool inside;      // whether there is such a row
    i64 here, step;   // from the slab's first weight in the layer; between two columns

    __device__ __forceinline__ Strip(const Params& p, const Here& here, int tile)
        : row(threadIdx.x % ROWS), column((threadIdx.x - 32) / ROWS), inside(here.row + row < p.rows),
          here((i64)(tile * TILE + column) * p.rows + here.row + row), step((i64)APART * p.rows) {}
    __device__ __forceinline__ bool has(const Params& p, int tile, int n) const {
        return inside && in_tile(n) && tile * TILE + column + n * APART < p.columns;
    }
    __device__ __forceinline__ bool in_tile(int n) const {
        return (n + 1) * APART <= TILE || column + n * APART < TILE;
    }
    __device__ __forceinline__ int place(int n) const { return (column + n * APART) * ROWS + row; }
};

// A tile to come: asked for at once (`look`), laid out when everything else is done (`put`). What does not exist is
// such that it moves by nothing.
template <int KIND>
struct Ahead {
    float now[EACH], scale[EACH], zero[EACH], keep[EACH], value[EACH], pivot, price;

    __device__ __forceinline__ void look(const Params& p, const Here& here, int tile) {
        const Strip strip(p, here, tile);
        const i64 in_layer = here.first * p.rows + strip.here, in_slab = here.layer * p.columns * p.rows + strip.here;
        const float* given = p.given + in_slab;
        const i64 table = here.layer * p.groups * p.rows + here.row + strip.row;
        const int* groups = here.groups() + tile * TILE + strip.column;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            const bool has = strip.has(p, tile, n);
            const i64 group = table + (has ? (i64)groups[n * APART] * p.rows : 0);
            now[n] = load_now(given + n * strip.step, has, 0.0f);
            scale[n] = load_now(p.scale + group, has, 1.0f), zero[n] = load_now(p.zero + group, has, 0.0f);
            keep[n] = has;
            if (p.keep) keep[n] = load_now(p.keep + in_layer + n * strip.step, has, 0.0f);
            value[n] = load_now(p.value + in_layer + n * strip.step, has, 0.0f);
        }
        const int j = tile * TILE + here.lane;
        pivot = load_now(here.slab + (i64)j * (p.all_columns + 1), j < p.columns, 0.0f);
        price = KIND == PRICED ? load_now(p.price + here.layer, true, 0.0f) : 0.0f;
    }
    __device__ __forceinline__ void put(const Params& p, const Here& here, int tile) const {
        const Strip strip(p, here, tile);
        float* to = memory + tile % 2 * WEIGHTS;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            if (!strip.in_tile(n)) break;
            const int place = strip.place(n);
            ((float4*)(memory + AT_LEVELS))[tile % 2 * WEIGHTS + place] = make_float4(
                1.0f / scale[n], scale[n], (p.bottom - zero[n]) * keep[n], (p.top - zero[n]) * keep[n]);
            to[AT_NOW + place] = now[n], to[AT_ZEROS + place] = zero[n];
            to[AT_VALUES + place] = value[n];
        }
        if (here.warp == 1) {
            const float inverse = tile * TILE + here.lane < p.columns ? 1.0f / pivot : 0.0f;
            ((float4*)(memory + AT_PIVOTS))[tile % 2 * TILE + here.lane] =
                make_float4(inverse, pivot, price * inverse, 0.0f);
        }
    }
};

// A tile that is decided, written out.
template <int KIND>
struct Back {
    float left[EACH];

    __device__ __forceinline__ void look(const Params& p, const Here& here, int tile) {
        const Strip strip(p, here, tile);
        const float* delta = p.delta + here.first * p.rows + strip.here;
#pragma unroll
        for (int n = 0; n < EACH; n++)
            if (KIND != SWEEP) left[n] = load_now(delta + n * strip.step, strip.has(p, tile, n), 0.0f);
    }
    __device__ __forceinline__ void write(const Params& p, const Here& here, int tile) const {
        const Strip strip(p, here, tile);
        const float* from = memory + tile % 2 * WEIGHTS;
        const i64 in_layer = here.first * p.rows + strip.here, in_slab = here.layer * p.columns * p.rows + strip.here;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            if (!strip.has(p, tile, n)) break;
            const int place = strip.place(n);
            const float found = memory[AT_FOUND + tile * WEIGHTS + place];
            p.found[in_slab + n * strip.step] = found;
            p.codes[in_layer + n * strip.step] = (u8)(int)(from[AT_NOW + place] + from[AT_ZEROS + place]);
            if (KIND != SWEEP) p.delta[in_layer + n * strip.step] = left[n] - found;
        }
    }
};

// All that the other warps do while the first one decides `tile`; before the first tile (-1) they fetch that.
template <int KIND>
__device__ __forceinline__ void serve(float (&sums)[4][HIGH], const Params& p, const Here& here, int tile) {
    const bool more = tile + 1 < here.tiles;
    Ahead<KIND> ahead;
    Back<KIND> back;
    if (more) {
        const int thread = threadIdx.x - 32, next = (tile + 1) * TILE;
        fetch<TILE, SERVING>(memory + AT_OWN + (tile + 1) % 2 * BLOCK, p, here.slab, next, next, thread);
        if (tile >= 0) fetch<TILE, SERVING>(memory + AT_BESIDE, p, here.slab, next - TILE, next, thread);
        ahead.look(p, here, tile + 1);
    }
    commit();
    if (tile > 0) back.look(p, here, tile - 1);
    if (more) owed(sums, p, here, tile);
    if (tile > 0) back.write(p, here, tile - 1);
    if (more) ahead.put(p, here, tile + 1);
    wait_but<0>();
}
