"""transformers' DeepseekV3ForCausalLM over its latent cache, with the faster expert implementation for each task.

That is the loop over experts for prompts, and `grouped_mm` for single tokens; `batched_mm` copies the chosen experts'
weights for each token, and is far behind both.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from inference_peers.mini import published_folder
from inference_peers.system import Tokens
from inference_peers.tasks import TASKS, Task
from transformers import AutoModelForCausalLM, DynamicCache


class TransformersSystem:
    """One forward call a step, without `generate`, which would add to it."""

    def __init__(self, work: Path, *, dtype: torch.dtype) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            published_folder(work), dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self._tokens = Tokens()
        self._cache = DynamicCache()
        self._held: Task | None = None

    def ready(self, task: Task) -> None:
        self._model.set_experts_implementation("grouped_mm" if task.steps else "eager")
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
    "fp32": lambda work: TransformersSystem(work, dtype=torch.float32),
    "bf16": lambda work: TransformersSystem(work, dtype=torch.bfloat16),
}
