"""Each C++ kernel against the plain form of its function in float64, gradients included.

Widths are those of the published model and of small ones, and ragged ones that fill no vector.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3 import native
from dsv3.batch import IGNORE
from dsv3.ops import cross_entropy
from dsv3.ops.attention import expanded_attention, expanded_attention_plain
from dsv3.ops.cross_entropy import linear_cross_entropy, token_nll
from dsv3.ops.grouped_gemm import grouped_linear, grouped_linear_plain
from dsv3.ops.norm import rms_norm, rms_norm_plain
from dsv3.ops.permute import copy_to_rows, sum_to_tokens
from dsv3.ops.rope import Rotation
from dsv3.ops.swiglu import swiglu, weighted_swiglu, weighted_swiglu_plain
from dsv3.runtime.compiler import FLAGS, compiled_library


def compare(fast, plain, *inputs: Tensor, tolerance: float = 2e-6) -> None:
    """Compare output and gradients with those of the plain form in float64, relative to the largest number."""
    narrow = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    assert native.usable(*narrow)
    ours, expected = fast(*narrow), plain(*wide)
    slope = torch.randn(ours.shape, generator=torch.Generator().manual_seed(7))
    ours.backward(slope)
    expected.backward(slope.double())
    for name, got, wanted in [
        ("output", ours, expected),
        *((f"gradient {index}", a.grad, b.grad) for index, (a, b) in enumerate(zip(narrow, wide, strict=True))),
    ]:
        assert got.shape == wanted.shape
        if wanted.numel():
            assert (got - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max()), name


def numbers(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def rotation_of(lengths: list[int], *, rope: int, dtype: torch.dtype) -> Rotation:
    positions = torch.cat([torch.arange(length) for length in lengths]).to(dtype)
    angles = positions[:, None] * 10_000.0 ** -(torch.arange(0, rope, 2).to(dtype) / rope)
    return Rotation(cos=angles.cos(), sin=angles.sin())


def check_attention(
    lengths: list[int],
    *,
    heads: int,
    nope: int,
    rope: int,
    value: int,
    asking: list[int] | None = None,
    spread: float = 1.0,
    tolerance: float = 4e-6,
) -> None:
    """Compare with FP64; `asking` says how many of the last tokens of each sequence have a query, all if left out."""
    tokens = sum(lengths)
    turned = rotation_of(lengths, rope=rope, dtype=torch.float64)
    narrow = Rotation(cos=turned.cos.float(), sin=turned.sin.float())
    turned = Rotation(cos=narrow.cos.double(), sin=narrow.sin.double())
    shape = {"lengths": asking or lengths, "scale": (nope + rope) ** -0.5, "key_lengths": asking and lengths}
    compare(
        lambda q, kv, k: expanded_attention(q, key_value=kv, rope_key=k, rotation=narrow, **shape),
        lambda q, kv, k: expanded_attention_plain(q, key_value=kv, rope_key=k, rotation=turned, **shape),
        numbers(sum(asking or lengths), heads, nope + rope, spread=spread),
        numbers(tokens, heads, nope + value, seed=1),
        numbers(tokens, rope, seed=2),
        tolerance=tolerance,
    )


@pytest.mark.parametrize("lengths", [[1], [95], [96], [97], [256, 256], [5, 0, 390, 1, 200], [1000]], ids=str)
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "value"),
    [(2, 128, 64, 128), (3, 32, 16, 32), (2, 10, 6, 7), (1, 4, 2, 9)],
    ids=["published", "small", "ragged", "values wider than keys"],
)
def test_attention(lengths, heads, nope, rope, value):
    check_attention(lengths, heads=heads, nope=nope, rope=rope, value=value)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 3),
    nope=st.integers(1, 40),
    pairs=st.integers(1, 10),
    value=st.integers(1, 40),
)
def test_attention_of_any_shape(lengths, heads, nope, pairs, value):
    check_attention(lengths, heads=heads, nope=nope, rope=2 * pairs, value=value)


@settings(max_examples=25)
@given(
    counts=st.lists(st.tuples(st.integers(0, 250), st.floats(0, 1)), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    nope=st.integers(1, 20),
    pairs=st.integers(1, 5),
    value=st.integers(1, 20),
)
def test_attention_of_the_last_tokens_alone(counts, heads, nope, pairs, value):
    lengths, asking = [length for length, _ in counts], [round(length * share) for length, share in counts]
    assume(any(asking))
    check_attention(lengths, heads=heads, nope=nope, rope=2 * pairs, value=value, asking=asking)


def test_attention_of_the_last_tokens_is_the_end_of_all_of_it():
    """Both paths, against themselves: what the last 70 of 300 tokens get does not depend on the others' queries."""
    query, key_value, rope_key = numbers(300, 2, 12), numbers(300, 2, 16, seed=1), numbers(300, 4, seed=2)
    given = {
        "key_value": key_value,
        "rope_key": rope_key,
        "rotation": rotation_of([300], rope=4, dtype=torch.float32),
        "scale": 0.3,
    }
    for attend in (expanded_attention, expanded_attention_plain):
        whole = attend(query, lengths=[300], **given)
        assert torch.allclose(attend(query[-70:], lengths=[70], key_lengths=[300], **given), whole[-70:], atol=1e-6)


def test_attention_with_scores_of_hundreds_stays_exact():
    """Weights of all but the largest score underflow; nothing may overflow on the way."""
    check_attention([150, 40], heads=2, nope=32, rope=16, value=32, spread=300.0, tolerance=2e-4)


@pytest.mark.parametrize("place", [0, 3, 99])
def test_attention_hands_on_what_is_not_a_number(place):
    query, key_value, rope_key = numbers(100, 2, 12), numbers(100, 2, 16), numbers(100, 4)
    query[place, 1, 2] = float("nan")
    turned = rotation_of([100], rope=4, dtype=torch.float32)
    output = expanded_attention(
        query, key_value=key_value, rope_key=rope_key, rotation=turned, lengths=[100], scale=0.3
    )
    bad = output.isnan().any(-1)
    assert bad[place, 1]
    assert bad.sum() == 1


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (5, 7168), (40, 1536), (17, 512), (300, 13), (0, 8)])
def test_rms_norm(rows, dim):
    compare(
        lambda x, gain: rms_norm(x, weight=gain, eps=1e-6),
        lambda x, gain: rms_norm_plain(x, weight=gain, eps=1e-6),
        numbers(rows, dim, spread=3.0),
        numbers(dim, seed=1) + 1,
        tolerance=1e-5,
    )


def test_rms_norm_of_a_latent_that_lies_beside_its_rope_key():
    both = numbers(30, 80)
    compare(
        lambda x, gain: rms_norm(x[:, :64], weight=gain, eps=1e-6),
        lambda x, gain: rms_norm_plain(x[:, :64], weight=gain, eps=1e-6),
        both,
        numbers(64, seed=1),
        tolerance=1e-5,
    )


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 2048), (50, 640), (33, 13), (0, 8)])
def test_swiglu(rows, width):
    silu = torch.nn.functional.silu
    compare(
        lambda gate, up: swiglu(gate, up=up),
        lambda gate, up: silu(gate) * up,
        numbers(rows, width, spread=5.0),
        numbers(rows, width, seed=1),
    )
    compare(
        lambda both, factors: weighted_swiglu(both, factors=factors),
        lambda both, factors: weighted_swiglu_plain(both, factors=factors),
        numbers(rows, 2 * width, spread=5.0),
        numbers(rows, seed=2),
        tolerance=1e-5,
    )


def test_swiglu_at_the_ends_of_float32():
    gate = torch.tensor([[-3e38, -200.0, -88.0, 0.0, 88.0, 200.0, 3e38, float("nan")]])
    output = swiglu(gate, up=torch.ones_like(gate))
    expected = torch.nn.functional.silu(gate.double())
    assert torch.allclose(output[:, :-1].double(), expected[:, :-1], rtol=1e-6, atol=1e-34)
    assert output[0, -1].isnan()


@pytest.mark.parametrize("vocab", [1, 11, 129, 4096])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(monkeypatch, vocab, weighted):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": 5 * vocab})
    targets = torch.randint(vocab, (23,), generator=torch.Generator().manual_seed(3))
    targets[[4, 22]] = IGNORE
    weights = numbers(23, seed=4).abs() if weighted else None

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        nll = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none")
        return (nll if weights is None else nll * weights.double()).sum()

    hidden, weight = numbers(23, 9, spread=3.0), numbers(vocab, 9, seed=1, spread=3.0)
    compare(
        lambda h, w: linear_cross_entropy(h, weight=w, targets=targets, weights=weights),
        plain,
        hidden,
        weight,
        tolerance=5e-6,
    )
    nll = token_nll(hidden, weight=weight, targets=targets)
    logits = hidden.double() @ weight.double().T
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(nll.double(), expected, atol=1e-4)


def test_cross_entropy_refuses_a_target_outside_the_vocabulary():
    with pytest.raises(AssertionError, match="outside the vocabulary"):
        linear_cross_entropy(numbers(2, 3), weight=numbers(5, 3).requires_grad_(), targets=torch.tensor([1, 5]))


@pytest.mark.parametrize(("tokens", "chosen", "dim"), [(1, 1, 1), (40, 4, 256), (7, 8, 13)])
def test_copies_and_their_sums(tokens, chosen, dim):
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(tokens * chosen, generator=generator)
    origin = order.argsort().unflatten(0, (tokens, chosen))
    source = order // chosen
    compare(lambda x: copy_to_rows(x, source=source, origin=origin), lambda x: x[source], numbers(tokens, dim))
    compare(
        lambda x: sum_to_tokens(x, source=source, origin=origin),
        lambda x: x[origin].sum(1),
        numbers(tokens * chosen, dim),
    )


def test_results_do_not_depend_on_the_number_of_threads():
    lengths = [200, 130, 70]
    turned = rotation_of(lengths, rope=16, dtype=torch.float32)
    inputs = (numbers(400, 3, 48), numbers(400, 3, 64, seed=1), numbers(400, 16, seed=2), numbers(48, seed=3))

    def everything() -> list[Tensor]:
        query, key_value, rope_key, gain = (x.clone().requires_grad_() for x in inputs)
        normed = rms_norm(query.flatten(0, 1), weight=gain, eps=1e-6).unflatten(0, (400, 3))
        heads = expanded_attention(
            normed, key_value=key_value, rope_key=rope_key, rotation=turned, lengths=lengths, scale=0.2
        )
        active = weighted_swiglu(heads.flatten(1), factors=rope_key[:, 0])
        linear_cross_entropy(active, weight=inputs[0][:100, 0], targets=torch.arange(400) % 100).backward()
        return [heads.detach(), query.grad, key_value.grad, rope_key.grad, gain.grad]

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for several in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], several, strict=True))


@settings(max_examples=40)
@given(
    rows_per_expert=st.lists(st.integers(0, 130), min_size=1, max_size=5),
    into=st.integers(1, 70) | st.sampled_from([256, 300, 600]),
    out=st.integers(1, 70) | st.sampled_from([128, 300]),
)
def test_products_of_experts(rows_per_expert, into, out):
    """Ours by name, since which one is taken hangs on the processor."""
    rows, weight = numbers(sum(rows_per_expert), into), numbers(len(rows_per_expert), out, into, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "multiplies_faster", lambda: True)
        compare(
            lambda x, w: grouped_linear(x, weight=w, rows_per_expert=rows_per_expert),
            lambda x, w: grouped_linear_plain(x, weight=w, rows_per_expert=rows_per_expert),
            rows,
            weight,
            tolerance=1e-5,
        )
        ours = grouped_linear(rows, weight=weight, rows_per_expert=rows_per_expert)
        patch.setattr(native, "multiplies_faster", lambda: False)
        theirs = grouped_linear(rows, weight=weight, rows_per_expert=rows_per_expert)
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow  # half a minute of compiling each
@pytest.mark.parametrize("floats", [4, 16])
def test_vectors_of_other_processors(floats, monkeypatch):
    """The widths of NEON and AVX-512, made of this machine's vectors: the same source with other blocks and tiles."""
    sources = sorted(Path(native.__file__).parent.glob("*.cpp"))
    library = compiled_library(
        f"cpu-{floats}", sources=sources, flags=(*FLAGS, f"-DVECTOR_FLOATS={floats}", "-Wno-psabi")
    )
    monkeypatch.setattr(native, "_load", lambda: ctypes.CDLL(str(library)))
    monkeypatch.setattr(native, "multiplies_faster", lambda: True)
    test_attention([5, 0, 390, 1, 200], heads=2, nope=32, rope=16, value=32)
    test_attention([97], heads=2, nope=10, rope=6, value=7)
    test_rms_norm(17, 77)
    test_swiglu(33, 13)
    test_swiglu_at_the_ends_of_float32()
    test_cross_entropy(monkeypatch, vocab=129, weighted=True)
    test_copies_and_their_sums(40, 4, 77)
    test_products_of_experts.hypothesis.inner_test([130, 0, 5, 61], into=300, out=77)
