"""What training tells whoever watches it: a progress view, or nobody."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainEvent:
    """Something that has happened in a run."""

    stage: str
    """'corpus', 'train' or 'export'."""
    kind: str
    """Of the corpus stage 'corpus'; of training 'resume', 'step', 'validation', 'sample' and 'snapshot'; 'export'."""
    step: int = 0
    """Optimizer steps taken."""
    total_steps: int = 0
    """Steps of the whole run; 0 while that is not known."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """For steps, validations and samples the record as in metrics.jsonl; for the corpus 'part', 'done' and 'total'
    (0: not known); for a snapshot or the export its 'path'."""


EventCallback = Callable[[TrainEvent], None]
