"""A request while the engine works on it."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.errors import ConfigError
from dsv3.infer.events import TokenLogprob
from dsv3.infer.pages import Key
from dsv3.infer.request import Request
from dsv3.infer.sampler import TokenSampler


@dataclass(kw_only=True)
class MtpPast:
    """How far one MTP module has followed a sequence."""

    done: int = 0
    """Positions whose entries are in step: made from the tokens that now stand there."""
    unread: list[Float[Tensor, "token hidden"]] = field(default_factory=list)
    """States from position `done` on, in pieces, that the module is yet to read."""

    @property
    def num_unread(self) -> int:
        """Positions that the module is behind."""
        return sum(map(len, self.unread))


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Tokens of one request, and where they stand in the cache."""

    request: Request
    arrival: int
    tokens: list[int]
    """Prompt, then answer."""
    sampler: TokenSampler
    keys: list[Key] = field(default_factory=list)
    """Of every full page of `tokens`."""
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens that the cache has entries of; one fewer than there are tokens, while decoding."""
    num_registered: int = 0
    """Pages that can be found by others."""
    num_handed: int = 0
    """Pages that have gone to the engine that will continue the request; they are good there for ever."""
    drafts: list[int] = field(default_factory=list)
    """What may follow; to be verified."""
    mtp: list[MtpPast] = field(default_factory=list)
    num_cached: int | None = None
    """Tokens found in the cache when the request was first read."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    has_reported: bool = False
    experts: list[Int[np.ndarray, "token layer chosen"]] = field(default_factory=list)
    """Where its tokens went, piece after piece, if that was asked; the first `num_computed` stand."""

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_answer(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not computed."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all but the newest token is computed."""
        return self.num_pending == 1 and self.num_answer > 0

    def take(self, token: int) -> None:
        """Let a token follow that has been drawn, here or where the sequence comes from.

        Raises:
            ConfigError: the grammar does not allow it.
        """
        constraint = self.request.constraint
        if constraint is not None and not constraint.advance(token):
            raise ConfigError(f"the grammar turned down token {token}, which it had allowed")
        self.tokens.append(token)
        self.sampler.add(token)

    def start_over(self) -> None:
        """Forget what was computed; the pages must have been let go of."""
        self.pages, self.drafts, self.mtp, self.prompt_logprobs, self.experts = [], [], [], [], []
        self.num_computed = self.num_registered = 0

    def keep_experts(self, piece: Int[np.ndarray, "token layer chosen"]) -> None:
        """Take note of where the tokens of a pass went, before any of them counts; of drafts as of others."""
        while (ahead := sum(map(len, self.experts)) - self.num_computed) > 0:  # drafts of the last pass that were wrong
            last = self.experts.pop()
            if len(last) > ahead:
                self.experts.append(last[: len(last) - ahead])
        self.experts.append(piece)

    def experts_of_tokens(self) -> Int[np.ndarray, "token layer chosen"] | None:
        """Return where the tokens went that have been computed; None if that was not asked, or nothing was."""
        return np.concatenate(self.experts)[: self.num_computed] if self.experts else None

    def past_of(self, module: int, *, first: int) -> MtpPast:
        """Return how far an MTP module has come; one that has not begun begins at position `first`."""
        while len(self.mtp) <= module:
            self.mtp.append(MtpPast(done=first))
        return self.mtp[module]
