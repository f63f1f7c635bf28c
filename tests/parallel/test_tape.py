"""A backward pass in pieces is the backward pass, and keeps no more."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.model.interfaces import Part
from dsv3.parallel.tape import Tape
from dsv3.runtime.later import Later, make_gradients


@dataclass(frozen=True)
class Record:
    a: Tensor
    inner: tuple[int, ...]
    b: Tensor | None = None


def network(x, weights, *, cut):
    """Every layer reads what two layers made, in a record; a last sum reads the first of them again."""
    first = cut(torch.tanh(x @ weights[0]), Part.ATTENTION)
    state = Record(a=first, inner=(1,), b=first * 2)
    for weight in weights[1:]:
        state = cut(state, Part.EXPERTS)
        assert state.b is not None
        state = Record(a=torch.sin(state.a @ weight) + state.b, inner=(2,), b=state.a)
    return (state.a * first).sum()


@given(st.integers(1, 6), st.integers(0, 100))
def test_gradients_of_pieces_are_those_of_the_whole(depth, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    weights = [torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(depth)]
    given_whole = x.clone().requires_grad_()
    whole = torch.autograd.grad(network(given_whole, weights, cut=lambda made, part: made), [given_whole, *weights])

    tape = Tape()
    leaf, box = tape.begin(x)
    network(leaf, weights, cut=tape.cut).backward()
    parts = list(tape.backward())
    assert parts == [Part.EXPERTS] * (depth - 1) + [Part.ATTENTION]
    for found, expected in zip([box.gradient, *(weight.grad for weight in weights)], whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_tensor_that_stands_in_a_record_twice_is_cut_once_and_integers_never():
    tape = Tape()
    made = torch.ones(2, requires_grad=True) * 3
    whole = Record(a=made, inner=(7,), b=made)
    passed = tape.cut(whole, Part.DISPATCH)
    assert passed.a is passed.b
    assert passed.a is not made
    assert passed.a.data_ptr() == made.data_ptr()
    nothing = Record(a=torch.ones(2, dtype=torch.long), inner=(7,))
    assert tape.cut(nothing, Part.DISPATCH) is nothing


def test_a_tensor_that_was_cut_is_not_kept():
    tape = Tape()
    made = torch.ones(1000, requires_grad=True) * 3  # a product with a number keeps nothing
    passed = tape.cut(made, Part.DISPATCH)
    after = passed * 2
    seen = weakref.ref(made.untyped_storage())
    del made, passed
    gc.collect()
    assert seen() is None
    after.sum().backward()
    assert list(tape.backward()) == [Part.DISPATCH]


def test_gradients_of_weights_wait_only_where_they_may():
    later, waiting = Later(), []
    leaf, made = torch.ones(2, requires_grad=True), []

    def make():
        made.append(1)
        return torch.full((2,), 5.0)

    assert torch.equal(later.gradient(leaf, make=make), torch.full((2,), 5.0))
    with later.into(waiting):
        assert later.gradient(leaf, make=make) is None
        assert later.gradient(leaf * 2, make=make) is not None  # what a weight was made into passes it on
        assert later.gradient(leaf, make=make) is None
    assert len(made) == 2
    make_gradients(waiting)
    assert torch.equal(leaf.grad, torch.full((2,), 10.0))
    assert waiting == []
    with pytest.raises(ZeroDivisionError), later.into([]):
        raise ZeroDivisionError
    assert later.gradient(leaf, make=make) is not None
