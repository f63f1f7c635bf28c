"""What is made again instead of kept: as often as needed, and not a bit different."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dsv3.ops.recompute import made_again


def test_the_tensor_is_let_go_and_made_once_for_all_that_need_it():
    x, a, b = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    calls = []

    def make():
        calls.append(1)
        return x.sin()

    middle = make()
    expected = torch.autograd.grad((middle @ a).sum() + (middle.T @ b).sum(), (x, a, b))
    calls.clear()
    middle = make()
    with made_again((middle, make)):
        loss = (middle @ a).sum() + (middle.T @ b).sum()
    storage = StorageWeakRef(middle.untyped_storage())
    del middle
    assert storage.expired()
    gradients = torch.autograd.grad(loss, (x, a, b))
    assert len(calls) == 2  # once before, once for both products and all views
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))


def test_other_tensors_are_kept_as_usual_and_nothing_is_made_without_a_backward_pass():
    x, a = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    middle = x.exp()

    def never():
        raise AssertionError("made without need")

    with made_again((middle, never)):
        other = (x @ a).sum()
    other.backward()
    assert torch.equal(a.grad, x.detach().T @ torch.ones(3, 3))
    with torch.no_grad(), made_again((middle, never)):
        (middle @ a).sum()
    with made_again((middle, never), when=False):
        loss = (middle @ a).sum()
    loss.backward()


def test_blocks_nest_and_the_inner_one_rules():
    x, a = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    outer, inner, made = x.exp(), x.sin(), []
    with made_again((outer, lambda: made.append("outer") or x.exp())):
        with made_again((inner, lambda: made.append("inner") or x.sin())):
            first = (inner @ a).sum()
        second = (outer @ a).sum()
    (first + second).backward()
    assert sorted(made) == ["inner", "outer"]
