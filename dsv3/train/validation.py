"""Bits per byte on text that was never trained on.

Bits per byte compares models with different tokenizers: the bits it takes to write the text down, per byte of it.
Each document is read after a begin token, so that its first token is predicted too and every byte is counted once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.data.prepared import PreparedCorpus
from dsv3.data.tokenizer import Tokenizer
from dsv3.data.windows import Window, batched, cut_windows, encode_up_to
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import token_nll
from dsv3.parallel.ranks import Alone
from dsv3.train.balance import max_violation
from dsv3.train.stages import forward_by_stages, places_of

BATCH_TOKENS = 4096
"""Tokens scored at a time, or one window where that is longer."""


@dataclass(frozen=True, kw_only=True)
class HeldOutBatch:
    """Windows of held-out documents."""

    batch: TokenBatch
    source: Int[Tensor, " token"]
    """Index of the source each token comes from."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The text that is scored: the same tokens every time."""

    sources: tuple[str, ...]
    bytes: tuple[int, ...]
    """Bytes of the scored text of each source."""
    tokens: tuple[int, ...]
    """Tokens of it."""
    batches: tuple[HeldOutBatch, ...]


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """What one pass over the held-out text found."""

    bits_per_byte: float
    """Over all sources together."""
    loss: float
    """Nats a token."""
    mtp_loss: tuple[float, ...]
    """Nats a token for each MTP module that ran, over the tokens it can see a target for."""
    by_source: dict[str, float]
    """Bits per byte of each source."""
    load: tuple[Int[Tensor, " expert"], ...]
    """Tokens sent to each expert over all held-out text, for each MoE layer that ran."""

    @property
    def max_violation(self) -> list[float]:
        """MaxVio_global of each layer (arXiv 2408.15664): of the load over the whole held-out text."""
        return [max_violation(load) for load in self.load]


def read_held_out(corpus: PreparedCorpus, *, max_tokens: int, window: int) -> HeldOut | None:
    """Return up to `max_tokens` held-out tokens, shared evenly among the sources; None if nothing was held out.

    Documents are taken in order and cut into windows of `window` tokens, as long as a training row. A window sees
    nothing before it but the one token it starts from. A source with less than its share leaves the rest to others.
    """
    tokenizer = corpus.tokenizer()
    documents = held_out_documents(corpus, tokenizer=tokenizer, max_tokens=max_tokens)
    sources = tuple(documents)
    if not sources:
        return None
    length_of = torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    num_bytes = tuple(sum(int(length_of[torch.tensor(d)].sum()) for d in documents[name]) for name in sources)
    flat = [[tokenizer.bos_id, *document] for name in sources for document in documents[name]]
    source_of = [index for index, name in enumerate(sources) for _ in documents[name]]
    batches = batched(cut_windows(flat, length=window), max_tokens=max(BATCH_TOKENS, window))
    return HeldOut(
        sources=sources,
        bytes=num_bytes,
        tokens=tuple(sum(len(document) for document in documents[name]) for name in sources),
        batches=tuple(_batch(windows, source_of=source_of) for windows in batches),
    )


def held_out_documents(corpus: PreparedCorpus, *, tokenizer: Tokenizer, max_tokens: int) -> dict[str, list[list[int]]]:
    """Return the documents that `read_held_out` scores, by source and as token ids; sources without any are left out.

    The baselines of an evaluation are scored on the same ones.
    """
    smallest_first = sorted(corpus.sources, key=lambda source: source.held_out_bytes)
    documents: dict[str, list[list[int]]] = {}
    left = max_tokens
    for place, source in enumerate(smallest_first):
        share = left // (len(smallest_first) - place)
        documents[source.name] = encode_up_to(corpus.held_out(source), tokenizer=tokenizer, count=share)
        left -= sum(len(document) for document in documents[source.name])
    return {source.name: documents[source.name] for source in corpus.sources if documents[source.name]}


def _batch(windows: Sequence[Window], *, source_of: Sequence[int]) -> HeldOutBatch:
    inputs = TokenBatch.from_sequences([window.tokens[:-1] for window in windows])
    targets = torch.tensor([token for window in windows for token in window.tokens[1:]])
    source = torch.tensor([source_of[window.document] for window in windows for _ in window.tokens[1:]])
    return HeldOutBatch(batch=replace(inputs, targets=targets), source=source)


@torch.no_grad()
def validate(model: Transformer, *, held_out: HeldOut, mtp: bool, ranks: Alone | None = None) -> ValidationResult:
    """Score the held-out text; with `mtp`, the MTP modules as well. The model is left in the mode it was in.

    Of several ranks every pipeline scores all of the text, together.
    """
    ranks, config, device = ranks or Alone(), model.config, model.device
    was_training = model.training
    model.eval()
    modules = config.num_nextn_predict_layers if mtp else 0
    nats = torch.zeros(len(held_out.sources), dtype=torch.float64)
    mtp_nats, mtp_tokens = [0.0] * modules, [0] * modules
    load = torch.zeros(config.num_moe_layers + modules, config.n_routed_experts, dtype=torch.long)
    for piece in held_out.batches:
        for layers, output in forward_by_stages(model, batch=piece.batch.to(device), ranks=ranks, mtp=mtp):
            for place, routing in zip(places_of(output, layers=layers, model=config), output.routings, strict=True):
                load[place] += routing.load.cpu()
            if layers.stop < config.num_hidden_layers:
                continue
            assert piece.batch.targets is not None
            nll = token_nll(output.hidden, weight=model.lm_head.weight, targets=piece.batch.targets.to(device))
            nats.index_add_(0, piece.source, nll.double().cpu())
            for depth, one in enumerate(output.mtp):
                assert one.batch.targets is not None
                ahead = token_nll(one.hidden, weight=model.lm_head.weight, targets=one.batch.targets)
                mtp_nats[depth] += ahead.double().sum().item()
                mtp_tokens[depth] += one.batch.num_tokens
    found = ranks.total_over_pipeline([*nats.tolist(), *mtp_nats, *mtp_tokens])
    nats = torch.tensor(found[: len(nats)], dtype=torch.float64)
    mtp_nats, mtp_tokens = found[len(nats) : len(nats) + modules], [int(one) for one in found[len(nats) + modules :]]
    load = ranks.total_loads(load, over_data=False)
    model.train(was_training)
    bits = (nats / math.log(2)).tolist()
    return ValidationResult(
        bits_per_byte=sum(bits) / sum(held_out.bytes),
        loss=nats.sum().item() / sum(held_out.tokens),
        mtp_loss=tuple(total / max(count, 1) for total, count in zip(mtp_nats, mtp_tokens, strict=True)),
        by_source={
            name: found / size for name, found, size in zip(held_out.sources, bits, held_out.bytes, strict=True)
        },
        load=tuple(load),
    )
