"""Settings of ranks that share the routed experts while they serve."""

from dataclasses import dataclass

from dsv3.config.check import require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class ExpertRanksConfig:
    """How tokens reach experts on other ranks, and when experts move. None of it changes what a request is answered."""

    redundant_experts: int = 0
    """Copies of experts in each layer, over all ranks; 32 in the report's prefill unit (3.4.1)."""
    fixed_step_tokens: int = 0
    """Passes in which no rank has more tokens travel in one exchange of a fixed size each way, made for latency; 0 for
    none. Longer ones tell first how many rows will come."""
    overlap_step_tokens: int = 0
    """Where a rank has so many tokens in a pass, two halves of it are run by turns, each while the other's rows travel
    (report 3.4.1). 0 for never: between processes of one machine it was slower (docs/log.md)."""
    rebalance_seconds: float = 0.0
    """Time between two looks at the experts' load; 0 never looks. The report's example is ten minutes (3.4.1)."""
    moved_bytes_per_step: int = 32 * 1024 * 1024
    """Weights that are under way between ranks during one pass; one expert's at least."""

    def __post_init__(self) -> None:
        require_not_negative(self, "redundant_experts", "fixed_step_tokens", "overlap_step_tokens", "rebalance_seconds")
        require_positive(self, "moved_bytes_per_step")
