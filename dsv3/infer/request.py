"""What is asked of the engine; what it says back is in `infer/events.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.infer.constraint import Constraint
from dsv3.infer.handover import PageSink
from dsv3.infer.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to be continued."""

    id: str
    """Unique among the requests that the engine has not finished."""
    prompt_ids: Sequence[int]
    params: SamplingParams
    answer_ids: Sequence[int] = ()
    """The answer's first tokens, where another engine has drawn them; what is told and counted comes after them.

    Draws are functions of seed and place, so with a seed the answer goes on as it would have gone on there.
    """
    hand_to: PageSink | None = None
    """Where the latent cache goes, page by page while the prompt is read; the request ends here with its next token."""
    constraint: Constraint | None = None
    """A grammar that the answer must obey; the engine advances it, so each request needs its own."""
    num_logprobs: int | None = None
    """Report each token's log-probability with those of so many likeliest ones (0: only its own); None reports none.

    They are the model's own: before temperature, penalties, bias, grammar and top-k, top-p or min-p.
    """
    prompt_logprobs: bool = False
    """Report log-probabilities of the prompt's tokens too, in the first event. The prompt is then read whole."""
    with_experts: bool = False
    """Report where every token went that was read, in the last event. The prompt is then read whole."""
