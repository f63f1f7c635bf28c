"""What every test may count on: one thread, patient property tests, and the folder of real data when it is there."""

import functools
import os
import random
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

from dsv3.config import (
    BalanceConfig,
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    LearningRateConfig,
    ModelConfig,
    MtpLossConfig,
    OptimConfig,
    PrecisionConfig,
    PretrainConfig,
    RuntimeConfig,
    SnapshotConfig,
    SourceConfig,
)

_of_jaxtyping = jaxtyping.jaxtyped


def checked(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Check functions' types, and their shapes where there are any: jaxtyping's hook puts this before each of them.

    jaxtyping's own does as much three times as slowly: it binds all arguments anew, and checks them twice.
    """

    def decorate(definition: Any) -> Any:
        if not isinstance(definition, types.FunctionType):
            return _of_jaxtyping(definition, typechecker=typechecker)
        names = definition.__globals__
        parts = (definition.__code__, names, definition.__name__, definition.__defaults__, definition.__closure__)
        copy = functools.update_wrapper(types.FunctionType(*parts), definition)
        copy.__kwdefaults__ = definition.__kwdefaults__
        copy.__annotations__ = {name: _resolved(hint, names=names) for name, hint in definition.__annotations__.items()}
        del copy.__wrapped__
        strict = typechecker(copy)
        if not any(_has_shape(hint) for hint in copy.__annotations__.values()):
            return strict

        @functools.wraps(definition)
        def with_shapes(*arguments: Any, **named: Any) -> Any:
            with _of_jaxtyping("context"):  # within which a dimension's name stands for one length
                return strict(*arguments, **named)

        return with_shapes

    return decorate


def _resolved(hint: Any, *, names: dict[str, Any]) -> Any:
    """Return what an annotation means; anything goes for what is imported for type checkers alone."""
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"hint": hint}), names, include_extras=True)[
            "hint"
        ]
    except NameError:
        return Any


def _has_shape(hint: Any) -> bool:
    return hasattr(hint, "dim_str") or any(_has_shape(part) for part in typing.get_args(hint))


jaxtyping.jaxtyped = checked

torch.set_num_threads(1)
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # For the processes that tests start.
if not torch.cuda.is_available():
    # Triton's kernels are interpreted, which is decided when Triton is first imported, by whatever test comes first.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Tests fork; a thread pool does not survive that.

# A shared machine makes single examples slow now and then; a deadline would call that a failure.
settings.register_profile(
    "dsv3",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dsv3")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the checkout: tokenizers, texts, problems. Tests that need it skip without it."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the folder of real data at {folder}")
    return folder


@pytest.fixture
def our_kernels() -> None:
    """Compute with our kernels, or skip: where they do not compile, the plain forms are all there is."""
    from dsv3.errors import CompilerError  # here, as below
    from dsv3.native import choose_cpu_kernels
    from dsv3.runtime.compiler import find_compiler

    try:
        find_compiler()
    except CompilerError as error:
        pytest.skip(str(error))
    choose_cpu_kernels("native")


@pytest.fixture(autouse=True)
def default_cpu_kernels() -> Iterator[None]:
    """Let no test choose the kernels of the next."""
    yield
    from dsv3.native import choose_cpu_kernels  # here, so that shapes are checked in it: see pyproject.toml

    choose_cpu_kernels("auto")


# ---- a run small enough to train in a test: 24K parameters, every part of V3, a few kilobytes of text ----

WORDS = ("the", "a", "one", "sea", "moon", "river", "stone", "light", "walks", "sleeps", "sings", "under", "far", "and")


def write_texts(folder: Path, *, documents: int, seed: int) -> Path:
    """Write documents of made-up sentences."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(documents):
        sentences = [" ".join(chance.choices(WORDS, k=chance.randint(4, 9))) + ".\n" for _ in range(12)]
        (folder / f"{number:03d}.txt").write_text("".join(sentences), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of text."""
    folder = tmp_path_factory.mktemp("texts")
    return [write_texts(folder / "prose", documents=60, seed=1), write_texts(folder / "notes", documents=30, seed=2)]


@pytest.fixture
def small_run(texts: list[Path]) -> PretrainConfig:
    """Twelve steps on those folders."""
    return small_config(texts)


def small_config(texts: list[Path]) -> PretrainConfig:
    """Return the settings of `small_run`, for fixtures that outlive a test."""
    return PretrainConfig(
        recipe="test",
        total_tokens=12 * 4 * 32,
        model=ModelConfig(
            vocab_size=320,
            hidden_size=32,
            num_hidden_layers=2,
            initializer_range=0.02,
            max_position_embeddings=64,
            num_attention_heads=2,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            intermediate_size=48,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
        ),
        data=DataConfig(sources=tuple(SourceConfig(path=str(path)) for path in texts), held_out_rate=0.1),
        batch=BatchConfig(
            sequence_length=32,
            start_sequences=4,
            final_sequences=4,
            ramp_tokens=0,
            multiple_of=1,
            micro_batch_sequences=2,
        ),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(
                peak=1e-2,
                warmup_steps=2,
                constant_until_tokens=1000,
                cosine_until_tokens=1400,
                hold_until_tokens=1500,
                cosine_floor=1e-3,
                final=5e-4,
            ),
            ema_decay=0.9,
        ),
        precision=PrecisionConfig(recipe="original"),
        mtp=MtpLossConfig(switch_tokens=1000),
        balance=BalanceConfig(bias_update_speed=0.01, bias_freeze_tokens=1400),
        snapshot=SnapshotConfig(every_steps=4),
        evaluation=EvaluationConfig(every_steps=6, max_tokens=600),
        runtime=RuntimeConfig(device="cpu", threads=1),
    )


@pytest.fixture
def without_extras(small_run: PretrainConfig) -> PretrainConfig:
    """The same run, without validation before its end."""
    return replace(small_run, evaluation=replace(small_run.evaluation, every_steps=1000))
