"""How the ranks of a run share its work."""

from dataclasses import dataclass

from dsv3.config.check import require_choice, require_not_negative, require_positive
from dsv3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism. Ranks are those that torchrun has started; what no axis shares, all of them repeat."""

    expert: int = 1
    """Ranks that share the routed experts of every layer (EP; the report's run has 64). They read different rows."""
    wire: str = "compute"
    """How tokens travel to their experts: 'compute' (in the type that is computed with, there and back) or 'fp8' (the
    report's: E4M3 with a scale for each 128 on the way out, BF16 on the way back; 3.3.3)."""
    ranks_per_node: int = 0
    """Ranks with a fast link between them; 0 takes those of one machine, as torchrun counts them. Where the ranks that
    share experts lie on several nodes, tokens travel in two hops, once to each node."""
    timeout_seconds: float = 1800.0
    """Longest time that a rank waits for the others, the preparation of a corpus included; then it ends."""

    def __post_init__(self) -> None:
        require_choice(self, "wire", choices=("compute", "fp8"))
        require_positive(self, "expert", "timeout_seconds")
        require_not_negative(self, "ranks_per_node")
        if self.wire != "compute" and self.expert == 1:
            raise ConfigError(
                f"parallel.wire = '{self.wire}' is about tokens that travel to experts, and with parallel.expert = 1 "
                "all experts are on every rank; share them, or use 'compute'"
            )
