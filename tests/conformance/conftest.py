"""The published recipe with every width cut and every rule kept, and one forward pass of it with everything seen.

Expected values of this folder are the report's formulas written out in NumPy, in float64, one token at a time. Every
test says at `Catches` whose mistake it would notice; those of named projects are in the issue trackers of the peers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from dsv3.batch import TokenBatch
from dsv3.config import ParallelConfig, PrecisionConfig, PretrainConfig
from dsv3.model.interfaces import ModelOutput
from dsv3.model.transformer import Transformer
from dsv3.ops import attention
from dsv3.recipes import v3_671b
from dsv3.train.ema import WeightAverage
from dsv3.train.optimizer import AdamW
from dsv3.train.step import StepMetrics, TrainState, train_step

WIDTHS = {
    "vocab_size": 96,
    "hidden_size": 24,
    "num_hidden_layers": 5,  # three dense ones, as published, and two with experts
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "intermediate_size": 20,
    "moe_intermediate_size": 7,
    "n_routed_experts": 32,
}
"""No two widths that could be mistaken for one another are equal. Groups, experts a token, depth of MTP: published."""


@pytest.fixture(scope="session")
def published() -> PretrainConfig:
    """The published recipe as a user gets it."""
    return v3_671b()


@pytest.fixture(scope="session")
def shrunk(published: PretrainConfig) -> PretrainConfig:
    """The same with small widths and batches. Everything else, each rate and milestone too, is `v3_671b`'s own.

    But for the precision: these tests hold equations, in float64. FP8 is held to the report by tests/fp8/, and by
    tests/model/test_precision.py and tests/train/test_precision.py.
    """
    return replace(
        published,
        model=replace(published.model, **WIDTHS),
        precision=PrecisionConfig(recipe="original"),
        batch=replace(published.batch, sequence_length=12, start_sequences=6, final_sequences=30, multiple_of=6),
        parallel=ParallelConfig(),  # one process holds all
        runtime=replace(published.runtime, device="cpu", dtype="float32", threads=1),
    )


def lively_model(config: PretrainConfig, *, seed: int = 0) -> Transformer:
    """Return a float64 model whose weights are large, gains uneven and router biases of both signs.

    At the published spread of 0.006 every softmax is flat and every mistake is small.
    """
    model = Transformer(config.model).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.4, generator=generator)
        for router in model.routers():
            router.e_score_correction_bias.normal_(0.0, 0.5, generator=generator)
    return model


def random_rows(config: PretrainConfig, *, num_rows: int, seed: int = 1) -> torch.Tensor:
    """Return packed rows of T + 1 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, config.batch.sequence_length + 1)
    return torch.randint(0, config.model.vocab_size, shape, generator=generator)


@dataclass
class SeenAttention:
    """What one attention layer was given and made, as float64 arrays; weights by their published names."""

    weights: dict[str, np.ndarray]
    positions: list[int]
    starts: list[int]
    scale: float = 0.0
    hidden: np.ndarray = field(default_factory=lambda: np.empty(0))
    latent_before_norm: np.ndarray = field(default_factory=lambda: np.empty(0))
    query_latent_before_norm: np.ndarray = field(default_factory=lambda: np.empty(0))
    cached_latent: np.ndarray = field(default_factory=lambda: np.empty(0))
    cached_rope_key: np.ndarray = field(default_factory=lambda: np.empty(0))
    query: np.ndarray = field(default_factory=lambda: np.empty(0))
    key: np.ndarray = field(default_factory=lambda: np.empty(0))
    value: np.ndarray = field(default_factory=lambda: np.empty(0))
    heads: np.ndarray = field(default_factory=lambda: np.empty(0))
    output: np.ndarray = field(default_factory=lambda: np.empty(0))


class RecordingCache:
    """A LatentCache that only takes notes: every sequence starts at position 0, so nothing is ever read back."""

    def __init__(self) -> None:
        self.appended: list[tuple[np.ndarray, np.ndarray, TokenBatch]] = []

    def append(self, latent, *, rope_key, layer, batch) -> None:
        assert layer == len(self.appended)
        self.appended.append((latent.detach().numpy(), rope_key.detach().numpy(), batch))

    def rows(self, *, layer, sequence, length):
        raise AssertionError("nothing was cached before")


def watch_attention(model: Transformer, batch: TokenBatch) -> list[SeenAttention]:
    """Run the model's own forward pass and return what every attention layer saw, MTP's last."""
    modules = [block.self_attn for block in [*model.layers, *(module.block for module in model.mtp)]]
    cores: list[dict[str, object]] = []
    notes: list[dict[str, np.ndarray]] = [{} for _ in modules]

    def core(query, *, key, value, scale, **lengths):
        heads = original(query, key=key, value=value, scale=scale, **lengths)
        cores.append({"query": query, "key": key, "value": value, "heads": heads, "scale": scale})
        return heads

    def note(place: int, name: str, *, of_output: bool):
        def hook(module, inputs, output):
            notes[place][name] = (output if of_output else inputs[0]).detach().numpy()

        return hook

    handles = []
    for place, module in enumerate(modules):
        handles += [
            module.register_forward_hook(note(place, "hidden", of_output=False)),
            module.register_forward_hook(note(place, "output", of_output=True)),
            module.q_a_layernorm.register_forward_hook(note(place, "query_latent_before_norm", of_output=False)),
            module.kv_a_layernorm.register_forward_hook(note(place, "latent_before_norm", of_output=False)),
        ]
    original, cache = attention.causal_attention, RecordingCache()
    try:
        attention.causal_attention = core
        model(batch, cache=cache, mtp=True)
    finally:
        attention.causal_attention = original
        for handle in handles:
            handle.remove()

    seen = []
    for place, module in enumerate(modules):
        latent, rope_key, layer_batch = cache.appended[place]
        tensors = {name: cores[place][name].detach().numpy() for name in ("query", "key", "value", "heads")}
        seen.append(
            SeenAttention(
                weights={name: weight.detach().numpy() for name, weight in module.named_parameters()},
                positions=layer_batch.positions.tolist(),
                starts=layer_batch.starts.tolist(),
                scale=cores[place]["scale"],
                cached_latent=latent,
                cached_rope_key=rope_key,
                **notes[place],
                **tensors,
            )
        )
    return seen


@pytest.fixture(scope="session")
def model(shrunk: PretrainConfig) -> Transformer:
    """A lively model of the shrunk recipe; tests leave it as it is."""
    return lively_model(shrunk)


@pytest.fixture(scope="session")
def batch(shrunk: PretrainConfig) -> TokenBatch:
    """Three packed rows."""
    return TokenBatch.from_rows(random_rows(shrunk, num_rows=3))


@pytest.fixture(scope="session")
def attention_layers(model: Transformer, batch: TokenBatch) -> list[SeenAttention]:
    """Everything the attention layers of one forward pass saw and made."""
    return watch_attention(model, batch)


@pytest.fixture
def make_model():
    """Give tests that change a model one of their own."""
    return lively_model


@pytest.fixture
def make_rows():
    """Give tests rows of their own."""
    return random_rows


@pytest.fixture
def watch() -> Iterator:
    """Give tests that need another model the same pair of eyes."""
    return watch_attention


def state_of(config: PretrainConfig, *, model: Transformer | None = None, tokens: int = 0, step: int = 0) -> TrainState:
    """Return a training state as the loop makes it, around a lively model unless another is given."""
    model = lively_model(config) if model is None else model
    average = None
    optimizer = AdamW(model.named_parameters(), config=config.optim)
    if config.optim.ema_decay:
        average = WeightAverage(optimizer.master, decay=config.optim.ema_decay)
    return TrainState(config=config, model=model, optimizer=optimizer, average=average, step=step, tokens=tokens)


@dataclass
class SeenStep:
    """One real training step, and what went through the model in it."""

    metrics: StepMetrics
    outputs: list[ModelOutput]
    """Of each micro-batch, in float64 where the model is."""
    batches: list[TokenBatch]
    gradients: dict[str, torch.Tensor]
    """Of the total loss, summed over the micro-batches in the model's own type, before clipping."""


def watch_step(state: TrainState, *, batches: list[TokenBatch]) -> SeenStep:
    """Take one real step through `train_step` and note outputs and gradients on the way."""
    outputs: list[ModelOutput] = []
    gradients: dict[str, torch.Tensor] = {}

    def add(name: str):
        def hook(gradient: torch.Tensor) -> None:
            gradients[name] = gradients.get(name, 0) + gradient.detach().clone()

        return hook

    handles = [state.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))]
    handles += [parameter.register_hook(add(name)) for name, parameter in state.model.named_parameters()]
    metrics = train_step(state, batches=batches)
    for handle in handles:
        handle.remove()
    return SeenStep(metrics=metrics, outputs=outputs, batches=batches, gradients=gradients)


@pytest.fixture
def make_state():
    """Give tests a training state of their own."""
    return state_of


@pytest.fixture
def watched_step():
    """Give tests the real training step, watched."""
    return watch_step


@pytest.fixture
def micro_batches(shrunk: PretrainConfig):
    """Give tests the micro-batches of one step: six rows, two at a time."""

    def make(config: PretrainConfig = shrunk, *, num_rows: int = 6, at_a_time: int = 2, seed: int = 1):
        rows = random_rows(config, num_rows=num_rows, seed=seed)
        return [TokenBatch.from_rows(piece) for piece in rows.split(at_a_time)]

    return make
