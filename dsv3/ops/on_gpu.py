"""Starts the Triton kernels between products: allocates their results and cuts the work into programs."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.native.triton_start import start_kernel

TYPES = (torch.bfloat16, torch.float16, torch.float32)
ELEMENTS = 4096
"""Numbers that one program has in registers, or so."""
PROGRAMS = 264
"""That share the rows of a backward pass whose sums over rows are added up afterwards: two for each multiprocessor."""


def usable(*tensors: Tensor) -> bool:
    """Whether these kernels serve tensors: of at most FP32, on a GPU, real memory behind them, and Triton at hand."""
    plain = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cuda" and tensor.dtype in TYPES
        for tensor in tensors
    )
    return plain and not torch.compiler.is_compiling() and _has_triton()


def runs_on_gpu(x: Tensor) -> bool:
    """Whether a tensor that one of our kernels serves is on a GPU; else it is on a CPU, and served by C++."""
    return x.device.type == "cuda"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def attends_to_narrow_values(query: Float[Tensor, "token head qk"], value: Float[Tensor, "key head v"]) -> bool:
    """Whether torch's attention on this GPU takes values that are narrower than keys without holding the scores."""
    if query.device.type != "cuda" or type(query) is not Tensor:
        return False
    q, v = (x.detach()[None].transpose(1, 2) for x in (query, value))
    params = torch.backends.cuda.SDPAParams(q, q, v, None, 0.0, True, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def rms_norm_forward(
    x: Float[Tensor, "row dim"], *, weight: Float[Tensor, " dim"], eps: float
) -> tuple[Float[Tensor, "row dim"], Float[Tensor, " row"]]:
    """Return the normed rows, and 1 / rms of each."""
    rows, dim = x.shape
    output = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    shape = _rows_at_once(dim)
    _start(
        "rms_norm_forward",
        (-(-rows // shape["block_rows"]),),
        x, weight, output, inverse, rows, dim, x.stride(0), eps, **shape,
    )  # fmt: skip
    return output, inverse


def rms_norm_backward(
    slope: Float[Tensor, "row dim"],
    *,
    x: Float[Tensor, "row dim"],
    weight: Float[Tensor, " dim"],
    inverse: Float[Tensor, " row"],
) -> tuple[Float[Tensor, "row dim"], Float[Tensor, " dim"]]:
    """Return the gradients of rows and weight."""
    rows, dim = x.shape
    shape = _rows_at_once(dim)
    each = max(shape["block_rows"], -(-rows // PROGRAMS))
    programs = -(-rows // each)
    of_x = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    of_weight = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    _start(
        "rms_norm_backward",
        (programs,),
        slope.contiguous(), x, weight, inverse, of_x, of_weight, rows, dim, x.stride(0), each, **shape,
    )  # fmt: skip
    return of_x, of_weight.sum(0).to(weight.dtype)


def swiglu_forward(
    gate: Float[Tensor, "row width"], *, up: Float[Tensor, "row width"], factors: Float[Tensor, " row"] | None = None
) -> Float[Tensor, "row width"]:
    """Return silu(gate) * up * factor; gate and up have the same strides."""
    rows, width = gate.shape
    output = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    block = _power_of_two(min(width, ELEMENTS // 4))
    _start(
        "swiglu_forward",
        (rows, -(-width // block)),
        gate, up, gate if factors is None else factors, output, width, gate.stride(0),
        has_factors=factors is not None, block=block,
    )  # fmt: skip
    return output


def swiglu_backward(
    slope: Float[Tensor, "row width"],
    *,
    gate: Float[Tensor, "row width"],
    up: Float[Tensor, "row width"],
    of_gate: Float[Tensor, "row width"],
    of_up: Float[Tensor, "row width"],
    factors: Float[Tensor, " row"] | None = None,
    of_factors: Float[Tensor, " row"] | None = None,
) -> None:
    """Write the gradients of gate and up, which lie as these do, and of the factors, if there are any."""
    rows, width = gate.shape
    _start(
        "swiglu_backward",
        (rows,),
        slope.contiguous(), gate, up, gate if factors is None else factors, of_gate, of_up,
        gate if of_factors is None else of_factors, width, gate.stride(0),
        has_factors=factors is not None, block=_power_of_two(min(width, ELEMENTS // 4)),
    )  # fmt: skip


def sum_rows(
    rows: Float[Tensor, "row hidden"], *, origin: Int[Tensor, "token chosen"]
) -> Float[Tensor, "token hidden"]:
    """Return for each token the sum of its rows."""
    tokens, chosen = origin.shape
    dim = rows.shape[1]
    output = torch.empty(tokens, dim, dtype=rows.dtype, device=rows.device)
    block = _power_of_two(min(dim, ELEMENTS // 4))
    _start(
        "sum_rows",
        (tokens, -(-dim // block)),
        rows.contiguous(), origin.contiguous(), output, dim, num_chosen=chosen, block=block,
    )  # fmt: skip
    return output


def attention_inputs(
    query: Float[Tensor, "token head qk"],
    key_value: Float[Tensor, "token head nope_and_v"],
    rope_key: Float[Tensor, "token rope"],
    cos: Float[Tensor, "token pair"],
    sin: Float[Tensor, "token pair"],
) -> tuple[Float[Tensor, "token head qk"], Float[Tensor, "token head qk"], Float[Tensor, "token head v"]]:
    """Return queries and keys with their rope parts turned, and values, each of them by themselves."""
    tokens, heads, qk = query.shape
    width = key_value.shape[2] - qk + rope_key.shape[1]
    made = torch.empty_like(query), torch.empty_like(query), query.new_empty(tokens, heads, width)
    _start(
        "attention_inputs",
        (tokens, heads),
        query, key_value, rope_key, cos, sin, *made, heads,
        **_head_shape(qk, rope=rope_key.shape[1], value=width), num_warps=1,
    )  # fmt: skip
    return made


def attention_inputs_backward(
    of_query: Float[Tensor, "token head qk"],
    *,
    of_key: Float[Tensor, "token head qk"],
    of_value: Float[Tensor, "token head v"],
    cos: Float[Tensor, "token pair"],
    sin: Float[Tensor, "token pair"],
) -> tuple[Float[Tensor, "token head qk"], Float[Tensor, "token head nope_and_v"], Float[Tensor, "token rope"]]:
    """Return the gradients of queries, of keys and values side by side, and of the one rope key."""
    tokens, heads, qk = of_query.shape
    rope, width = 2 * cos.shape[1], of_value.shape[2]
    both = of_query.new_empty(tokens, heads, qk - rope + width)
    made = torch.empty_like(of_query), both, of_query.new_empty(tokens, rope)
    _start(
        "attention_inputs_backward",
        (tokens,),
        of_query, of_key, of_value, cos, sin, *made, heads,
        **_head_shape(qk, rope=rope, value=width), num_warps=2,
    )  # fmt: skip
    return made


def cross_entropy_rows(
    logits: Float[Tensor, "row vocab"],
    *,
    targets: Int[Tensor, " row"],
    coefficients: Float[Tensor, " row"],
    wants_slopes: bool,
) -> Float[Tensor, " row"]:
    """Return each row's -log softmax[target]; with `wants_slopes` its gradient takes the place of the logits."""
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _start(
        "cross_entropy_rows",
        (rows,),
        logits, targets, coefficients, losses, vocab, wants_slopes=wants_slopes,
        block=_power_of_two(min(vocab, ELEMENTS)), num_warps=8,
    )  # fmt: skip
    return losses


def adamw(
    master: Float[Tensor, " element"],
    *,
    gradient: Float[Tensor, " element"],
    first_moment: Float[Tensor, " element"],
    second_moment: Float[Tensor, " element"],
    scale: float,
    rate: float,
    beta1: float,
    beta2: float,
    steps: int,
    epsilon: float,
    weight_decay: float,
) -> None:
    """Take the step after `steps` on consecutive weights in FP32, with gradients times `scale`."""
    num = master.numel()
    _start(
        "adamw",
        (-(-num // ELEMENTS),),
        master, gradient, first_moment, second_moment, num, scale, rate, beta1, beta2,
        1 - beta1 ** (steps + 1), (1 - beta2 ** (steps + 1)) ** 0.5, epsilon, 1 - rate * weight_decay,
        block=ELEMENTS, num_warps=8,
    )  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _rows_at_once(dim: int) -> dict[str, int]:
    block = _power_of_two(dim)
    return {"block_rows": max(1, ELEMENTS // block), "block": block, "num_warps": 8 if block >= ELEMENTS else 4}


def _head_shape(qk: int, *, rope: int, value: int) -> dict[str, int]:
    widths = {"nope": qk - rope, "rope": rope, "value": value}
    blocks = {"block_nope": qk - rope, "block_pair": rope // 2, "block_value": value}
    return widths | {name: _power_of_two(width) for name, width in blocks.items()}


def _start(kernel: str, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    from dsv3.ops import triton_kernels  # here, since not everybody has Triton

    start_kernel(getattr(triton_kernels, kernel), grid, *arguments, **settings)
