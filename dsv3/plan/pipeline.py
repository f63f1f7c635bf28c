"""What a pipeline schedule is: for each rank, the order of its forward and backward chunks (report 3.2.1).

A schedule is plain data. `schedules.py` makes them, `simulate.py` runs them on paper, `parallel/pipeline.py` for good.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import product
from typing import NamedTuple

from dsv3.errors import ConfigError


class Kind(StrEnum):
    """What a chunk of work does with one micro-batch at one stage."""

    FORWARD = "F"
    BACKWARD = "B"
    """Whole: the gradients of inputs and of weights."""
    INPUT = "I"
    """Backward for the inputs' gradients alone, which the stage before waits for."""
    WEIGHT = "W"
    """Backward for the weights' gradients, which nobody waits for."""


class Action(NamedTuple):
    """One chunk of work; a tuple, since thousands of them are looked up for one plan."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro_batch}"


Step = tuple[Action, ...]
"""What a rank does at a time: one chunk, or a forward and a backward chunk woven into each other."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The order of work of all ranks.

    Construction checks that every micro-batch goes forward and backward through every stage exactly once, on the rank
    that its route says, each rank in an order that can be followed; whether ranks wait for each other in a circle is
    told by `simulate`.
    """

    name: str
    num_micro_batches: int
    routes: tuple[tuple[int, ...], ...]
    """For each direction, the rank of every stage. Micro-batches are dealt to the directions in equal, consecutive
    shares; most schedules have one direction."""
    steps: tuple[tuple[Step, ...], ...]
    """By rank."""

    def __post_init__(self) -> None:
        counted: dict[Kind, Counter[tuple[int, int]]] = {kind: Counter() for kind in Kind}
        for rank, mine in enumerate(self.steps):
            done: set[Action] = set()
            for step in mine:
                for action in step:
                    assert self.rank_of(action) == rank, f"{self.name}: {action} is not rank {rank}'s"
                    assert self._may_follow(action, done=done), f"{self.name}: rank {rank} does {action} too early"
                    counted[action.kind][action.stage, action.micro_batch] += 1
                done.update(step)
        once = Counter(product(range(self.num_stages), range(self.num_micro_batches)))
        forward, whole, inputs, weights = (counted[kind] for kind in Kind)
        for found, wanted in ((forward, once), (whole + inputs, once), (inputs, weights)):
            assert found == wanted, f"{self.name}: {sorted((found - wanted) + (wanted - found))[:1]}"

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.steps)

    @property
    def num_stages(self) -> int:
        """Parts that the model is cut into."""
        return len(self.routes[0])

    def direction(self, micro_batch: int) -> int:
        """Return which of the routes a micro-batch takes."""
        return micro_batch * len(self.routes) // self.num_micro_batches

    def rank_of(self, action: Action) -> int:
        """Return the rank that does it."""
        return self.routes[self.direction(action.micro_batch)][action.stage]

    def needs(self, action: Action) -> tuple[Action, ...]:
        """Return what must have ended before `action` can begin, all of it."""
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind is Kind.FORWARD:
            return (Action(Kind.FORWARD, stage - 1, micro_batch),) if stage else ()
        if action.kind is Kind.WEIGHT:
            return (Action(Kind.INPUT, stage, micro_batch),)
        forward = Action(Kind.FORWARD, stage, micro_batch)
        return (forward, self._backward[stage + 1, micro_batch]) if stage + 1 < self.num_stages else (forward,)

    @cached_property
    def waits(self) -> tuple[tuple[tuple[tuple[int, int, bool], ...], ...], ...]:
        """For each step of each rank the steps that must have ended before it: rank, place, whether on another rank."""
        places = {
            action: (rank, place)
            for rank, steps in enumerate(self.steps)
            for place, step in enumerate(steps)
            for action in step
        }
        return tuple(
            tuple(
                tuple((*places[need], places[need][0] != rank) for action in step for need in self.needs(action))
                for step in steps
            )
            for rank, steps in enumerate(self.steps)
        )

    @cached_property
    def forms(self) -> tuple[tuple[Step, ...], tuple[tuple[int, ...], ...]]:
        """The first step of each form, and for each step of each rank which form it has: its kinds and stages.

        Steps of one form differ in their micro-batches alone.
        """
        found: dict[tuple[tuple[Kind, int], ...], int] = {}
        first: list[Step] = []
        numbers = []
        for steps in self.steps:
            mine = []
            for step in steps:
                form = tuple(action[:2] for action in step)
                if form not in found:
                    found[form] = len(first)
                    first.append(step)
                mine.append(found[form])
            numbers.append(tuple(mine))
        return tuple(first), tuple(numbers)

    @cached_property
    def carried(self) -> dict[Action, Action]:
        """For each action that makes something for another rank, the action there that waits for it."""
        actions = (action for rank in self.steps for step in rank for action in step)
        pairs = ((need, action) for action in actions for need in self.needs(action))
        return {need: action for need, action in pairs if self.rank_of(need) != self.rank_of(action)}

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages whose weights a rank holds."""
        return tuple(sorted({stage for route in self.routes for stage, at in enumerate(route) if at == rank}))

    @cached_property
    def _backward(self) -> dict[tuple[int, int], Action]:
        """For each stage and micro-batch, the action that gives its inputs' gradients."""
        kinds = (Kind.BACKWARD, Kind.INPUT)
        actions = (action for rank in self.steps for step in rank for action in step)
        return {(action.stage, action.micro_batch): action for action in actions if action.kind in kinds}

    @staticmethod
    def _may_follow(action: Action, *, done: set[Action]) -> bool:
        if action.kind is Kind.FORWARD:
            return True
        before = Kind.INPUT if action.kind is Kind.WEIGHT else Kind.FORWARD
        return Action(before, action.stage, action.micro_batch) in done


def require_micro_batches(found: int, *, name: str, multiple_of: int = 1, least: int = 1) -> None:
    """Refuse a number of micro-batches that a schedule cannot work with.

    Raises:
        ConfigError: says which numbers can be used.
    """
    if found >= least and found % multiple_of == 0:
        return
    lowest = -(-least // multiple_of) * multiple_of
    nearest = max(lowest, round(found / multiple_of) * multiple_of)
    rule = f"at least {lowest}" + (f" and a multiple of {multiple_of}" if multiple_of > 1 else "")
    raise ConfigError(f"{found} micro-batches, but schedule {name} needs {rule}; {nearest} would do")
