"""What stands between products on a GPU, in Triton: the code that runs on the device. on_gpu.py starts it.

Each kernel reads its numbers once, computes in FP32 and writes once, where torch has a pass for every operation.
Nothing is added up by atomics, so that results have the same bits every time. `no_type_check` keeps checkers of types
and shapes away from functions that Triton compiles from their source, which they would hide.
"""

from typing import no_type_check

from dsv3.errors import MissingExtraError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingExtraError(package="triton", extra="dev", purpose="kernels on a GPU") from error


@triton.jit
@no_type_check
def rms_norm_forward(
    x, weight, output, inverse, num_rows, dim, x_row, eps, block_rows: tl.constexpr, block: tl.constexpr
):
    """`weight * x / rms(x)`, whose division rounds to the type of x before the weight multiplies, as published."""
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    columns = tl.arange(0, block)
    there = (rows < num_rows)[:, None] & (columns < dim)[None, :]
    read = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=there, other=0).to(tl.float32)
    factor = 1 / tl.sqrt_rn(tl.sum(read * read, axis=1) / dim + eps)
    normed = (read * factor[:, None]).to(output.dtype.element_ty).to(tl.float32)
    made = normed * tl.load(weight + columns, mask=columns < dim, other=0).to(tl.float32)[None, :]
    tl.store(output + rows[:, None] * dim + columns[None, :], made.to(output.dtype.element_ty), mask=there)
    tl.store(inverse + rows, factor, mask=rows < num_rows)


@triton.jit
@no_type_check
def rms_norm_backward(
    slope, x, weight, inverse, of_x, of_weight, num_rows, dim, x_row, rows_of_program,
    block_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Each program walks over some rows and has one row of `of_weight`, the sum of its own, to be added up after."""
    columns = tl.arange(0, block)
    inside = columns < dim
    gain = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    begin = tl.program_id(0) * rows_of_program
    end = tl.minimum(begin + rows_of_program, num_rows)
    for first in range(begin, end, block_rows):
        rows = (first + tl.arange(0, block_rows)).to(tl.int64)
        there = (rows < end)[:, None] & inside[None, :]
        at = rows[:, None] * dim + columns[None, :]
        down = tl.load(slope + at, mask=there, other=0).to(tl.float32)
        read = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=there, other=0).to(tl.float32)
        factor = tl.load(inverse + rows, mask=rows < end, other=0)[:, None]
        normed, scaled = read * factor, down * gain[None, :]
        mean = tl.sum(scaled * normed, axis=1)[:, None] / dim
        tl.store(of_x + at, (factor * (scaled - normed * mean)).to(of_x.dtype.element_ty), mask=there)
        total += tl.sum(down * normed, axis=0)
    tl.store(of_weight + tl.program_id(0).to(tl.int64) * dim + columns, total, mask=inside)


@triton.jit
@no_type_check
def swiglu_forward(gate, up, factors, output, width, gate_row, has_factors: tl.constexpr, block: tl.constexpr):
    """silu(gate) * up * factor of one row's block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    g = tl.load(gate + row * gate_row + columns, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * gate_row + columns, mask=inside, other=0).to(tl.float32)
    made = g / (1 + tl.exp(-g)) * u
    if has_factors:
        made *= tl.load(factors + row).to(tl.float32)
    tl.store(output + row * width + columns, made.to(output.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def swiglu_backward(
    slope, gate, up, factors, of_gate, of_up, of_factors, width, gate_row, has_factors: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """One program for a row, since the gradient of its factor is a sum over all of it."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row).to(tl.float32) if has_factors else 1.0
    total = 0.0
    for first in range(0, width, block):
        columns = first + tl.arange(0, block)
        inside = columns < width
        g = tl.load(gate + row * gate_row + columns, mask=inside, other=0).to(tl.float32)
        u = tl.load(up + row * gate_row + columns, mask=inside, other=0).to(tl.float32)
        down = tl.load(slope + row * width + columns, mask=inside, other=0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-g))
        active = g * sigmoid
        to_gate = down * factor * u * sigmoid * (1 + g * (1 - sigmoid))
        at = row * gate_row + columns
        tl.store(of_gate + at, to_gate.to(of_gate.dtype.element_ty), mask=inside)
        tl.store(of_up + at, (down * factor * active).to(of_up.dtype.element_ty), mask=inside)
        if has_factors:
            total += tl.sum(down * active * u)
    if has_factors:
        tl.store(of_factors + row, total.to(of_factors.dtype.element_ty))


@triton.jit
@no_type_check
def sum_rows(rows, origin, output, dim, num_chosen: tl.constexpr, block: tl.constexpr):
    """For each token the sum of its rows, added in FP32 in the order of `origin`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < dim
    total = tl.zeros((block,), dtype=tl.float32)
    for choice in range(num_chosen):
        row = tl.load(origin + token * num_chosen + choice).to(tl.int64)
        total += tl.load(rows + row * dim + columns, mask=inside, other=0).to(tl.float32)
    tl.store(output + token * dim + columns, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def attention_inputs(
    query, key_value, rope_key, cos, sin, to_query, to_key, to_value, heads,
    nope: tl.constexpr, rope: tl.constexpr, value: tl.constexpr,
    block_nope: tl.constexpr, block_pair: tl.constexpr, block_value: tl.constexpr,
):  # fmt: skip
    """Queries and keys of one token's head as attention reads them, the rope part of both turned; values beside them.

    Query and key hold `nope` numbers, then `rope`.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    qk = nope + rope
    plain, pair = tl.arange(0, block_nope), tl.arange(0, block_pair)
    has_pair = pair < rope // 2
    c = tl.load(cos + token * (rope // 2) + pair, mask=has_pair, other=0)
    s = tl.load(sin + token * (rope // 2) + pair, mask=has_pair, other=0)
    kv = key_value + (token * heads + head) * (nope + value)
    key = to_key + (token * heads + head) * qk
    tl.store(key + plain, tl.load(kv + plain, mask=plain < nope), mask=plain < nope)
    even = tl.load(rope_key + token * rope + 2 * pair, mask=has_pair, other=0).to(tl.float32)
    odd = tl.load(rope_key + token * rope + 2 * pair + 1, mask=has_pair, other=0).to(tl.float32)
    turned_even, turned_odd = even * c - odd * s, even * s + odd * c
    tl.store(key + nope + 2 * pair, turned_even.to(to_key.dtype.element_ty), mask=has_pair)
    tl.store(key + nope + 2 * pair + 1, turned_odd.to(to_key.dtype.element_ty), mask=has_pair)
    columns = tl.arange(0, block_value)
    read = tl.load(kv + nope + columns, mask=columns < value)
    tl.store(to_value + (token * heads + head) * value + columns, read, mask=columns < value)
    source, target = query + (token * heads + head) * qk, to_query + (token * heads + head) * qk
    tl.store(target + plain, tl.load(source + plain, mask=plain < nope), mask=plain < nope)
    even = tl.load(source + nope + 2 * pair, mask=has_pair, other=0).to(tl.float32)
    odd = tl.load(source + nope + 2 * pair + 1, mask=has_pair, other=0).to(tl.float32)
    turned_even, turned_odd = even * c - odd * s, even * s + odd * c
    tl.store(target + nope + 2 * pair, turned_even.to(to_query.dtype.element_ty), mask=has_pair)
    tl.store(target + nope + 2 * pair + 1, turned_odd.to(to_query.dtype.element_ty), mask=has_pair)


@triton.jit
@no_type_check
def attention_inputs_backward(
    of_query, of_key, of_value, cos, sin, to_query, to_key_value, to_rope_key, heads,
    nope: tl.constexpr, rope: tl.constexpr, value: tl.constexpr,
    block_nope: tl.constexpr, block_pair: tl.constexpr, block_value: tl.constexpr,
):  # fmt: skip
    """The way back, one program for a token: rope parts are turned back, and the shared key's summed over the heads."""
    token = tl.program_id(0).to(tl.int64)
    qk = nope + rope
    plain, pair, columns = tl.arange(0, block_nope), tl.arange(0, block_pair), tl.arange(0, block_value)
    has_pair = pair < rope // 2
    c = tl.load(cos + token * (rope // 2) + pair, mask=has_pair, other=0)
    s = tl.load(sin + token * (rope // 2) + pair, mask=has_pair, other=0)
    total_even, total_odd = tl.zeros((block_pair,), dtype=tl.float32), tl.zeros((block_pair,), dtype=tl.float32)
    for head in range(heads):
        at = token * heads + head
        key, kv = of_key + at * qk, to_key_value + at * (nope + value)
        tl.store(kv + plain, tl.load(key + plain, mask=plain < nope), mask=plain < nope)
        total_even += tl.load(key + nope + 2 * pair, mask=has_pair, other=0).to(tl.float32)
        total_odd += tl.load(key + nope + 2 * pair + 1, mask=has_pair, other=0).to(tl.float32)
        read = tl.load(of_value + at * value + columns, mask=columns < value)
        tl.store(kv + nope + columns, read, mask=columns < value)
        source, target = of_query + at * qk, to_query + at * qk
        tl.store(target + plain, tl.load(source + plain, mask=plain < nope), mask=plain < nope)
        even = tl.load(source + nope + 2 * pair, mask=has_pair, other=0).to(tl.float32)
        odd = tl.load(source + nope + 2 * pair + 1, mask=has_pair, other=0).to(tl.float32)
        tl.store(target + nope + 2 * pair, (even * c + odd * s).to(to_query.dtype.element_ty), mask=has_pair)
        tl.store(target + nope + 2 * pair + 1, (odd * c - even * s).to(to_query.dtype.element_ty), mask=has_pair)
    back_even, back_odd = total_even * c + total_odd * s, total_odd * c - total_even * s
    shared = to_rope_key + token * rope + 2 * pair
    tl.store(shared, back_even.to(to_rope_key.dtype.element_ty), mask=has_pair)
    tl.store(shared + 1, back_odd.to(to_rope_key.dtype.element_ty), mask=has_pair)


@triton.jit
@no_type_check
def cross_entropy_rows(logits, targets, coefficients, losses, vocab, wants_slopes: tl.constexpr, block: tl.constexpr):
    """-log softmax(logits)[target] of one row and, in the memory of the logits, its gradient times the coefficient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    target = tl.load(targets + row)
    # Kept for each column of a block by itself until the end: one exponential for a number, and no waiting on sums.
    largest = tl.full((block,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    for first in range(0, vocab, block):
        columns = first + tl.arange(0, block)
        read = tl.load(logits + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, read)
        # A column of which nothing but -inf was seen has no exponent to take.
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - base) + tl.exp(read - base)
        largest = above
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    tl.store(losses + row, log_sum - tl.load(logits + target).to(tl.float32))
    if wants_slopes:
        coefficient = tl.load(coefficients + row)
        for first in range(0, vocab, block):
            columns = first + tl.arange(0, block)
            read = tl.load(logits + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
            slope = (tl.exp(read - log_sum) - tl.where(columns == target, 1.0, 0.0)) * coefficient
            tl.store(logits + columns, slope.to(logits.dtype.element_ty), mask=columns < vocab)


@triton.jit
@no_type_check
def adamw(
    master, gradient, first_moment, second_moment, num, scale, rate, beta1, beta2, first_correction, second_correction,
    epsilon, kept, block: tl.constexpr,
):  # fmt: skip
    """One step of AdamW on consecutive weights; `kept` is what weight decay leaves of them."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < num
    slope = tl.load(gradient + at, mask=inside, other=0) * scale
    first = tl.load(first_moment + at, mask=inside, other=0).to(tl.float32)
    second = tl.load(second_moment + at, mask=inside, other=0).to(tl.float32)
    first = beta1 * first + (1 - beta1) * slope
    second = beta2 * second + (1 - beta2) * slope * slope
    weight = tl.load(master + at, mask=inside, other=0) * kept
    weight -= rate * (first / first_correction) / (tl.sqrt(second) / second_correction + epsilon)
    tl.store(first_moment + at, first.to(first_moment.dtype.element_ty), mask=inside)
    tl.store(second_moment + at, second.to(second_moment.dtype.element_ty), mask=inside)
    tl.store(master + at, weight, mask=inside)
