"""Post-training (report 5): what a run of supervised fine-tuning or of GRPO asks for beyond training itself.

Such a run is a run like any other, whose `config.json` says how it trains; what it is taught stands beside it, in
`sft.json` or `grpo.json`.
"""

from dataclasses import dataclass

from dsv3.config.check import require_choice, require_fraction, require_not_negative, require_positive
from dsv3.errors import ConfigError

TOO_LONG = ("drop", "cut")
LOSS_MEANS = ("sequence", "token")
OLD_LOGPROBS = ("engine", "trainer")
ROUTINGS = ("own", "compare", "replay")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on conversations (report 5.1). Batch, length and masking of prompts are unpublished."""

    data: tuple[str, ...] = ()
    """Files of conversations: .jsonl, .jsonl.gz or .parquet, or hf://NAME."""
    epochs: int = 2
    """Times that every conversation is read, as published."""
    rows_per_step: int = 8
    """Packed rows of one optimizer step."""
    too_long: str = "drop"
    """What happens to a conversation that is longer than a row: 'drop' it, or 'cut' off its end. Counted either way."""
    train_prompts: bool = False
    """Whether what the user and the system say is trained on too, and not answers alone."""
    held_out_rate: float = 0.0
    """Share of the conversations that is not trained on but scored at the end of every epoch."""

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "rows_per_step")
        require_choice(self, "too_long", choices=TOO_LONG)
        require_fraction(self, "held_out_rate")


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Group relative policy optimisation (report 5.2.2, eq. 26-28). V3 publishes no numbers; those of R1 are named."""

    task: str = "arithmetic"
    """What is asked: 'arithmetic', or a .jsonl file of problems."""
    rewards: tuple[str, ...] = ("answer=1",)
    """NAME=WEIGHT of each reward; they add up."""
    iterations: int = 100
    """Rollouts, each followed by `updates_per_rollout` optimizer steps."""
    problems_per_iteration: int = 32
    """As R1."""
    group_size: int = 16
    """Answers to one problem: G of eq. 26. R1 has 16, DeepSeekMath 64."""
    updates_per_rollout: int = 1
    """Parts that the answers of a rollout are cut into, an optimizer step each; R1 has 16."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio of new to old probability counts from 1 - `clip_low` to 1 + `clip_high`. V3 unpublished, R1 10."""
    kl_weight: float = 0.001
    """beta of eq. 26, for the distance to the reference; 0 needs no reference. R1 0.001, DeepSeekMath 0.04."""
    reference_every: int = 0
    """Iterations after which the reference becomes the model of then (R1: 400 steps); 0 keeps the first."""
    loss_mean: str = "sequence"
    """'sequence': the mean over an answer's tokens, and over answers (DeepSeekMath eq. 3); 'token': over all tokens."""
    scale_by_deviation: bool = True
    """Whether advantages are divided by the standard deviation of their group, as published."""
    old_logprobs: str = "engine"
    """Who says how probable a token was when it was drawn: the 'engine' that drew it, or the 'trainer', asked again."""
    routing: str = "own"
    """Experts of the update: those that the trainer's routers choose ('own'); the same, telling how many tokens
    the engine had sent elsewhere ('compare'); or those that the engine had sent them to ('replay'), for numerics that
    differ, as with FP8. The last two read the prompt anew for each answer of a group."""
    temperature: float = 1.0
    max_answer_tokens: int = 256
    length_penalty: float = 0.0
    """Taken from the reward of an answer that `max_answer_tokens` cut off."""
    validate_every: int = 10
    """Iterations between two looks at the held-out problems, answered greedily."""
    held_out: int = 200
    """Held-out problems; never trained on."""
    seed: int = 0
    """Fixes the order of problems and every answer drawn."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "iterations",
            "problems_per_iteration",
            "updates_per_rollout",
            "temperature",
            "max_answer_tokens",
            "validate_every",
            "held_out",
            "clip_high",
        )
        require_not_negative(self, "clip_low", "kl_weight", "reference_every", "length_penalty", "seed")
        require_choice(self, "loss_mean", choices=LOSS_MEANS)
        require_choice(self, "old_logprobs", choices=OLD_LOGPROBS)
        require_choice(self, "routing", choices=ROUTINGS)
        if self.temperature != 1 and self.old_logprobs == "engine":
            raise ConfigError(
                f"temperature = {self.temperature}: the engine's log-probabilities are those before temperature; use "
                "old_logprobs = 'trainer', or temperature = 1"
            )
        if self.group_size < 2:
            raise ConfigError(f"group_size = {self.group_size}; a group needs 2 answers to compare")
        if self.problems_per_iteration * self.group_size % self.updates_per_rollout:
            raise ConfigError(
                f"updates_per_rollout = {self.updates_per_rollout} does not divide the "
                f"{self.problems_per_iteration * self.group_size} answers of a rollout"
            )
