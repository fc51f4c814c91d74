"""Products with integer codes as Triton kernels: for GPUs that have no kernel of their own, and for small launches.

Codes of a row lie in 32-bit words, 32 // bits in each. A block is PLANE words wide: its words' lowest fields are its
first PLANE columns, the next fields the next PLANE, and so on. So every field of a tile of words is a tile of
neighbouring columns, and nothing is ever shuffled. Words are stored block by block, the words of a block one after
another, each for all rows: neighbouring rows are neighbours in memory. Scales and zeros are G x R likewise.

A code becomes a float by one bit operation and one multiply-add: 2^23 with the field OR-ed into its mantissa, where it
lies, is 2^23 + code * 2^at; times 2^-at, less 2^(23-at) + zero, that is code - zero, exactly. Such integers below 256
are exact in float16 and bfloat16 too; scales are put on float32 sums, so nothing is rounded but x and y.

Imported only where there is a GPU or Triton's interpreter.
Shapes: T tokens, R rows (outputs, padded), C columns (inputs), K words of a plane, G groups, S splits of the columns.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(0x4B000000)  # the bits of 2^23


@triton.jit
def values_of(words, shift: tl.constexpr, zero, BITS: tl.constexpr):
    """code - zero in float32, of the field at `shift` of each word."""
    if shift + BITS > 23:
        words = words >> 16
    at: tl.constexpr = shift - 16 if shift + BITS > 23 else shift
    field = words & (((1 << BITS) - 1) << at)
    return (field | MAGIC).to(tl.float32, bitcast=True) * (1.0 / (1 << at)) - (zero + (1 << (23 - at)))


@triton.jit
def product(
    x_ptr,  # T x C, of whole blocks
    words_ptr,  # int32, blocks x PLANE x R
    scale_ptr,  # G x R
    zero_ptr,  # G x R, uint8; not read without HAS_ZEROS
    bias_ptr,  # R; not read without HAS_BIAS
    out_ptr,  # T x rows, or S x T x rows in float32 when PARTIAL
    tokens,
    rows,  # of the output
    padded,  # of words and scales
    blocks,
    groups,
    width,  # columns of a group
    chunk,  # blocks of a split
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    SPAN: tl.constexpr,  # columns that share a scale within a block, always
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    CODES: tl.constexpr = 32 // BITS
    BLOCK: tl.constexpr = CODES * PLANE
    PLANES: tl.constexpr = SPAN // PLANE
    token_T = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    plane_K = tl.arange(0, PLANE)
    # Tokens beyond the last are the last one again, and not stored: no load has to ask.
    x_T = x_ptr + tl.minimum(token_T, tokens - 1).to(tl.int64) * (blocks * BLOCK)
    sum_TR = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for block in range(split * chunk, tl.minimum((split + 1) * chunk, blocks)):
        word_K = (plane_K + block * PLANE).to(tl.int64)
        words_KR = tl.load(words_ptr + word_K[:, None] * padded + row_R[None, :])
        for span in tl.static_range(BLOCK // SPAN):
            group = tl.minimum((block * BLOCK + span * SPAN) // width, groups - 1)  # beyond the columns: x is zero
            scale_R = tl.load(scale_ptr + group * padded + row_R).to(tl.float32)
            zero_R = tl.full((ROWS,), 1 << (BITS - 1), dtype=tl.float32)
            if HAS_ZEROS:
                zero_R = tl.load(zero_ptr + group * padded + row_R).to(tl.float32)
            part_TR = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
            for plane in tl.static_range(PLANES):
                column_K = plane_K + (block * BLOCK + (span * PLANES + plane) * PLANE)
                x_TK = tl.load(x_T[:, None] + column_K[None, :])
                values_KR = values_of(words_KR, (span * PLANES + plane) * BITS, zero_R[None, :], BITS)
                part_TR = tl.dot(x_TK, values_KR.to(x_TK.dtype), part_TR)
            sum_TR += part_TR * scale_R[None, :]
    at_TR = token_T.to(tl.int64)[:, None] * rows + row_R[None, :]
    inside_TR = (token_T < tokens)[:, None] & (row_R < rows)[None, :]
    if PARTIAL:
        tl.store(out_ptr + split.to(tl.int64) * tokens * rows + at_TR, sum_TR, mask=inside_TR)
    else:
        if HAS_BIAS:
            sum_TR += tl.load(bias_ptr + row_R, mask=row_R < rows, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + at_TR, sum_TR.to(out_ptr.dtype.element_ty), mask=inside_TR)


@triton.jit
def combine(
    part_ptr,  # S x T x rows
    bias_ptr,  # rows; not read without HAS_BIAS
    out_ptr,  # T x rows
    size,  # T x rows
    rows,
    splits,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < size
    total = tl.zeros((TILE,), dtype=tl.float32)
    for split in range(0, splits):
        total += tl.load(part_ptr + split * size + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def floats(
    words_ptr,  # int32, blocks x PLANE x R
    scale_ptr,  # G x R
    zero_ptr,  # G x R, uint8; not read without HAS_ZEROS
    out_ptr,  # rows x C, written
    rows,
    padded,
    columns,
    groups,
    width,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
):
    CODES: tl.constexpr = 32 // BITS
    block = tl.program_id(1)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    plane_K = tl.arange(0, PLANE)
    word_K = (plane_K + block * PLANE).to(tl.int64)
    words_RK = tl.load(words_ptr + word_K[None, :] * padded + row_R[:, None])
    for plane in tl.static_range(CODES):
        first = (block * CODES + plane) * PLANE
        group = tl.minimum(first // width, groups - 1)
        scale_R = tl.load(scale_ptr + group * padded + row_R).to(tl.float32)
        zero_R = tl.full((ROWS,), 1 << (BITS - 1), dtype=tl.float32)
        if HAS_ZEROS:
            zero_R = tl.load(zero_ptr + group * padded + row_R).to(tl.float32)
        values_RK = values_of(words_RK, plane * BITS, zero_R[:, None], BITS) * scale_R[:, None]
        column_K = plane_K + first
        inside_RK = (row_R < rows)[:, None] & (column_K < columns)[None, :]
        at_RK = row_R.to(tl.int64)[:, None] * columns + column_K[None, :]
        tl.store(out_ptr + at_RK, values_RK.to(out_ptr.dtype.element_ty), mask=inside_RK)
