"""Which experts each kind of text goes to, layer by layer: the report's Figure 9, and a number for what it shows."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.data.windows import Window, batched, cut_windows
from dsv3.errors import ConfigError, DataError
from dsv3.evals.balance import ExpertLoad
from dsv3.evals.perplexity import TOKENS_AT_ONCE
from dsv3.model.transformer import Transformer
from dsv3.train.balance import max_violation

Loads = Sequence[Int[Tensor, " expert"]]
"""Of each MoE layer."""


@dataclass(frozen=True, kw_only=True)
class DomainLoad:
    """Where the tokens of one kind of text went. All tuples have an entry for each MoE layer of the main model."""

    name: str
    tokens: int
    relative: tuple[tuple[float, ...], ...]
    """Load of each expert, divided by what an even share would be."""
    max_violation: tuple[float, ...]
    apart: tuple[float, ...]
    """Share of its choices that fall on other experts than those of all other domains, each counted alike."""
    by_chance: tuple[float, ...]
    """The same between the first half of this domain's text and the second: so much means nothing."""

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return asdict(self)


def expert_loads(
    model: Transformer, *, documents: Mapping[str, Sequence[list[int]]], window: int
) -> tuple[DomainLoad, ...]:
    """Return where the tokens of each domain go. Documents begin with the begin token, and are cut into windows.

    Source: report 4.5.3, Figure 9 and appendix C. That `apart` is a number is ours.
    Raises:
        ConfigError: the model has no experts, or there are not two domains to tell apart.
        DataError: a domain does not fill two windows, so that it has no halves.
    """
    if not moe_layers(model):
        raise ConfigError("the model has no layer with experts, so no text goes to other experts than any other")
    if len(documents) < 2:
        raise ConfigError(f"only {', '.join(documents) or 'nothing'} was given; give text of two domains or more")
    halves = {name: _halves(texts, window=window, name=name) for name, texts in documents.items()}
    loads = {name: [_load(model, half) for half in both] for name, both in halves.items()}
    shares = {name: [_share(a + b) for a, b in zip(*both, strict=True)] for name, both in loads.items()}
    found = []
    for name, (first, second) in loads.items():
        whole = [a + b for a, b in zip(first, second, strict=True)]
        others = [shares[other] for other in shares if other != name]
        rest = [torch.stack(layer).mean(0) for layer in zip(*others, strict=True)]
        found.append(
            DomainLoad(
                name=name,
                tokens=sum(len(piece.tokens) - 1 for half in halves[name] for piece in half),
                relative=tuple(tuple((share * len(share)).tolist()) for share in shares[name]),
                max_violation=tuple(max_violation(layer) for layer in whole),
                apart=tuple(distance(a, b) for a, b in zip(shares[name], rest, strict=True)),
                by_chance=tuple(distance(_share(a), _share(b)) for a, b in zip(first, second, strict=True)),
            )
        )
    return tuple(found)


def moe_layers(model: Transformer) -> tuple[int, ...]:
    """Return the layers of the main model that have experts, counted from 0 as in a checkpoint."""
    return tuple(layer for layer in range(model.config.num_hidden_layers) if model.config.is_moe_layer(layer))


def distance(first: Float[Tensor, " expert"], second: Float[Tensor, " expert"]) -> float:
    """Return the total variation distance of two distributions: 0 if they are the same, 1 if they share nothing."""
    return (first - second).abs().sum().item() / 2


def _share(load: Int[Tensor, " expert"]) -> Float[Tensor, " expert"]:
    return load.double() / load.sum()


def _halves(documents: Sequence[list[int]], *, window: int, name: str) -> tuple[list[Window], list[Window]]:
    """Cut a domain's text in two, in its order, so that the halves share as few documents as can be."""
    windows = sorted(cut_windows(documents, length=window), key=lambda piece: piece.document)
    ends = list(accumulate(len(piece.tokens) - 1 for piece in windows))
    if len(windows) < 2:
        raise DataError(
            f"{name} has {sum(map(len, documents)):,} tokens, no more than a window of {window}; give more text of it, "
            "or a shorter window"
        )
    middle = min(bisect_left(ends, ends[-1] / 2) + 1, len(windows) - 1)
    return windows[:middle], windows[middle:]


def _load(model: Transformer, windows: Iterable[Window]) -> Loads:
    load = ExpertLoad()
    for pieces in batched(windows, max_tokens=TOKENS_AT_ONCE):
        batch = TokenBatch.from_sequences([piece.tokens[:-1] for piece in pieces]).to(model.device)
        with torch.inference_mode():
            load.add(model(batch).routings)
    return load.layers
