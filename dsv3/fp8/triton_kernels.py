"""FP8 kernels for GPUs, in Triton: the code that runs on the device. Who starts them is in triton_launch.py.

They are the formulas of formats.py, quantise.py, e5m6.py and gemm.py, fused with the reading and turning around them,
and agree with those bit for bit where they quantise. Offsets of rows are 64-bit: 262,144 rows of 18,432 numbers are
more than 32 bits count. `no_type_check` keeps checkers of types and shapes away from functions that Triton compiles
from their source, which they would hide.
"""

from typing import no_type_check

from dsv3.errors import MissingExtraError
from dsv3.fp8.formats import POWER_OF_TWO_LOW_BITS, SCALE_LOW_BITS

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor
except ImportError as error:
    raise MissingExtraError(package="triton", extra="dev", purpose="FP8 on a GPU") from error

INFINITY_BITS = tl.constexpr(0x7F80_0000)
SMALLEST_SCALE_BITS = tl.constexpr((127 - 100) << 23)  # formats.SMALLEST_SCALE
LOW_BITS = tl.constexpr(SCALE_LOW_BITS)
LOW_BITS_POWER_OF_TWO = tl.constexpr(POWER_OF_TWO_LOW_BITS)
DEPTH = tl.constexpr(128)  # formats.TILE


@triton.jit
@no_type_check
def magnitude_bits(x):
    """Return |x| as an integer: ordered as the numbers are, infinity above all of them and NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFF_FFFF


@triton.jit
@no_type_check
def scale_from(largest_bits, largest_of_format: tl.constexpr, power_of_two: tl.constexpr):
    """Return `formats.scale_for` of a tile whose largest magnitude has the given bits."""
    exact = tl.div_rn(largest_bits.to(tl.float32, bitcast=True), largest_of_format)
    bits = exact.to(tl.int32, bitcast=True)
    low = LOW_BITS_POWER_OF_TWO if power_of_two else LOW_BITS
    rounded = tl.maximum((bits + low) & ~low, SMALLEST_SCALE_BITS)
    return tl.where(bits >= INFINITY_BITS, bits, rounded).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def quantise_rows(
    x, values, scales, num_rows, num_columns, x_row, x_column, scale_row, scale_column,
    largest_of_format: tl.constexpr, power_of_two: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """1 x 128: one program for a few rows of one column of tiles."""
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * DEPTH + tl.arange(0, DEPTH)
    there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    read = tl.load(x + rows[:, None] * x_row + columns[None, :] * x_column, mask=there, other=0).to(tl.float32)
    scale = scale_from(tl.max(magnitude_bits(read), axis=1), largest_of_format, power_of_two)
    quantised = tl.div_rn(read, scale[:, None]).to(values.dtype.element_ty)
    tl.store(values + rows[:, None] * num_columns + columns[None, :], quantised, mask=there)
    tl.store(scales + rows * scale_row + tile * scale_column, scale, mask=rows < num_rows)


@triton.jit
@no_type_check
def quantise_swiglu(
    gate_up, factors, values, scales, num_rows, width, gate_up_row, scale_row, scale_column,
    has_factors: tl.constexpr, largest_of_format: tl.constexpr, power_of_two: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """1 x 128 of silu(gate) * up * factor, which is computed in FP32 and never stored."""
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * DEPTH + tl.arange(0, DEPTH)
    there = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = gate_up + rows[:, None] * gate_up_row + columns[None, :]
    gate = tl.load(at, mask=there, other=0).to(tl.float32)
    up = tl.load(at + width, mask=there, other=0).to(tl.float32)
    active = gate / (1 + tl.exp(-gate)) * up
    if has_factors:
        active *= tl.load(factors + rows, mask=rows < num_rows, other=0).to(tl.float32)[:, None]
    scale = scale_from(tl.max(magnitude_bits(active), axis=1), largest_of_format, power_of_two)
    quantised = tl.div_rn(active, scale[:, None]).to(values.dtype.element_ty)
    tl.store(values + rows[:, None] * width + columns[None, :], quantised, mask=there)
    tl.store(scales + rows * scale_row + tile * scale_column, scale, mask=rows < num_rows)


@triton.jit
@no_type_check
def quantise_blocks(
    x, values, scales, num_rows, num_columns, x_matrix, x_row, x_column,
    largest_of_format: tl.constexpr, power_of_two: tl.constexpr,
):  # fmt: skip
    """128 x 128: one program for a block of one of several matrices."""
    matrix = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)).to(tl.int64)
    columns = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = x + matrix * x_matrix + rows[:, None] * x_row + columns[None, :] * x_column
    read = tl.load(at, mask=there, other=0).to(tl.float32)
    scale = scale_from(tl.max(tl.max(magnitude_bits(read), axis=1), axis=0), largest_of_format, power_of_two)
    quantised = tl.div_rn(read, tl.broadcast_to(scale, read.shape)).to(values.dtype.element_ty)
    to = values + (matrix * num_rows + rows[:, None]) * num_columns + columns[None, :]
    tl.store(to, quantised, mask=there)
    block = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scales + block, scale)


@triton.jit
@no_type_check
def quantise_over_tokens(
    x, x_scales, tile_starts, values, scales, num_columns, num_tiles, x_row, x_column, x_scale_row, x_scale_column,
    is_quantised: tl.constexpr, largest_of_format: tl.constexpr, power_of_two: tl.constexpr,
    block_columns: tl.constexpr,
):  # fmt: skip
    """128 x 1, turned: one program reads the tokens of one tile in a few columns, and writes those columns as rows.

    Each tile takes 128 places of a row of `values`, filled up with zeros, and one of `scales`, which lie tile by tile.
    `x` is numbers, or 1 x 128 tiles of FP8 with their scales, which are dequantised on the way (report 3.5.2).
    """
    tile = tl.program_id(0)
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    begin, end = tl.load(tile_starts + tile), tl.load(tile_starts + tile + 1)
    tokens = (begin + tl.arange(0, DEPTH)).to(tl.int64)
    there = (tokens < end)[:, None] & (columns < num_columns)[None, :]
    read = tl.load(x + tokens[:, None] * x_row + columns[None, :] * x_column, mask=there, other=0.0).to(tl.float32)
    if is_quantised:
        of_tile = x_scales + (tl.program_id(1) * block_columns // DEPTH) * x_scale_column
        read *= tl.load(of_tile + tokens * x_scale_row, mask=tokens < end, other=0)[:, None]
    scale = scale_from(tl.max(magnitude_bits(read), axis=0), largest_of_format, power_of_two)
    quantised = tl.trans(tl.div_rn(read, scale[None, :]).to(values.dtype.element_ty))
    places = tile * DEPTH + tl.arange(0, DEPTH)
    to = values + columns[:, None].to(tl.int64) * (num_tiles * DEPTH) + places[None, :]
    tl.store(to, quantised, mask=(columns < num_columns)[:, None])
    tl.store(scales + tile.to(tl.int64) * num_columns + columns, scale, mask=columns < num_columns)


@triton.jit
@no_type_check
def dequantise_tiles(
    values, scales, output, num_rows, num_columns, value_matrix, value_row, value_column, scale_matrix, scale_row,
    scale_column, tile_rows: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """Values times the scale of their tile, which is 1 or 128 rows high and 128 columns wide."""
    matrix, tile = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    columns = tile * DEPTH + tl.arange(0, DEPTH)
    there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = values + matrix * value_matrix + rows[:, None] * value_row + columns[None, :] * value_column
    of_tile = scales + matrix * scale_matrix + tile * scale_column
    scale = tl.load(of_tile + rows // tile_rows * scale_row, mask=rows < num_rows, other=0)
    number = tl.load(at, mask=there, other=0.0).to(tl.float32) * scale[:, None]
    to = output + (matrix * num_rows + rows[:, None]) * num_columns + columns[None, :]
    tl.store(to, number.to(output.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def e5m6_codes(x):
    """Return the 12 bits of the nearest E5M6 number, ties to even, for magnitudes up to its largest, or NaN."""
    bits = magnitude_bits(x)
    sign = (x.to(tl.int32, bitcast=True) >> 31 & 1) << 11
    # 17 of FP32's 23 mantissa bits go; the exponent moves from bias 127 to 15. A carry out of the mantissa is right.
    normal = ((bits + 0xFFFF + (bits >> 17 & 1)) >> 17) - (112 << 6)
    # Below 2^-14 the step is 2^-20: adding 2^3, whose last bit that is, leaves the rounded multiple in the low bits.
    small = (bits.to(tl.float32, bitcast=True) + 8.0).to(tl.int32, bitcast=True) & 0x7F_FFFF
    code = tl.where(bits < (113 << 23), small, normal)
    return tl.where(bits > INFINITY_BITS, 0x7E0, code) | sign


@triton.jit
@no_type_check
def quantise_e5m6(
    x, packed, scales, num_rows, num_columns, x_row, x_column, packed_row, scale_row, scale_column,
    largest_of_format: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """E5M6 in 1 x 128 tiles: eight codes of 12 bits fill three words of 32, which are written whole.

    `packed` is words, and `packed_row` counts them: bytes of a row begin at multiples of 4, whatever its length.
    """
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * DEPTH + tl.arange(0, DEPTH)
    there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    read = tl.load(x + rows[:, None] * x_row + columns[None, :] * x_column, mask=there, other=0).to(tl.float32)
    scale = scale_from(tl.max(magnitude_bits(read), axis=1), largest_of_format, True)
    # A column that is not there is +0 even where NaN of its tile would make it NaN.
    codes = tl.where(there, e5m6_codes(tl.div_rn(read, scale[:, None])), 0)
    codes = tl.reshape(codes, (block_rows, DEPTH // 8, 8))
    eights = tile * (DEPTH // 8) + tl.arange(0, DEPTH // 8)
    write = (rows < num_rows)[:, None] & (eights * 8 < num_columns)[None, :]
    for word in tl.static_range(3):
        # Where the first bit of each code lies, seen from this word; what falls outside of it is another's.
        up = (tl.arange(0, 8) * 12 - 32 * word)[None, None, :]
        raised, lowered = codes << tl.minimum(tl.maximum(up, 0), 31), codes >> tl.minimum(tl.maximum(-up, 0), 31)
        bits = tl.where((up < 32) & (up > -12), tl.where(up >= 0, raised, lowered), 0)
        to = packed + rows[:, None] * packed_row + 3 * eights[None, :] + word
        tl.store(to, tl.sum(bits, axis=2), mask=write)
    tl.store(scales + rows * scale_row + tile * scale_column, scale, mask=rows < num_rows)


@triton.jit
@no_type_check
def dequantise_e5m6(
    packed, scales, output, num_rows, num_columns, packed_row, scale_row, scale_column, block_rows: tl.constexpr,
):  # fmt: skip
    """Back to numbers: 12 bits are FP16 without its lowest four."""
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    tile = tl.program_id(1)
    columns = tile * DEPTH + tl.arange(0, DEPTH)
    there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = packed + rows[:, None] * packed_row + (columns // 2 * 3 + columns % 2)[None, :]
    here, after = tl.load(at, mask=there, other=0).to(tl.int32), tl.load(at + 1, mask=there, other=0).to(tl.int32)
    code = tl.where((columns % 2 == 0)[None, :], here | (after & 0xF) << 8, here >> 4 | after << 4)
    number = (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.load(scales + rows * scale_row + tile * scale_column, mask=rows < num_rows, other=0)
    to = output + rows[:, None] * num_columns + columns[None, :]
    tl.store(to, (number * scale[:, None]).to(output.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def turn(x, output, num_rows, num_columns, x_matrix, x_column):
    """Columns that lie one after the other become rows: bytes of matrices, one program for a block of 128 x 128."""
    matrix = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)).to(tl.int64)
    columns = (tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)).to(tl.int64)
    at = x + matrix * x_matrix + columns[:, None] * x_column + rows[None, :]
    read = tl.load(at, mask=(columns < num_columns)[:, None] & (rows < num_rows)[None, :], other=0)
    to = output + (matrix * num_rows + rows[:, None]) * num_columns + columns[None, :]
    tl.store(to, tl.trans(read), mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@triton.jit
@no_type_check
def sum_over_depth(
    a, b, a_row, b_row, first, num_tiles, a_scales, b_scales, a_scale_step, b_scale_step,
    b_has_one_scale: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """Return a @ b.T: 128 products in the tensor core, then times the scales into FP32 registers (report 3.3.2).

    `a` and `b` are descriptors, read from tile `first` of the depth on; what lies outside them is read as zeros.
    `a_scales` and `b_scales` point at the scales of that tile: one for each row of a, and one for all rows of b or one
    for each.
    """
    total = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for tile in range(num_tiles):
        # A fresh accumulator each time: here the tensor core's own sum ends.
        part = tl.dot(a.load([a_row, (first + tile) * DEPTH]), b.load([b_row, (first + tile) * DEPTH]).T)
        # With one scale for all of b the product of scales is a row's, and all else one operation for each number.
        if b_has_one_scale:
            total += part * (tl.load(a_scales) * tl.load(b_scales))[:, None]
        else:
            total += part * tl.load(a_scales)[:, None] * tl.load(b_scales)[None, :]
        a_scales += a_scale_step
        b_scales += b_scale_step
    return total


@triton.jit
@no_type_check
def multiply_groups(
    a, b, a_scales, b_scales, row_tiles, output, num_row_tiles, num_columns, num_tiles,
    a_scale_row, a_scale_tile, b_scale_matrix, b_scale_row, b_scale_tile,
    a_tile_rows: tl.constexpr, b_tile_rows: tl.constexpr, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """Rows of each group times the group's own matrix; those of all groups lie one below the other in `b`.

    `row_tiles` has for each tile of rows (group, first row, end of the group's rows). Programs walk down 8 tiles of
    rows before they step to the next columns, so that what they read is still in the cache. Rows and columns beyond the
    edge are those of the next group, and not written.
    """
    program, across = tl.program_id(0), tl.cdiv(num_columns, block_columns)
    strip = program // (8 * across)
    height = tl.minimum(num_row_tiles - strip * 8, 8)
    entry = row_tiles + 3 * (strip * 8 + program % (8 * across) % height)
    group, begin, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    column = program % (8 * across) // height * block_columns

    rows, columns = begin + tl.arange(0, block_rows), column + tl.arange(0, block_columns)
    a_scales += tl.minimum(rows, end - 1).to(tl.int64) // a_tile_rows * a_scale_row
    b_scales += group.to(tl.int64) * b_scale_matrix
    if b_tile_rows == 1:
        b_scales += tl.minimum(columns, num_columns - 1).to(tl.int64) * b_scale_row
    else:
        b_scales += (column // b_tile_rows).to(tl.int64) * b_scale_row
    total = sum_over_depth(
        a, b, begin, group * num_columns + column, 0, num_tiles, a_scales, b_scales, a_scale_tile, b_scale_tile,
        b_tile_rows != 1, block_rows, block_columns,
    )  # fmt: skip
    to = output + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(to, total.to(output.dtype.element_ty), mask=(rows < end)[:, None] & (columns < num_columns)[None, :])


@triton.jit
@no_type_check
def multiply_over_tokens(
    a, b, a_scales, b_scales, group_tiles, output, num_a_rows, num_b_rows, a_scale_row, a_scale_tile,
    b_scale_row, b_scale_tile, block_rows: tl.constexpr, block_columns: tl.constexpr,
):  # fmt: skip
    """Wgrad: for each group a_g @ b_g.T over its tiles of tokens.

    `group_tiles` has the first tile of each group. Every tile takes 128 columns of both operands and is filled up with
    zeros, so there is no edge along the depth.
    """
    group = tl.program_id(2)
    first, last = tl.load(group_tiles + group), tl.load(group_tiles + group + 1)
    row, column = tl.program_id(0) * block_rows, tl.program_id(1) * block_columns
    rows, columns = row + tl.arange(0, block_rows), column + tl.arange(0, block_columns)
    a_scales += tl.minimum(rows, num_a_rows - 1).to(tl.int64) * a_scale_row + first * a_scale_tile
    b_scales += tl.minimum(columns, num_b_rows - 1).to(tl.int64) * b_scale_row + first * b_scale_tile
    total = sum_over_depth(
        a, b, row, column, first, last - first, a_scales, b_scales, a_scale_tile, b_scale_tile,
        False, block_rows, block_columns,
    )  # fmt: skip
    to = output + (group.to(tl.int64) * num_a_rows + rows[:, None]) * num_b_rows + columns[None, :]
    tl.store(to, total, mask=(rows < num_a_rows)[:, None] & (columns < num_b_rows)[None, :])
