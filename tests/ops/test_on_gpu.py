"""Triton kernels between products, run by Triton's interpreter: each is its formula in FP64, its gradients too."""

import pytest
import torch
import torch.nn.functional as F

from dsv3.ops import attention, cross_entropy, norm, on_gpu, permute, rope, swiglu
from dsv3.train import optimizer


@pytest.fixture(autouse=True)
def on_a_gpu(interpreted, monkeypatch):
    """Have tensors of the CPU taken for those of a GPU."""
    for module in (attention, cross_entropy, norm, permute, swiglu, optimizer):
        monkeypatch.setattr(module.native, "usable", lambda *tensors: False)
    monkeypatch.setattr(on_gpu, "usable", lambda *tensors: True)
    for module in (norm, swiglu):
        monkeypatch.setattr(module, "runs_on_gpu", lambda tensor: True)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs_and_gradients(function, *inputs):
    """Call with copies that want gradients; return what comes out and the gradients of a fixed weighting of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    made = function(*leaves)
    made = made if isinstance(made, tuple) else (made,)
    sum((one.double() * numbers(*one.shape, seed=9)).sum() for one in made).backward()
    return [one.detach() for one in made] + [leaf.grad for leaf in leaves]


def agree(ours, exact, *, bound):
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= bound * b.norm().clamp(min=1e-20)


TYPES = [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)]


@pytest.mark.parametrize(("dtype", "bound"), TYPES, ids=["FP32", "BF16"])
@pytest.mark.parametrize("shape", [(5, 7), (300, 128), (3, 5000), (0, 8)], ids=str)
def test_rms_norm(shape, dtype, bound):
    x, weight = numbers(*shape, dtype=dtype), numbers(shape[1], seed=1, dtype=dtype)
    ours = outputs_and_gradients(lambda x, w: norm.rms_norm(x, weight=w, eps=1e-6), x, weight)
    exact = outputs_and_gradients(lambda x, w: norm.rms_norm_plain(x, weight=w, eps=1e-6), x.double(), weight.double())
    agree(ours, exact, bound=bound)


def test_rms_norm_of_a_part_of_wider_rows():
    wide = numbers(6, 20)
    ours = outputs_and_gradients(lambda x, w: norm.rms_norm(x[:, 3:15], weight=w, eps=1e-6), wide, numbers(12))
    exact = outputs_and_gradients(
        lambda x, w: norm.rms_norm_plain(x[:, 3:15], weight=w, eps=1e-6), wide.double(), numbers(12).double()
    )
    agree(ours, exact, bound=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), TYPES, ids=["FP32", "BF16"])
@pytest.mark.parametrize("shape", [(5, 7), (4, 2500), (0, 8)], ids=str)
def test_swiglu_with_and_without_factors(shape, dtype, bound):
    gate, up = numbers(*shape, dtype=dtype), numbers(*shape, seed=1, dtype=dtype)
    ours = outputs_and_gradients(lambda g, u: swiglu.swiglu(g, up=u), gate, up)
    exact = outputs_and_gradients(lambda g, u: F.silu(g) * u, gate.double(), up.double())
    agree(ours, exact, bound=bound)
    both, factors = torch.cat((gate, up), dim=1), numbers(shape[0], seed=2)
    ours = outputs_and_gradients(lambda x, f: swiglu.weighted_swiglu(x, factors=f), both, factors)
    exact = outputs_and_gradients(
        lambda x, f: swiglu.weighted_swiglu_plain(x, factors=f), both.double(), factors.double()
    )
    agree(ours, exact, bound=bound)


@pytest.mark.parametrize("dim", [7, 1030])
def test_rows_are_summed_and_copied_back(dim):
    origin = torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(4, 3)
    source = torch.empty(12, dtype=torch.long)
    source[origin] = torch.arange(4)[:, None].expand(4, 3)
    rows = numbers(12, dim)
    ours = outputs_and_gradients(lambda x: permute.sum_to_tokens(x, source=source, origin=origin), rows)
    agree(ours, outputs_and_gradients(lambda x: x[origin].sum(1), rows.double()), bound=1e-6)
    tokens = numbers(4, dim)
    ours = outputs_and_gradients(lambda x: permute.copy_to_rows(x, source=source, origin=origin), tokens)
    agree(ours, outputs_and_gradients(lambda x: x[source], tokens.double()), bound=1e-6)


@pytest.mark.parametrize(("nope", "rotated", "value"), [(8, 4, 8), (12, 6, 5), (128, 64, 128)])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 9)], ids=str)
def test_attention_reads_inputs_that_are_made_in_one_pass(nope, rotated, value, lengths):
    query, key_value, rope_key = numbers(12, 3, nope + rotated), numbers(12, 3, nope + value), numbers(12, rotated)
    angles = numbers(12, rotated // 2, seed=5)
    rotation = rope.Rotation(cos=angles.cos(), sin=angles.sin())

    def run(function, turning):
        return lambda q, kv, k: function(q, key_value=kv, rope_key=k, rotation=turning, lengths=lengths, scale=0.3)

    ours = outputs_and_gradients(run(attention.expanded_attention, rotation), query, key_value, rope_key)
    exact = outputs_and_gradients(
        run(attention.expanded_attention_plain, rope.Rotation(cos=angles.double().cos(), sin=angles.double().sin())),
        *(x.double() for x in (query, key_value, rope_key)),
    )
    agree(ours, exact, bound=2e-6)


@pytest.mark.parametrize("vocab", [5, 4096, 5000])
def test_cross_entropy_of_a_head(vocab):
    hidden, head = numbers(7, 16), numbers(vocab, 16, seed=1)
    targets = torch.tensor([0, vocab - 1, 2, -100, 1, 1, 3])
    weights = numbers(7, seed=3).abs()
    ours = outputs_and_gradients(
        lambda h, w: cross_entropy.linear_cross_entropy(h, weight=w, targets=targets, weights=weights), hidden, head
    )
    exact = outputs_and_gradients(
        lambda h, w: (F.cross_entropy(h @ w.T, targets, reduction="none", ignore_index=-100) * weights).sum(),
        hidden.double(),
        head.double(),
    )
    agree(ours, exact, bound=1e-6)


def test_cross_entropy_of_logits_out_of_all_range():
    logits = torch.tensor([[1e4, -1e4, 0.0, float("-inf")], [float("-inf"), 88.0, 89.0, 90.0]])
    targets, ones = torch.tensor([1, 3]), torch.ones(2)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    losses = on_gpu.cross_entropy_rows(logits.clone(), targets=targets, coefficients=ones, wants_slopes=True)
    assert torch.allclose(losses.double(), exact)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_adamw_takes_torchs_steps(kind):
    weight, reference = numbers(5000).requires_grad_(), numbers(5000).requires_grad_()
    theirs = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = [torch.zeros(5000, dtype=kind) for _ in range(2)]
    for step in range(4):
        gradient = numbers(5000, seed=step)
        reference.grad = gradient * 0.5
        theirs.step()
        on_gpu.adamw(
            weight.data,
            gradient=gradient,
            first_moment=moments[0],
            second_moment=moments[1],
            scale=0.5,
            rate=1e-2,
            beta1=0.9,
            beta2=0.95,
            steps=step,
            epsilon=1e-8,
            weight_decay=0.1,
        )
    bound = 1e-6 if kind == torch.float32 else 1e-3
    assert (weight - reference).norm() < bound * reference.norm()
