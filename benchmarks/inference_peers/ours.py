"""This repository's engine: requests that draw at temperature 1, as a server would run them."""

from collections.abc import Callable
from pathlib import Path

from inference_peers.mini import MINI, published_folder
from inference_peers.system import Tokens
from inference_peers.tasks import Task

from dsv3.config import EngineConfig
from dsv3.infer.engine import Engine
from dsv3.infer.packed_loading import load_packed
from dsv3.infer.packed_runner import PackedRunner
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request


class OurSystem:
    """An `Engine` whose requests never end by themselves."""

    def __init__(self, work: Path, *, weights: str) -> None:
        runner = PackedRunner(load_packed(published_folder(work), weights=weights))
        self._engine = Engine(runner, config=EngineConfig(num_pages=128), vocab_size=MINI.vocab_size, eos_id=1)
        self._tokens = Tokens()
        self._running: list[str] = []
        self._count = 0

    def ready(self, task: Task) -> None:
        for name in self._running:
            self._engine.cancel(name)
        self._running = [] if task.steps == 0 else [self._add(task) for _ in range(task.sequences)]
        waiting = set(self._running)
        while waiting:
            waiting -= {event.id for event in self._engine.step() if event.tokens}

    def go(self, task: Task) -> None:
        if task.steps == 0:
            self._add(task, max_tokens=1)
            while self._engine.has_work:
                self._engine.step()
        for _ in range(task.steps):
            events = self._engine.step()
            assert sum(len(event.tokens) for event in events) == task.sequences

    def _add(self, task: Task, *, max_tokens: int = 1000) -> str:
        self._count += 1
        params = SamplingParams(temperature=1.0, top_p=1.0, seed=self._count, ignore_end=True, max_tokens=max_tokens)
        request = Request(id=str(self._count), prompt_ids=self._tokens.prompt(task), params=params)
        self._engine.add(request)
        return request.id


MODES: dict[str, Callable[[Path], OurSystem]] = {
    weights: lambda work, weights=weights: OurSystem(work, weights=weights)
    for weights in ("fp32", "bf16", "fp8", "int8", "int4")
}
