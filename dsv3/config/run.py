"""A whole pre-training run: what a recipe returns and what a run folder's `config.json` holds."""

from dataclasses import dataclass, field

from dsv3.config.balance import BalanceConfig
from dsv3.config.check import require_choice, require_not_negative, require_positive
from dsv3.config.data import DataConfig
from dsv3.config.model import ModelConfig
from dsv3.config.parallel import ParallelConfig
from dsv3.config.precision import PrecisionConfig
from dsv3.config.training import BatchConfig, MtpLossConfig, OptimConfig, RecomputeConfig
from dsv3.errors import ConfigError

CPU_KERNELS = ("auto", "native", "torch")


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """When training state is written, and which snapshots stay."""

    every_steps: int = 1000
    keep_last: int = 2
    """Newest snapshots kept; older ones are removed after a newer one is complete."""
    keep_every_steps: int = 0
    """Snapshots at multiples of this step are kept for good; 0 keeps none beyond `keep_last`."""
    in_background: bool = False
    """Whether training goes on while a snapshot is written, from a copy in memory. It is there some steps later."""

    def __post_init__(self) -> None:
        require_positive(self, "every_steps", "keep_last")
        require_not_negative(self, "keep_every_steps")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What a run does about what goes wrong in it."""

    on_non_finite: str = "stop"
    """What to do where a loss or gradient is NaN or infinite: 'stop', or 'skip' that step: its rows are passed over,
    the weights stay, and it is written down with the documents that lie in it."""
    spike_deviations: float = 6.0
    """A loss that lies so many standard deviations above the mean of the last 100 steps is written down as a spike,
    with its documents; 0 looks for none."""
    straggler_factor: float = 1.5
    """A rank that computes so many times as long as the median rank, in each of the last 5 steps, is named; 0 names
    none."""
    hang_seconds: float = 900.0
    """After so long without the end of a step every rank writes down where it stands, in RUN/stacks; 0 never does."""

    def __post_init__(self) -> None:
        require_choice(self, "on_non_finite", choices=("stop", "skip"))
        require_not_negative(self, "spike_deviations", "straggler_factor", "hang_seconds")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation while training."""

    every_steps: int = 500
    max_tokens: int = 200_000
    """Held-out tokens scored each time, the same ones each time."""
    sample_prompts: tuple[str, ...] = ()
    """Continued greedily at every validation and kept in the run folder."""
    sample_tokens: int = 48

    def __post_init__(self) -> None:
        require_positive(self, "every_steps", "max_tokens", "sample_tokens")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how to compute."""

    seed: int = 0
    """Fixes initial weights, data order, FIM and sampling."""
    device: str = "auto"
    """'auto' (CUDA if present, else CPU), 'cpu', 'cuda' or 'cuda:N'."""
    dtype: str = "auto"
    """Compute type: 'auto' (BF16 on CUDA, FP32 on CPU), 'float32', 'bfloat16', or 'float64' to check arithmetic."""
    threads: int = 0
    """CPU threads of one process; 0 takes all that this process may use."""
    cpu_kernels: str = "auto"
    """'auto' (our C++ kernels where they compile, else torch's), 'native' (ours, or refuse) or 'torch'."""

    def __post_init__(self) -> None:
        require_not_negative(self, "seed", "threads")
        require_choice(self, "dtype", choices=("auto", "float32", "bfloat16", "float64"))
        require_choice(self, "cpu_kernels", choices=CPU_KERNELS)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that determines a pre-training run. Defaults are the published recipe of the 671B model."""

    recipe: str = ""
    """Name of the recipe this came from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    mtp: MtpLossConfig = field(default_factory=MtpLossConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    start_from: str = ""
    """Folder of a run whose newest weights this one begins with, router biases included; empty draws them at random."""
    total_tokens: int = 14_800_000_000_000
    """Training ends with the step that reaches this many tokens."""

    def __post_init__(self) -> None:
        require_positive(self, "total_tokens")
        if self.batch.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"batch.sequence_length = {self.batch.sequence_length} is longer than "
                f"model.max_position_embeddings = {self.model.max_position_embeddings}"
            )
        if self.batch.sequence_length <= self.model.num_nextn_predict_layers:
            raise ConfigError(
                f"batch.sequence_length = {self.batch.sequence_length} leaves nothing to predict "
                f"{self.model.num_nextn_predict_layers} tokens further ahead"
            )
        predicted = self.batch.sequence_length - self.model.num_nextn_predict_layers
        if predicted < 2 * self.parallel.context and self.parallel.context > 1:
            raise ConfigError(
                f"parallel.context = {self.parallel.context} ranks each take two pieces of a row, and one of "
                f"batch.sequence_length = {self.batch.sequence_length} tokens is too short for that; use fewer"
            )
        if self.balance.method == "bias" and not self.model.has_router_bias:
            raise ConfigError(
                f"balance.method 'bias' needs routers with a bias, and topk_method = '{self.model.topk_method}' has "
                "none; use model.topk_method=noaux_tc, or another balance.method"
            )
