"""llama.cpp, from its Python package's low-level calls, so that nothing of Python lies between its steps."""

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from inference_peers.mini import MINI, gguf_file
from inference_peers.system import Tokens
from inference_peers.tasks import TASKS, Task


class LlamaSystem:
    """A context with room for eight sequences; its cache is in FP16 and flash attention its own choice, by default."""

    def __init__(self, work: Path, *, kind: str) -> None:
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(_silent)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        file = gguf_file(work, kind=kind)
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 4096, 2048, 512
        settings.n_seq_max, settings.kv_unified = 8, True
        settings.n_threads = settings.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        assert self._context, f"llama.cpp made no context for {file}"
        self._batch = llama_cpp.llama_batch_init(2048, 0, 8)
        self._tokens = Tokens()
        self._held: Task | None = None
        """The task whose prompts are in the cache."""
        self._position = 0

    def ready(self, task: Task) -> None:
        memory = llama_cpp.llama_get_memory(self._context)
        if task is TASKS["long"] and self._held is task:
            llama_cpp.llama_memory_seq_rm(memory, 0, task.context, -1)
        else:
            llama_cpp.llama_memory_clear(memory, True)
            for sequence in range(task.sequences if task.steps else 0):
                self._read(self._tokens.prompt(task), sequence=sequence)
        self._held, self._position = task, task.context

    def go(self, task: Task) -> None:
        if task.steps == 0:
            self._read(self._tokens.prompt(task), sequence=0)
        for _ in range(task.steps):
            self._decode(
                self._tokens.fresh(task.sequences),
                positions=[self._position] * task.sequences,
                sequences=range(task.sequences),
                wanted=range(task.sequences),
            )
            self._position += 1

    def _read(self, prompt: list[int], *, sequence: int) -> None:
        count = len(prompt)
        self._decode(prompt, positions=range(count), sequences=[sequence] * count, wanted=[count - 1])

    def _decode(
        self, tokens: Sequence[int], *, positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[int]
    ) -> None:
        """Read tokens, and choose the likeliest next one at those places that are wanted."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = place in wanted
        failed = llama_cpp.llama_decode(self._context, batch)
        assert not failed, f"llama_decode answers {failed}"
        for place in wanted:
            logits = llama_cpp.llama_get_logits_ith(self._context, place)
            int(np.ctypeslib.as_array(logits, (MINI.vocab_size,)).argmax())


MODES: dict[str, Callable[[Path], LlamaSystem]] = {
    kind: lambda work, kind=kind: LlamaSystem(work, kind=kind)
    for kind in ("f32", "f16", "bf16", "q8_0", "q4_k_m", "q4_0")
}


def _silent(*_: object) -> None:
    """Drop a message."""
