"""transformers' DeepseekV3ForCausalLM over its latent cache, with each expert implementation that is of use here."""

from collections.abc import Callable
from pathlib import Path

import torch
from inference_peers.mini import published_folder
from inference_peers.system import Tokens
from inference_peers.tasks import TASKS, Task
from transformers import AutoModelForCausalLM, DynamicCache


class TransformersSystem:
    """One forward call a step, without `generate`, which would add to it."""

    def __init__(self, work: Path, *, dtype: torch.dtype, experts: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            published_folder(work), dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
        ).eval()
        self._tokens = Tokens()
        self._cache = DynamicCache()
        self._held: Task | None = None

    def ready(self, task: Task) -> None:
        if task is TASKS["long"] and self._held is task:
            self._cache.crop(-task.steps)
        else:
            self._cache = DynamicCache()
            if task.steps:
                self._step([self._tokens.prompt(task) for _ in range(task.sequences)])
        self._held = task

    def go(self, task: Task) -> None:
        if task.steps == 0:
            self._step([self._tokens.prompt(task)])
        for _ in range(task.steps):
            self._step([[token] for token in self._tokens.fresh(task.sequences)])

    @torch.inference_mode()
    def _step(self, rows: list[list[int]]) -> None:
        output = self._model(
            input_ids=torch.tensor(rows), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        output.logits[:, -1].argmax(-1)


MODES: dict[str, Callable[[Path], TransformersSystem]] = {
    f"{name}, {experts}": lambda work, dtype=dtype, experts=experts: TransformersSystem(
        work, dtype=dtype, experts=experts
    )
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for experts in ("eager", "grouped_mm")
}
