"""Bits per byte: what a model needs to write down a text, in a unit that does not depend on its tokenizer."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.data.windows import batched, cut_windows
from dsv3.evals.balance import ExpertLoad
from dsv3.infer.runner import Runner
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import token_nll

TOKENS_AT_ONCE = 4096
"""Tokens of one forward pass."""
LOGITS_AT_ONCE = 1 << 22
PAGE_TOKENS = 64


def document_bits(
    model: Transformer | Runner,
    *,
    documents: Sequence[list[int]],
    window: int,
    load: ExpertLoad | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[float]:
    """Return the bits that the model needs for each document: for all its tokens but the first, which is context.

    A document longer than `window` tokens is scored in stretches that each see nothing before themselves but one
    token; every token is predicted exactly once. Expert loads are added to `load` (by the model that trains; an
    engine's runner does not tell them), and `on_tokens` is told how many tokens each forward pass has scored.
    """
    bits = [0.0] * len(documents)
    for windows in batched(cut_windows(documents, length=window), max_tokens=TOKENS_AT_ONCE):
        batch = TokenBatch.from_sequences([piece.tokens[:-1] for piece in windows])
        targets = torch.tensor([token for piece in windows for token in piece.tokens[1:]])
        with torch.inference_mode():
            if isinstance(model, Transformer):
                losses = _losses_in_training(model, batch, targets=targets, load=load)
            else:
                losses = _losses_in_use(model, batch, targets=targets)
        for piece, part in zip(windows, losses.double().split(list(batch.lengths)), strict=True):
            bits[piece.document] += float(part.sum()) / math.log(2)
        if on_tokens is not None:
            on_tokens(batch.num_tokens)
    return bits


def _losses_in_training(
    model: Transformer, batch: TokenBatch, *, targets: Int[Tensor, " token"], load: ExpertLoad | None
) -> Float[Tensor, " token"]:
    device = model.embed_tokens.weight.device
    output = model(batch.to(device))
    if load is not None:
        load.add(output.routings)
    return token_nll(output.hidden, weight=model.lm_head.weight, targets=targets.to(device))


def _losses_in_use(runner: Runner, batch: TokenBatch, *, targets: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Score with an engine's runner, through its cache, in the format its weights are kept in."""
    counts = [-(-length // PAGE_TOKENS) for length in batch.lengths]
    runner.make_pages(num_pages=sum(counts), page_tokens=PAGE_TOKENS)
    pages = [part.tolist() for part in torch.arange(sum(counts)).split(counts)]
    hidden = runner.forward(batch, pages=pages).hidden
    rows = max(1, LOGITS_AT_ONCE // runner.config.vocab_size)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(runner.logits(x), y, reduction="none") for x, y in pieces])
