"""Bits per byte: what a model needs to write down a text, in a unit that does not depend on its tokenizer."""

import math
from collections.abc import Callable, Sequence

import torch

from dsv3.batch import TokenBatch
from dsv3.data.windows import batched, cut_windows
from dsv3.evals.balance import ExpertLoad
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import token_nll

TOKENS_AT_ONCE = 4096
"""Tokens of one forward pass."""


def document_bits(
    model: Transformer,
    *,
    documents: Sequence[list[int]],
    window: int,
    load: ExpertLoad | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[float]:
    """Return the bits that the model needs for each document: for all its tokens but the first, which is context.

    A document longer than `window` tokens is scored in stretches that each see nothing before themselves but one
    token; every token is predicted exactly once. Expert loads are added to `load`, and `on_tokens` is told how many
    tokens each forward pass has scored.
    """
    bits = [0.0] * len(documents)
    device = model.embed_tokens.weight.device
    for windows in batched(cut_windows(documents, length=window), max_tokens=TOKENS_AT_ONCE):
        batch = TokenBatch.from_sequences([piece.tokens[:-1] for piece in windows]).to(device)
        targets = torch.tensor([token for piece in windows for token in piece.tokens[1:]], device=device)
        with torch.inference_mode():
            output = model(batch)
            losses = token_nll(output.hidden, weight=model.lm_head.weight, targets=targets).double()
        if load is not None:
            load.add(output.routings)
        for piece, part in zip(windows, losses.split(list(batch.lengths)), strict=True):
            bits[piece.document] += float(part.sum()) / math.log(2)
        if on_tokens is not None:
            on_tokens(batch.num_tokens)
    return bits
