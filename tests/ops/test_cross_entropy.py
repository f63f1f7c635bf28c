"""The fused head and loss against torch's own, with chunks small enough to matter."""

import pytest
import torch
import torch.nn.functional as F

from dsv3.batch import IGNORE
from dsv3.ops import cross_entropy
from dsv3.ops.cross_entropy import linear_cross_entropy, token_nll


@pytest.mark.parametrize("chunk_elements", [11, 33, 1 << 22])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [5, 9])  # seven tokens: the head's gradient waits for the backward pass, or slopes do
def test_loss_and_gradients_equal_torch(monkeypatch, chunk_elements, weighted, width):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": chunk_elements})
    hidden, weight = torch.randn(7, width, dtype=torch.float64), torch.randn(11, width, dtype=torch.float64)
    targets = torch.tensor([0, 3, IGNORE, 10, 2, IGNORE, 7])
    weights = torch.rand(7, dtype=torch.float64) if weighted else None
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss = linear_cross_entropy(h, weight=w, targets=targets, weights=weights)
        else:
            nll = F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="none")
            loss = (nll if weights is None else nll * weights).sum()
        (loss * 0.3).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)
    nll = token_nll(hidden, weight=weight, targets=targets)
    torch.testing.assert_close(nll, F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none"))


def test_nothing_is_kept_for_backward_without_gradients():
    hidden, weight = torch.randn(4, 5), torch.randn(11, 5, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight=weight, targets=torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, torch.tensor([1, 2, 3, 4]), reduction="sum"))
    assert not loss.requires_grad


def test_bf16_hidden_states_sum_their_loss_in_fp32():
    hidden, weight = torch.randn(64, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(0, 50, (64,))
    loss = linear_cross_entropy(hidden.requires_grad_(), weight=weight.requires_grad_(), targets=targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum"), rtol=1e-5, atol=1e-5
    )
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("tokens", "expected"), [(10, 2 * 10 * 300), (100, 4 * 32 * 300)])
def test_the_smaller_of_slopes_and_the_head_s_gradient_waits_for_the_backward_pass(tokens, expected):
    """In BF16 slopes have two bytes, the gradient has four."""
    hidden, weight = torch.randn(tokens, 32).bfloat16(), torch.randn(300, 32).bfloat16()
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear_cross_entropy(
            hidden.requires_grad_(), weight=weight.requires_grad_(), targets=torch.randint(0, 300, (tokens,))
        )
    assert max(tensor.nbytes for tensor in kept) == expected


def test_bf16_slopes_give_the_gradient_of_the_head_to_its_own_rounding():
    hidden, weight, targets = (
        torch.randn(24, 64).bfloat16(),
        torch.randn(50, 64).bfloat16(),
        torch.randint(0, 50, (24,)),
    )
    ours, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    (linear_cross_entropy(hidden, weight=ours, targets=targets) / 24).backward()
    F.cross_entropy(hidden.double() @ exact.T, targets).backward()
    error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2**-7
