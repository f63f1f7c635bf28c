"""What every system is timed at."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sequences side by side with so many tokens read, and what is timed from there."""

    label: str
    sequences: int = 1
    context: int
    """Tokens of each sequence that are read before the clock starts; for a prompt, those that it times."""
    steps: int = 0
    """Passes of one token a sequence that are timed; 0 times the reading of the prompt instead."""

    @property
    def tokens(self) -> int:
        """Tokens that count for the speed."""
        return self.sequences * self.steps or self.context


TASKS = {
    "decode": Task(label="decode, batch 1", context=32, steps=16),
    "batch": Task(label="decode, batch 8", sequences=8, context=32, steps=8),
    "prompt": Task(label="prompt of 512", context=512),
    "long": Task(label="decode at context 2048", context=2048, steps=16),
}
"""By the name that a worker is told."""
