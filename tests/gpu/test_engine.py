"""Generation on a GPU: greedy text is that of a CPU, whatever drafts and company there are."""

from dataclasses import replace

import pytest
import torch

from dsv3 import recipes
from dsv3.config import EngineConfig
from dsv3.infer.engine import Engine
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request
from dsv3.infer.runner import TorchRunner
from dsv3.model.transformer import Transformer

PROMPTS = [
    torch.randint(4096, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (5, 70, 33)
]


def model_on(device: torch.device, *, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(replace(recipes.tiny().model, initializer_range=0.1))
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model.to(device=device, dtype=dtype).requires_grad_(False)


def answers(model: Transformer, *, drafts: int = 0) -> list[list[int]]:
    config = EngineConfig(page_tokens=16, num_pages=64, max_drafts=drafts)
    engine = Engine(TorchRunner(model), config=config, vocab_size=4096, eos_id=4095)
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(id=str(number), prompt_ids=prompt, params=SamplingParams(temperature=0.0, max_tokens=20)))
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.id, []).extend(event.tokens)
    return [found[str(number)] for number in range(len(PROMPTS))]


@pytest.mark.parametrize("drafts", [0, 2])
def test_greedy_answers_in_fp64_are_those_of_a_cpu(gpu, drafts):
    there = answers(model_on(gpu, dtype=torch.float64), drafts=drafts)
    assert there == answers(model_on(torch.device("cpu"), dtype=torch.float64))


def test_answers_in_bf16_do_not_fail_and_are_whole(gpu):
    for drafts in (0, 1):
        assert [len(answer) for answer in answers(model_on(gpu, dtype=torch.bfloat16), drafts=drafts)] == [20, 20, 20]
