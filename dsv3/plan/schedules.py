"""The pipeline schedules: GPipe, 1F1B, interleaved, zero-bubble (ZB1P and ZBV), DualPipe and DualPipeV.

Sources: DualPipe and Table 2: report 3.2.1. GPipe: Huang et al. 2019. 1F1B and interleaved: Narayanan et al. 2021.
ZB1P (ZB-H1) and ZBV: Qi et al. 2023 and 2024.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from dsv3.errors import ConfigError
from dsv3.plan.pipeline import Action, Kind, Schedule, Step, require_micro_batches

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT  # noqa: E741


def gpipe(*, num_ranks: int, num_micro_batches: int) -> Schedule:
    """All forward, then all backward."""
    _require_ranks(num_ranks)
    require_micro_batches(num_micro_batches, name="gpipe")
    every = range(num_micro_batches)
    steps = [
        [*((Action(F, rank, m),) for m in every), *((Action(B, rank, m),) for m in every)] for rank in range(num_ranks)
    ]
    return _one_way("gpipe", steps, num_micro_batches=num_micro_batches)


def one_f_one_b(*, num_ranks: int, num_micro_batches: int) -> Schedule:
    """1F1B: as soon as a rank can go backward it does so after every forward, so that few activations are held."""
    _require_ranks(num_ranks)
    require_micro_batches(num_micro_batches, name="1f1b")

    def steps(rank: int) -> Iterator[Action]:
        ahead = min(num_ranks - 1 - rank, num_micro_batches)
        for m in range(num_micro_batches + ahead):
            if m < num_micro_batches:
                yield Action(F, rank, m)
            if m >= ahead:
                yield Action(B, rank, m - ahead)

    return _one_way("1f1b", [_singly(steps(rank)) for rank in range(num_ranks)], num_micro_batches=num_micro_batches)


def interleaved(*, num_ranks: int, num_micro_batches: int, stages_per_rank: int = 2) -> Schedule:
    """1F1B over more and smaller stages, dealt out round after round; the bubble shrinks by their number a rank."""
    _require_ranks(num_ranks)
    if stages_per_rank < 1:
        raise ConfigError(f"stages_per_rank = {stages_per_rank}; use 1 or more")
    require_micro_batches(num_micro_batches, name="interleaved", multiple_of=num_ranks)
    total = num_micro_batches * stages_per_rank

    def chunk(number: int, *, rank: int, backward: bool) -> tuple[int, int]:
        """Return stage and micro-batch of a rank's chunk number `number`: a round of all ranks' worth a stage."""
        round_of, place = divmod(number, num_ranks * stages_per_rank)
        slot, offset = divmod(place, num_ranks)
        part = stages_per_rank - 1 - slot if backward else slot
        return part * num_ranks + rank, round_of * num_ranks + offset

    def steps(rank: int) -> Iterator[Action]:
        ahead = min(2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * num_ranks, total)
        for number in range(total + ahead):
            if number < total:
                yield Action(F, *chunk(number, rank=rank, backward=False))
            if number >= ahead:
                yield Action(B, *chunk(number - ahead, rank=rank, backward=True))

    return Schedule(
        name="interleaved",
        num_micro_batches=num_micro_batches,
        routes=(tuple(stage % num_ranks for stage in range(num_ranks * stages_per_rank)),),
        steps=tuple(tuple(_singly(steps(rank))) for rank in range(num_ranks)),
    )


def zb1p(*, num_ranks: int, num_micro_batches: int) -> Schedule:
    """1F1B whose weight gradients wait until there is nothing more urgent, within 1F1B's memory."""
    _require_ranks(num_ranks)
    require_micro_batches(num_micro_batches, name="zb1p")

    def steps(rank: int) -> Iterator[Action]:
        ahead = min(num_ranks - 1 - rank, num_micro_batches)
        waiting: deque[int] = deque()
        for m in range(num_micro_batches + ahead):
            if m < num_micro_batches:
                yield Action(F, rank, m)
            if m >= ahead:
                yield Action(I, rank, m - ahead)
                waiting.append(m - ahead)
            # As many wait as there are ranks before this one: so long do gradients take from here to the first.
            if waiting and (m >= num_micro_batches or len(waiting) > rank):
                yield Action(W, rank, waiting.popleft())
        yield from (Action(W, rank, m) for m in waiting)

    return _one_way("zb1p", [_singly(steps(rank)) for rank in range(num_ranks)], num_micro_batches=num_micro_batches)


def zbv(*, num_ranks: int, num_micro_batches: int) -> Schedule:
    """Two stages a rank, laid out as a V, so that the rank of the first stage has the last one too.

    Without idle time between a rank's first and last chunk where forward, inputs' and weights' gradients take equally
    long.
    """
    _require_ranks(num_ranks)
    require_micro_batches(num_micro_batches, name="zbv", least=2 * num_ranks - 1)
    last = 2 * num_ranks - 1

    def steps(rank: int) -> Iterator[Action]:
        chunks = _Chunks(near=rank, far=last - rank)
        for _ in range(2 * (num_ranks - rank) - 1):
            yield chunks.forward(0)
        for _ in range(rank):
            yield chunks.forward(1)
            yield chunks.forward(0)
        for _ in range(num_ranks - rank):
            yield chunks.forward(1)
            yield chunks.inputs(1)
            yield chunks.weights()
        while chunks.num_forward[1] < chunks.num_forward[0] or chunks.num_forward[0] < num_micro_batches:
            if chunks.num_forward[0] < num_micro_batches:
                yield chunks.forward(0)
            yield chunks.inputs(0)
            yield chunks.weights()
            yield chunks.forward(1)
            yield chunks.inputs(1)
            yield chunks.weights()
        for _ in range(rank):
            yield chunks.inputs(0)
            yield chunks.inputs(1)
        for _ in range(num_ranks - rank):
            yield chunks.inputs(0)
            yield chunks.weights()
        while chunks.waiting:
            yield chunks.weights()

    return Schedule(
        name="zbv",
        num_micro_batches=num_micro_batches,
        routes=(_v_shape(num_ranks),),
        steps=tuple(tuple(_singly(steps(rank))) for rank in range(num_ranks)),
    )


def dualpipe(*, num_ranks: int, num_micro_batches: int) -> Schedule:
    """Micro-batches enter at both ends, so that every rank has a forward chunk to weave into a backward one (Fig. 5).

    Every rank holds two stages, and every stage lies on two ranks. The first half of the micro-batches goes one way,
    the second half the other.
    """
    _require_ranks(num_ranks, even=True)
    require_micro_batches(num_micro_batches, name="dualpipe", multiple_of=2, least=2 * num_ranks)
    half = num_micro_batches // 2

    def steps(rank: int) -> Iterator[Step]:
        edge = min(rank, num_ranks - 1 - rank)
        first = 0 if rank < num_ranks // 2 else half
        chunks = _Chunks(near=edge, far=num_ranks - 1 - edge, first=(first, half - first))
        return _eight_steps(
            chunks,
            edge=edge,
            depth=num_ranks // 2,
            steady=half - num_ranks + edge + 1,
            weaves_at_once=edge < num_ranks // 2 - 1,
        )

    forth = tuple(range(num_ranks))
    return Schedule(
        name="dualpipe",
        num_micro_batches=num_micro_batches,
        routes=(forth, forth[::-1]),
        steps=tuple(tuple(steps(rank)) for rank in range(num_ranks)),
    )


def dualpipe_v(*, num_ranks: int, num_micro_batches: int) -> Schedule:
    """DualPipe cut in half: the far direction is the way back of the same micro-batches, and no stage is held twice.

    Source: the DualPipe repository, after Sea AI Lab's "cut in half".
    """
    _require_ranks(num_ranks)
    require_micro_batches(num_micro_batches, name="dualpipe_v", least=2 * num_ranks)

    def steps(rank: int) -> Iterator[Step]:
        return _eight_steps(
            _Chunks(near=rank, far=2 * num_ranks - 1 - rank),
            edge=rank,
            depth=num_ranks,
            steady=num_micro_batches - 2 * num_ranks + rank + 1,
            weaves_at_once=rank < num_ranks - 1,
        )

    return Schedule(
        name="dualpipe_v",
        num_micro_batches=num_micro_batches,
        routes=(_v_shape(num_ranks),),
        steps=tuple(tuple(steps(rank)) for rank in range(num_ranks)),
    )


class _Chunks:
    """The next chunks of a rank that holds two stages, the near one of the way in and the far one, way 0 and way 1."""

    def __init__(self, *, near: int, far: int, first: tuple[int, int] = (0, 0)) -> None:
        self._stages = (near, far)
        self._first = first
        self.num_forward = [0, 0]
        self._num_backward = [0, 0]
        self.waiting: deque[Action] = deque()
        """Weights' gradients that are put off, in the order in which they will be made."""

    def forward(self, way: int) -> Action:
        self.num_forward[way] += 1
        return Action(F, self._stages[way], self._first[way] + self.num_forward[way] - 1)

    def backward(self, way: int) -> Action:
        self._num_backward[way] += 1
        return Action(B, self._stages[way], self._first[way] + self._num_backward[way] - 1)

    def inputs(self, way: int) -> Action:
        """Return a backward chunk whose weights' gradients are put off."""
        whole = self.backward(way)
        self.waiting.append(Action(W, whole.stage, whole.micro_batch))
        return Action(I, whole.stage, whole.micro_batch)

    def weights(self) -> Action:
        return self.waiting.popleft()


def _eight_steps(chunks: _Chunks, *, edge: int, depth: int, steady: int, weaves_at_once: bool) -> Iterator[Step]:
    """Yield the work of a rank that is `edge` ranks away from the end where its near way begins.

    Way 0 is the near one: the direction whose entrance this rank is closer to. `depth` is half the number of stages.
    """
    inner = depth - edge - 1
    # 1. Fill the near way.
    for _ in range(2 * inner):
        yield (chunks.forward(0),)
    # 2. Both ways fill.
    for _ in range(edge + 1):
        yield (chunks.forward(0),)
        yield (chunks.forward(1),)
    # 3. The far way has come back; weights' gradients fill the time until its next forward chunk is here.
    for _ in range(inner):
        yield (chunks.inputs(1),)
        yield (chunks.weights(),)
        yield (chunks.forward(1),)
    # 4. Steady: each forward chunk is woven into a backward chunk of the other way.
    for number in range(steady):
        if number or weaves_at_once:
            yield (chunks.forward(0), chunks.backward(1))
        else:
            # In the middle the first two come one after the other: neither neighbour would gain by waiting for both.
            yield (chunks.forward(0),)
            yield (chunks.backward(1),)
        yield (chunks.forward(1), chunks.backward(0))
    # 5. The near way has no more to go forward.
    for _ in range(inner):
        yield (chunks.backward(1),)
        yield (chunks.forward(1), chunks.backward(0))
    # 6. Only backward is left; from the middle on, weights' gradients are put off.
    for number in range(2 * (edge + 1)):
        way = 1 - number % 2
        yield (chunks.inputs(way) if number >= edge + 1 else chunks.backward(way),)
    # 7. What was put off fills the time until gradients come.
    for _ in range(inner):
        yield (chunks.weights(),)
        yield (chunks.inputs(0),)
    # 8. The rest of it.
    for _ in range(edge + 1):
        yield (chunks.weights(),)


def _one_way(name: str, steps: Sequence[Sequence[Step]], *, num_micro_batches: int) -> Schedule:
    return Schedule(
        name=name,
        num_micro_batches=num_micro_batches,
        routes=(tuple(range(len(steps))),),
        steps=tuple(map(tuple, steps)),
    )


def _singly(actions: Iterator[Action]) -> list[Step]:
    return [(action,) for action in actions]


def _v_shape(num_ranks: int) -> tuple[int, ...]:
    return tuple(chain(range(num_ranks), reversed(range(num_ranks))))


def _require_ranks(num_ranks: int, *, even: bool = False) -> None:
    if num_ranks < 1 or (even and num_ranks % 2):
        wanted = "an even number of ranks" if even else "at least one rank"
        raise ConfigError(f"a pipeline of {num_ranks} ranks; this schedule needs {wanted}")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "zbv": zbv,
    "dualpipe": dualpipe,
    "dualpipe_v": dualpipe_v,
}
"""By the name that settings use. Each takes `num_ranks` and `num_micro_batches`."""
