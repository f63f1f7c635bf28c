"""Claim: on an H100 a training step is faster, and takes less memory, than transformers' of the same V3.

For whoever has the card. One step is forward pass, next-token cross-entropy, backward pass, clipping to norm 1 and
AdamW on random tokens, the same architecture and number of weights for every system. Ours keeps FP32 masters and
computes in BF16, or in FP8 by recipe `fp8_v3`, nothing recomputed; the peer is transformers' DeepseekV3ForCausalLM with
grouped products for its experts, FP32 weights under autocast to BF16, torch's fused AdamW. Models take turns, one in
memory at a time; times are medians of steps that end with the device having finished.

Without a GPU there is nothing to do: it says so and records nothing.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from claims.record import Claim, arguments, report
from rich.console import Console
from rich.table import Table
from torch import Tensor
from training_peers.ours import same_work, whole_loss
from training_peers.sizes import Size
from training_peers.system import PeerSystem, System

from dsv3.batch import TokenBatch
from dsv3.config import PrecisionConfig, PretrainConfig, RuntimeConfig
from dsv3.config.published import published_from_model_config
from dsv3.plan.counts import training_flops_per_token
from dsv3.recipes import small
from dsv3.train.resume import new_state
from dsv3.train.step import train_step

LENGTH = 4096
ROWS = 4
SMALL = replace(
    small().model,
    vocab_size=32_768,
    num_hidden_layers=7,
    q_lora_rank=192,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
)
LARGE = replace(
    SMALL,
    hidden_size=4096,
    num_hidden_layers=3,
    num_attention_heads=32,
    q_lora_rank=1024,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=11_264,
    moe_intermediate_size=1536,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
)
MODELS = {"0.1B": SMALL, "1.1B": LARGE}
WARM_UP, STEPS = 3, 7


class OursOnGpu:
    """`train_step` on one micro-batch that holds all rows."""

    def __init__(self, config: PretrainConfig) -> None:
        self.state = new_state(config)
        self.num_trained = sum(parameter.numel() for parameter in self.state.optimizer.parameters.values())

    def step(self, rows: Tensor) -> float:
        return train_step(self.state, batches=[TokenBatch.from_rows(rows).to("cuda")]).loss


def ours(size: Size, *, recipe: str, whole: bool = False) -> OursOnGpu:
    start = whole_loss(size) if whole else same_work(size)
    runtime = RuntimeConfig(device="cuda", dtype="bfloat16")
    return OursOnGpu(replace(start, precision=PrecisionConfig(recipe=recipe), runtime=runtime))


def transformers_under_autocast(size: Size) -> PeerSystem:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    published = published_from_model_config(size.model, dtype="float32")
    config = DeepseekV3Config(**published, attn_implementation="sdpa", experts_implementation="grouped_mm")
    model = DeepseekV3ForCausalLM(config).to("cuda").train()

    def loss_of(rows: Tensor) -> Tensor:
        rows = rows.to("cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    return PeerSystem(model, loss_of=loss_of)


SYSTEMS: dict[str, Callable[[Size], System]] = {
    "ours, BF16": lambda size: ours(size, recipe="original"),
    "ours, FP8": lambda size: ours(size, recipe="fp8_v3"),
    "ours, BF16, whole V3 loss": lambda size: ours(size, recipe="original", whole=True),
    "transformers, BF16": transformers_under_autocast,
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One system at one size."""

    model: str
    system: str
    num_trained: int
    seconds: float
    tokens_per_second: float
    tflops: float
    """Of the operations a step must do, masked scores not counted, a second."""
    peak_gb: float
    first_loss: float


def main() -> None:
    options = arguments(__doc__, profile="write here which kernels a step of ours spends its time in, and do no more")
    if not torch.cuda.is_available():
        print("training_gpu: nothing measured, there is no GPU here.")
        return
    if options.profile is not None:
        for name in MODELS:
            with options.profile.open("a") as file:
                file.write(profile_of(name))
        return
    results = [
        measure(name, system=system) for name in list(MODELS)[: 1 if options.quick else None] for system in SYSTEMS
    ]
    show(results)
    name = torch.cuda.get_device_name()
    details = {"machine": name, "results": [asdict(result) for result in results]}
    report(claims_of(results), title=f"Training on {name}", json_file=options.json, details=details)


class GpuSize(Size):
    """Four rows, whatever their length."""

    @property
    def rows(self) -> int:
        return ROWS


def size_of(name: str) -> Size:
    return GpuSize(label=name, model=MODELS[name], parameters=0, sequence_length=LENGTH)


def batches(size: Size) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randint(size.model.vocab_size, (ROWS, LENGTH + 1), generator=generator)


def measure(name: str, *, system: str) -> Result:
    torch.manual_seed(0)
    size, draw = size_of(name), batches(size_of(name))
    made = SYSTEMS[system](size)
    losses = [made.step(draw()) for _ in range(WARM_UP)]
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(STEPS):
        rows = draw()
        torch.cuda.synchronize()
        before = time.perf_counter()
        made.step(rows)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    peak, num_trained = torch.cuda.max_memory_allocated() / 1e9, made.num_trained
    del made
    gc.collect()
    torch.cuda.empty_cache()
    tokens = ROWS * LENGTH
    flops = tokens * training_flops_per_token(size.model, sequence_length=LENGTH)
    step = median(seconds)
    return Result(
        model=name,
        system=system,
        num_trained=num_trained,
        seconds=step,
        tokens_per_second=tokens / step,
        tflops=flops / step / 1e12,
        peak_gb=peak,
        first_loss=losses[0],
    )


def profile_of(name: str) -> str:
    size, draw = size_of(name), batches(size_of(name))
    texts = []
    for recipe in ("original", "fp8_v3"):
        made = ours(size, recipe=recipe)
        for _ in range(WARM_UP):
            made.step(draw())
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            made.step(draw())
            torch.cuda.synchronize()
        averages = profile.key_averages()
        texts += [
            f"{name} {recipe}, by {key}\n{averages.table(sort_by=key, row_limit=40, max_name_column_width=70)}"
            for key in ("self_device_time_total", "self_cpu_time_total")
        ]
        del made
        gc.collect()
        torch.cuda.empty_cache()
    return "\n\n".join(texts)


def show(results: list[Result]) -> None:
    table = Table(title=f"a training step on {ROWS} rows of {LENGTH} tokens")
    for column in ("model", "system", "weights", "ms a step", "tokens/s", "TFLOP/s", "peak GB", "first loss"):
        table.add_column(column, justify="left" if column in ("model", "system") else "right")
    for one in results:
        numbers: list[Any] = [f"{one.num_trained:,}", f"{one.seconds * 1e3:.1f}", f"{one.tokens_per_second:,.0f}"]
        table.add_row(
            one.model, one.system, *numbers, f"{one.tflops:.0f}", f"{one.peak_gb:.1f}", f"{one.first_loss:.3f}"
        )
    Console(width=140).print(table)


def claims_of(results: list[Result]) -> list[Claim]:
    claims = []
    for model in dict.fromkeys(result.model for result in results):
        found = {result.system: result for result in results if result.model == model}
        peer, bf16, fp8 = found["transformers, BF16"], found["ours, BF16"], found["ours, FP8"]
        for name, one, other, target in (("BF16", bf16, peer, 1.5), ("FP8", fp8, bf16, 1.0)):
            claims.append(
                Claim(
                    name=f"tokens/s of a training step, {model}, {name}",
                    ours=one.tokens_per_second,
                    peer=other.tokens_per_second,
                    peer_name=other.system,
                    ratio=one.tokens_per_second / other.tokens_per_second,
                    target=target,
                )
            )
        claims.append(
            Claim(
                name=f"GB at the peak of a training step, {model}, BF16",
                ours=bf16.peak_gb,
                peer=peer.peak_gb,
                peer_name=peer.system,
                ratio=peer.peak_gb / bf16.peak_gb,
                target=1.0,
            )
        )
    return claims


if __name__ == "__main__":
    main()
