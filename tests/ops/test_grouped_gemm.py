"""Grouped products and the gathers around them, against their plain forms."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.ops.grouped_gemm import grouped_linear, grouped_linear_plain
from dsv3.ops.permute import copy_to_rows, sum_to_tokens


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_grouped_linear_equals_one_product_an_expert_with_gradients(counts):
    rows = torch.randn(sum(counts), 3, dtype=torch.float64)
    weight = torch.randn(len(counts), 4, 3, dtype=torch.float64)
    results = []
    for grouped in (grouped_linear, grouped_linear_plain):
        r, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        output = grouped(r, weight=w, rows_per_expert=counts)
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        results.append((output.detach(), r.grad, w.grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


def test_gradients_reach_whichever_of_rows_and_weight_asks():
    weight = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    grouped_linear(torch.randn(5, 3).double(), weight=weight, rows_per_expert=[2, 3]).sum().backward()
    assert weight.grad is not None
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    grouped_linear(rows, weight=weight.detach(), rows_per_expert=[2, 3]).sum().backward()
    assert rows.grad is not None


@given(seed=st.integers(0, 1000), num_tokens=st.integers(1, 7), chosen=st.integers(1, 4))
def test_copies_out_and_back_are_plain_indexing_with_gradients(seed, num_tokens, chosen):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_tokens * chosen, generator=generator)
    origin = torch.empty_like(order)
    origin[order] = torch.arange(len(order))
    source, origin = order // chosen, origin.view(num_tokens, chosen)
    tokens = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(num_tokens * chosen, 3, dtype=torch.float64, requires_grad=True)

    torch.testing.assert_close(copy_to_rows(tokens, source=source, origin=origin), tokens[source])
    torch.testing.assert_close(sum_to_tokens(rows, source=source, origin=origin), rows[origin].sum(1))
    assert torch.autograd.gradcheck(lambda t: copy_to_rows(t, source=source, origin=origin), (tokens,))
    assert torch.autograd.gradcheck(lambda r: sum_to_tokens(r, source=source, origin=origin), (rows,))
