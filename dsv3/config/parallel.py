"""How the ranks of a run share its work."""

from dataclasses import dataclass

from dsv3.config.check import require_choice, require_not_negative, require_positive
from dsv3.errors import ConfigError

SCHEDULE_NAMES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipe_v")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism. Ranks are those that torchrun has started; what no axis shares, all of them repeat."""

    pipeline: int = 1
    """Ranks that share the layers (PP; the report's run has 16). Those of one pipeline read the same rows."""
    schedule: str = "dualpipe"
    """In which order they work: 'gpipe', '1f1b', 'interleaved', 'zb1p', 'zbv', 'dualpipe' (the report's; 3.2.1) or
    'dualpipe_v'; `dsv3 schedule` draws them. With a pipeline of 1 there is no order to choose, but 'dualpipe_v' weaves
    each forward pass into a backward one, so that tokens travel to experts while the other computes."""
    stage_layers: tuple[int, ...] = ()
    """Layers of each stage; empty splits them by the FLOPs of each."""
    expert: int = 1
    """Ranks that share the routed experts of every layer (EP; the report's run has 64). They read different rows."""
    context: int = 1
    """Ranks that share the tokens of every row (CP), for rows too long for one device; the report's run has none.
    They count among those that read different rows, and may share experts with them."""
    wire: str = "compute"
    """How tokens travel to their experts: 'compute' (in the type that is computed with, there and back) or 'fp8' (the
    report's: E4M3 with a scale for each 128 on the way out, BF16 on the way back; 3.3.3)."""
    zero: bool = False
    """Whether ranks that hold the same weights share the optimizer's state among them (ZeRO-1; report 3.2)."""
    ranks_per_node: int = 0
    """Ranks with a fast link between them; 0 takes those of one machine, as torchrun counts them. Where the ranks that
    share experts lie on several nodes, tokens travel in two hops, once to each node."""
    timeout_seconds: float = 1800.0
    """Longest time that a rank waits for the others, the preparation of a corpus included; then it ends."""

    trace_steps: int = 0
    """Steps of each call, after its first, of which RUN/traces shows when each rank did what (for Perfetto)."""

    def __post_init__(self) -> None:
        require_choice(self, "wire", choices=("compute", "fp8"))
        require_choice(self, "schedule", choices=SCHEDULE_NAMES)
        require_positive(self, "pipeline", "expert", "context", "timeout_seconds")
        require_not_negative(self, "ranks_per_node", "trace_steps")
        if self.wire != "compute" and self.expert == 1:
            raise ConfigError(
                f"parallel.wire = '{self.wire}' is about tokens that travel to experts, and with parallel.expert = 1 "
                "all experts are on every rank; share them, or use 'compute'"
            )
        if self.stage_layers and self.pipeline == 1 and self.schedule != "dualpipe_v":
            raise ConfigError(
                f"parallel.stage_layers = {list(self.stage_layers)} splits the layers over a pipeline, and "
                "parallel.pipeline = 1 has none; use parallel.stage_layers=[]"
            )
