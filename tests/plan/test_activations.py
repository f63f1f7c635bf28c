"""The formula of what a forward pass keeps, against the allocator's own count while one is kept."""

import ctypes
import sys
from dataclasses import replace

import pytest
import torch

from dsv3 import native, recipes
from dsv3.batch import TokenBatch
from dsv3.config import KEEP_ALL, PrecisionConfig, PretrainConfig, RecomputeConfig
from dsv3.model.precision import quantise_weights
from dsv3.model.transformer import Transformer
from dsv3.plan.activations import activation_memory
from dsv3.train.loss import WholeBatch, pretraining_loss

MALLINFO2 = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
"""Fields of the record, in glibc's order and words."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO2)


def allocated_bytes() -> int:
    """Return what malloc has given out in this process."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        pytest.skip("needs glibc 2.33 or later to count allocated bytes")
    mallinfo2.restype = _Mallinfo2
    counts = mallinfo2()
    return counts.uordblks + counts.hblkhd


def kept_bytes(config: PretrainConfig, *, num_rows: int) -> int:
    """Return what the second forward pass of a model leaves allocated, its losses included."""
    model = Transformer(config.model)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    precision = quantise_weights(model.weights_in_fp8(), config=config.precision)
    rows = torch.randint(config.model.vocab_size, (num_rows, config.batch.sequence_length + 1))
    kept = 0
    for _ in range(2):
        before = allocated_bytes()
        batch = TokenBatch.from_rows(rows)
        mtp = config.model.num_nextn_predict_layers > 0
        output = model(batch, mtp=mtp, recompute=config.recompute, precision=precision)
        whole = WholeBatch.of([batch])
        loss = pretraining_loss(model, output=output, batch=batch, whole=whole, mtp_weight=0.3, balance=config.balance)
        kept = allocated_bytes() - before
        del output, loss, batch
    return kept


V2_LIKE = {"q_lora_rank": None, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
SHAPES = {
    "tiny": recipes.tiny(),
    "small": replace(
        recipes.small(),
        model=replace(recipes.small().model, num_hidden_layers=3, vocab_size=1024),
        batch=replace(recipes.small().batch, sequence_length=512),
    ),
    "without MTP": replace(recipes.tiny(), model=replace(recipes.tiny().model, num_nextn_predict_layers=0)),
    "two MTP modules": replace(recipes.tiny(), model=replace(recipes.tiny().model, num_nextn_predict_layers=2)),
    "like V2": replace(
        recipes.tiny(),
        model=replace(recipes.tiny().model, **V2_LIKE),
        balance=replace(recipes.tiny().balance, method="none"),
    ),
}


RECOMPUTED = {
    "keep all": KEEP_ALL,
    "as published": RecomputeConfig(),
    "norms": replace(KEEP_ALL, norms=True),
    "up-projections": replace(KEEP_ALL, up_projections=True),
    "swiglu": replace(KEEP_ALL, swiglu=True),
}
CASES = [
    *(("tiny", recompute, "original") for recompute in RECOMPUTED),
    *((name, recompute, "original") for name in SHAPES if name != "tiny" for recompute in ("keep all", "as published")),
    *(("like V2", recompute, "original") for recompute in ("up-projections", "swiglu")),
    *(("tiny", recompute, "fp8_v3") for recompute in RECOMPUTED),
    *((name, "as published", "fp8_v3") for name in SHAPES if name != "tiny"),
    ("like V2", "keep all", "fp8_v3"),
    ("tiny", "keep all", "fp8_per_tensor"),
    ("tiny", "as published", "fp8_per_tensor"),
]


@pytest.mark.parametrize(("name", "recomputed", "recipe"), CASES)
def test_prediction_and_allocator_agree(name: str, recomputed: str, recipe: str):
    if not sys.platform.startswith("linux") or not native.usable(torch.zeros(1)):
        pytest.skip("the prediction is for our CPU kernels, and the allocator asked is glibc's")
    config = replace(SHAPES[name], recompute=RECOMPUTED[recomputed], precision=PrecisionConfig(recipe=recipe))
    num_rows = 1024 // config.batch.sequence_length
    predicted = activation_memory(config)
    tokens = num_rows * config.batch.sequence_length
    measured = kept_bytes(config, num_rows=num_rows)
    # What the formula leaves out: nodes of autograd and objects of Python.
    assert predicted.per_token * tokens + predicted.per_pass == pytest.approx(measured, rel=0.03)


def test_published_recomputation_saves_what_it_names():
    """By hand, for one token of V3: 62 layers of norms, latents and heads, 3 + 59 * (8 + 1) SwiGLUs."""
    v3 = replace(recipes.v3_671b(), precision=PrecisionConfig(recipe="original"))
    kept, remade = activation_memory(replace(v3, recompute=KEEP_ALL)), activation_memory(v3)
    norms = 62 * (2 * 7168 + 1536 + 512)
    heads = 62 * 128 * (192 + 256)
    swiglus = 3 * 18432 + 59 * 9 * 2048
    assert kept.per_token - remade.per_token == 4 * (norms + heads + swiglus)
