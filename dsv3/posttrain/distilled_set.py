"""The set that distillation writes: two kinds of samples, where each is from, and a card that counts the rest.

<problem, original response> and <system prompt, problem, response of the teacher> (report 5.1).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from dsv3.config.teaching import DistillConfig
from dsv3.data.contamination import IN_A_ROW, WHOLE, Exclusions
from dsv3.errors import DataError
from dsv3.posttrain.candidates import CandidateFile
from dsv3.posttrain.problem import Message, Problem
from dsv3.posttrain.selection import CONTAMINATED, COPY, REASONS, select
from dsv3.posttrain.teacher import Candidate, Question, file_hash
from dsv3.runtime.atomic import whole_file

ORIGINAL, BY_TEACHER = "original", "teacher"
KEPT = "kept"


@dataclass(kw_only=True)
class Counts:
    """What became of everything."""

    problems: int
    questions: dict[str, Counter[str]]
    """Evaluation file -> how many questions it has, whole or in a row."""
    contaminated: int = 0
    """Problems that any file has."""
    answers: Counter[str] = field(default_factory=Counter)
    """Evaluation file -> how many answers share words with it."""
    originals: Counter[str] = field(default_factory=Counter)
    drawn: list[int] = field(default_factory=list)
    """Tokens of every answer of the teacher."""
    kept: list[int] = field(default_factory=list)
    """Tokens of those kept."""
    rewards: list[float] = field(default_factory=list)
    """What each of these is worth."""
    rejected: Counter[str] = field(default_factory=Counter)
    solved: int = 0
    """Problems of which an answer was kept."""


class Samples:
    """Makes the lines of a set; no two hold the same conversation."""

    def __init__(
        self,
        *,
        config: DistillConfig,
        exclusions: Exclusions,
        counts: Counts,
        known: dict[str, str],
        teacher: dict[str, str],
    ) -> None:
        """`known` stands on every line, `teacher` on those of the teacher."""
        self.config, self.exclusions, self.counts = config, exclusions, counts
        self.known, self.teacher = known, teacher
        self._seen: set[bytes] = set()

    def of(self, questions: Sequence[Question], *, answers: CandidateFile) -> Iterator[dict[str, Any]]:
        """Yield all lines, in the order of the problems."""
        for question in questions:
            if self.config.originals:
                yield from self._original(question)
            yield from self._by_teacher(question, candidates=answers.candidates_of(question.place))

    def _original(self, question: Question) -> Iterator[dict[str, Any]]:
        text = original_of(question.problem)
        if not text:
            return
        messages = [*question.problem.messages, _answer(text)]
        verdict = KEPT
        if self._is_contaminated(text):
            verdict = CONTAMINATED
        elif _hash(messages) in self._seen:
            verdict = COPY
        self.counts.originals[verdict] += 1
        if verdict == KEPT:
            yield self._line(messages, question=question, kind=ORIGINAL)

    def _by_teacher(self, question: Question, *, candidates: list[Candidate]) -> Iterator[dict[str, Any]]:
        config, counts = self.config, self.counts
        prompt = with_system(question.problem.messages, prompt=config.system_prompt if config.write_system else "")
        selection = select(
            candidates,
            config=config,
            is_contaminated=self._is_contaminated,
            is_known=lambda text: _hash([*prompt, _answer(text)]) in self._seen,
        )
        counts.drawn += [one.num_tokens for one in candidates]
        counts.kept += [one.num_tokens for one in selection.kept]
        counts.rewards += [one.reward for one in selection.kept]
        counts.rejected.update(selection.rejected.values())
        counts.solved += bool(selection.kept)
        for one in selection.kept:
            drawn = {
                "temperature": config.temperature,
                "seed": one.seed,
                "candidate": one.number,
                "scores": dict(one.scores),
                "reward": one.reward,
                "tokens": one.num_tokens,
            }
            messages = [*prompt, _answer(one.text)]
            yield self._line(messages, question=question, kind=BY_TEACHER, **self.teacher, **drawn)

    def _line(self, messages: list[Message], *, question: Question, kind: str, **more: Any) -> dict[str, Any]:
        self._seen.add(_hash(messages))
        about = {"kind": kind, **self.known, "name": question.problem.name, "problem": question.place}
        return {"messages": messages, "provenance": about | more}

    def _is_contaminated(self, text: str) -> bool:
        found = self.exclusions.with_answer(text)
        self.counts.answers.update(found)
        return bool(found)


def with_system(messages: Sequence[Message], *, prompt: str) -> tuple[Message, ...]:
    """Return messages that begin with a system prompt; one that is there comes after it."""
    if not prompt:
        return tuple(messages)
    if messages and messages[0].get("role") == "system":
        own = messages[0]["content"]
        return ({"role": "system", "content": f"{prompt}\n\n{own}"}, *messages[1:])
    return ({"role": "system", "content": prompt}, *messages)


def original_of(problem: Problem) -> str:
    """Return the response that came with a problem, or else its answer; empty where it has neither."""
    return str(problem.more.get("response") or problem.answer).strip()


def write_set(lines: Iterator[dict[str, Any]], *, output: Path, counts: Counts) -> None:
    """Write the set, whole or not at all.

    Raises:
        DataError: there is not a line; says what became of all.
    """
    with whole_file(output) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        if not counts.kept and not counts.originals[KEPT]:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.rejected.most_common())
            raise DataError(
                f"nothing is left to write to {output}: of {counts.problems:,} problems {counts.contaminated:,} are in "
                f"an evaluation; answers rejected: {reasons or 'none'}"
            )


def card_of(counts: Counts, *, output: Path, settings: dict[str, Any], version: str) -> dict[str, Any]:
    """Return what stands beside a set that was written."""
    kept = counts.kept
    return {
        "file": output.name,
        "sha256": file_hash(output),
        "dsv3": version,
        "lines": {ORIGINAL: counts.originals[KEPT], BY_TEACHER: len(kept)},
        "problems": {
            "given": counts.problems,
            "contaminated": counts.contaminated,
            "asked": counts.problems - counts.contaminated,
            "with an answer kept": counts.solved,
        },
        "contaminated": {
            file: {WHOLE: met[WHOLE], IN_A_ROW: met[IN_A_ROW], "answers": counts.answers[file]}
            for file, met in counts.questions.items()
        },
        "answers": {
            "drawn": len(counts.drawn),
            "kept": len(kept),
            "rejected": {reason: counts.rejected[reason] for reason in REASONS},
            "mean tokens drawn": fmean(counts.drawn) if counts.drawn else 0.0,
            "mean tokens kept": fmean(kept) if kept else 0.0,
            "mean reward kept": fmean(counts.rewards) if kept else 0.0,
        },
        "originals": dict(sorted(counts.originals.items())),
        "settings": settings,
    }


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _hash(messages: Sequence[Message]) -> bytes:
    stripped = [{**one, "content": str(one.get("content")).strip()} for one in messages]
    return hashlib.sha256(json.dumps(stripped, sort_keys=True).encode()).digest()
