"""Claim: `dsv3 inspect` predicts the bytes of training in FP8, and the narrow formats save what they promise.

A model of the shape of recipe `small`, 4 layers deep, is trained for a step under 'original' and 'fp8_v3' with the
published recomputation. Bytes are malloc's own count: of weights and moments when the state is made, of the FP8 copies,
of what a forward pass keeps, and of the gradients. Linux with glibc only.
"""

import ctypes
import json
import subprocess
import sys
from dataclasses import replace

import torch
from claims.record import Claim, arguments, report
from rich.console import Console
from rich.table import Table

from dsv3.batch import TokenBatch
from dsv3.config import PrecisionConfig, PretrainConfig, RecomputeConfig
from dsv3.model.precision import quantise_weights
from dsv3.plan.activations import activation_memory
from dsv3.plan.memory import training_memory
from dsv3.recipes import small, v3_671b
from dsv3.train.loss import WholeBatch, pretraining_loss
from dsv3.train.resume import new_state

RECIPES = ("original", "fp8_v3")
ROWS = 2
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
"""Of glibc's mallinfo2, in its order and words."""


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--measure":
        print(json.dumps(measured(config_of(sys.argv[2]))))
        return
    options = arguments(__doc__)
    found = {recipe: in_own_process(recipe) for recipe in RECIPES}
    wanted = {recipe: predicted(config_of(recipe)) for recipe in RECIPES}
    show(found, wanted=wanted)
    ratios = {
        (recipe, part): min(value / found[recipe][part], found[recipe][part] / value)
        for recipe, parts in wanted.items()
        for part, value in parts.items()
    }
    recipe, part = min(ratios, key=lambda name: ratios[name])
    claims = [
        Claim(
            name=f"MB predicted, worst of {len(ratios)} parts: {part}, {recipe}",
            ours=wanted[recipe][part] / 1e6,
            peer=found[recipe][part] / 1e6,
            peer_name="MB measured",
            ratio=ratios[recipe, part],
            target=0.97,
        )
    ]
    narrow, wide = (found[recipe]["activations"] / 1e6 for recipe in ("fp8_v3", "original"))
    claims.append(
        Claim(
            name="MB kept from forward to backward pass, published recomputation",
            ours=narrow,
            peer=wide,
            peer_name="original precision",
            ratio=wide / narrow,
            target=1.2,
        )
    )
    published = {recipe: of_v3(recipe) for recipe in RECIPES}
    report(
        claims,
        title="FP8 memory",
        json_file=options.json,
        details={"predicted": wanted, "measured": found, "v3_671b_planned_bytes": published},
    )


def config_of(recipe: str) -> PretrainConfig:
    base = small()
    model = replace(base.model, num_hidden_layers=4, first_k_dense_replace=1, vocab_size=2048)
    optim = replace(base.optim, ema_decay=0.0)
    return replace(
        base, model=model, optim=optim, precision=PrecisionConfig(recipe=recipe), recompute=RecomputeConfig()
    )


def in_own_process(recipe: str) -> dict[str, float]:
    run = subprocess.run([sys.executable, __file__, "--measure", recipe], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measured(config: PretrainConfig) -> dict[str, float]:
    """Return bytes by what they are for, in a process that has done nothing else."""
    torch.set_num_threads(1)
    rows = torch.randint(config.model.vocab_size, (ROWS, config.batch.sequence_length + 1))
    batch = TokenBatch.from_rows(rows)
    start = allocated()
    state = new_state(config)
    made = allocated()
    precision = quantise_weights(state.model.weights_in_fp8(), config=config.precision)
    quantised = allocated()
    output = loss = None
    for _ in range(2):  # the first pass also makes what stays, such as threads' buffers
        output = loss = None
        before = allocated()
        output = state.model(batch, mtp=True, recompute=config.recompute, precision=precision)
        whole = WholeBatch.of([batch])
        loss = pretraining_loss(
            state.model, output=output, batch=batch, whole=whole, mtp_weight=0.3, balance=config.balance
        )
        kept = allocated() - before
    assert loss is not None
    loss.total.backward()
    output = loss = None
    return {
        "weights and moments": made - start,
        **({"FP8 copies": quantised - made} if config.precision.recipe != "original" else {}),
        "activations": kept,
        "gradients": allocated() - before,
    }


def predicted(config: PretrainConfig) -> dict[str, float]:
    """Return the same by formula: what `dsv3 inspect` shows."""
    memory = training_memory(config, dtype="float32")
    plain = training_memory(replace(config, precision=PrecisionConfig(recipe="original")), dtype="float32")
    kept = activation_memory(config)
    copies = memory.weights + memory.master - plain.weights
    tokens = ROWS * config.batch.sequence_length
    return {
        "weights and moments": plain.weights + memory.moments,
        **({"FP8 copies": copies} if copies else {}),
        "activations": tokens * kept.per_token + kept.per_pass,
        "gradients": memory.gradients,
    }


def of_v3(recipe: str) -> dict[str, int]:
    """Return what the published model would keep, by formula alone."""
    config = replace(v3_671b(), precision=PrecisionConfig(recipe=recipe))
    memory = training_memory(config, dtype="bfloat16")
    return {
        "weights": memory.weights,
        "master": memory.master,
        "gradients": memory.gradients,
        "moments": memory.moments,
        "activations_a_token_in_fp32_form": activation_memory(config).per_token,
    }


def show(found: dict[str, dict[str, float]], *, wanted: dict[str, dict[str, float]]) -> None:
    table = Table(title="bytes of a training step, recipe small with 4 layers")
    for name in ("precision", "of", "predicted, MB", "measured, MB", "off by"):
        table.add_column(name, justify="left" if name in ("precision", "of") else "right")
    for recipe, parts in wanted.items():
        for part, value in parts.items():
            real = found[recipe][part]
            table.add_row(recipe, part, f"{value / 1e6:,.2f}", f"{real / 1e6:,.2f}", f"{value / real - 1:+.1%}")
    Console(width=120).print(table)


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in FIELDS)


def allocated() -> int:
    """Return the bytes that malloc has given out in this process."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    counts = mallinfo2()
    return counts.uordblks + counts.hblkhd


if __name__ == "__main__":
    main()
