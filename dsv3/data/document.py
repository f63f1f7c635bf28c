"""One text of the corpus, and the account of what could not be read or was read with a change."""

from dataclasses import dataclass, field

MAX_EXAMPLES = 5
"""Names kept for each reason, so that a report of a million broken lines stays readable."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, which becomes one sequence from BOS to EOS."""

    name: str
    """Where it stands: a path, with the line or part behind a '#'."""
    text: str
    provenance: str = ""
    """Of text that a model made: what its record says of it, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """Something that happened to files, lines or documents of a source, how often, and to which."""

    reason: str
    count: int
    examples: tuple[str, ...]
    """The first few names."""


@dataclass
class ReadingLog:
    """Counts what was skipped and what was changed while a source was read; nothing is dropped in silence."""

    skipped: dict[str, list[str | int]] = field(default_factory=dict)
    changed: dict[str, list[str | int]] = field(default_factory=dict)

    def skip(self, name: str, *, reason: str) -> None:
        """Count a file, line or document that is not in the corpus."""
        _count(self.skipped, name=name, reason=reason)

    def change(self, name: str, *, reason: str) -> None:
        """Count one that is, but not byte for byte."""
        _count(self.changed, name=name, reason=reason)

    def skipped_remarks(self) -> tuple[Remark, ...]:
        """Return what was skipped, by reason."""
        return _remarks(self.skipped)

    def changed_remarks(self) -> tuple[Remark, ...]:
        """Return what was changed, by reason."""
        return _remarks(self.changed)


def _count(tally: dict[str, list[str | int]], *, name: str, reason: str) -> None:
    entry = tally.setdefault(reason, [0])
    entry[0] = int(entry[0]) + 1
    if len(entry) <= MAX_EXAMPLES:
        entry.append(name)


def _remarks(tally: dict[str, list[str | int]]) -> tuple[Remark, ...]:
    return tuple(
        Remark(reason=reason, count=int(entry[0]), examples=tuple(str(name) for name in entry[1:]))
        for reason, entry in sorted(tally.items())
    )
