"""Rejection sampling: which of a teacher's answers are kept (report 5.1: accurate, and concise)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv3.config.teaching import DistillConfig
from dsv3.posttrain.teacher import Candidate

CUT_OFF = "cut off"
EMPTY = "empty"
TOO_SHORT = "too short"
CONTAMINATED = "contaminated"
WORTH_LESS = "worth too little"
COPY = "copy"
SURPLUS = "beyond the best"
REASONS = (CUT_OFF, EMPTY, TOO_SHORT, CONTAMINATED, WORTH_LESS, COPY, SURPLUS)
"""Why an answer is rejected; the first that holds is the one told."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What becomes of the answers to one problem."""

    kept: tuple[Candidate, ...]
    """The best first."""
    rejected: dict[int, str]
    """Number of an answer -> reason."""


def select(
    candidates: Sequence[Candidate],
    *,
    config: DistillConfig,
    is_contaminated: Callable[[str], bool],
    is_known: Callable[[str], bool],
) -> Selection:
    """Keep at most `config.keep` answers: those worth most, of these the shortest, of these the first drawn.

    `is_known` tells of a text whether the set has it already, behind the same question.
    """
    rejected: dict[int, str] = {}
    kept: list[Candidate] = []
    texts: set[str] = set()
    for one in sorted(candidates, key=lambda one: (-one.reward, one.num_tokens, one.number)):
        text = one.text.strip()
        if not one.finished:
            rejected[one.number] = CUT_OFF
        elif not text:
            rejected[one.number] = EMPTY
        elif one.num_tokens < config.min_answer_tokens:
            rejected[one.number] = TOO_SHORT
        elif is_contaminated(text):
            rejected[one.number] = CONTAMINATED
        elif not one.reward >= config.min_reward:
            rejected[one.number] = WORTH_LESS
        elif text in texts or is_known(text):
            rejected[one.number] = COPY
        elif len(kept) == config.keep:
            rejected[one.number] = SURPLUS
        else:
            kept.append(one)
            texts.add(text)
    return Selection(kept=tuple(kept), rejected=rejected)
