"""The fused head and loss against torch's own, with chunks small enough to matter."""

import pytest
import torch
import torch.nn.functional as F

from dsv3.batch import IGNORE
from dsv3.ops import cross_entropy
from dsv3.ops.cross_entropy import linear_cross_entropy, token_nll


@pytest.mark.parametrize("chunk_elements", [11, 33, 1 << 22])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_equal_torch(monkeypatch, chunk_elements, weighted):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": chunk_elements})
    hidden, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
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
