"""What is published of the training of DeepSeek-V3, to hold a plan of it against."""

from dataclasses import dataclass

from dsv3.plan.hardware import H800
from dsv3.plan.training import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class Published:
    """A number, and where it stands."""

    value: float
    where: str


_TABLE_1 = "report, table 1"
_INSIGHTS = '"Insights into DeepSeek-V3", table 4'
PUBLISHED_RUN = {
    "parameters": Published(value=671e9, where="report, abstract: 671B"),
    "active parameters": Published(value=37e9, where="report, abstract: 37B"),
    "FLOPs of a token": Published(value=250e9, where='"Insights into DeepSeek-V3", table 2'),
    "forward": Published(value=1.13, where=f"{_INSIGHTS}: 1F"),
    "backward": Published(value=1.99, where=f"{_INSIGHTS}: 1B"),
    "weights' gradients": Published(value=0.48, where=f"{_INSIGHTS}: 1W"),
    "woven": Published(value=13.95, where=f"{_INSIGHTS}: 1F1B"),
    "bubble": Published(value=2.06, where=f"{_INSIGHTS}: bubble"),
    "optimizer": Published(value=0.29, where=f"{_INSIGHTS}: optimizer"),
    "step": Published(value=19.926, where=_INSIGHTS),
    "tokens a second": Published(value=272.80e9 / 86_400, where=f"{_INSIGHTS}: 272.80B tokens a day"),
    "MFU, causal": Published(value=0.3894, where=_INSIGHTS),
    "MFU, masked scores counted": Published(value=0.4373, where=_INSIGHTS),
    "pre-training": Published(value=2_664_000.0, where=_TABLE_1),
    "longer context": Published(value=119_000.0, where=_TABLE_1),
    "post-training": Published(value=5_000.0, where=_TABLE_1),
    "all GPU-hours": Published(value=2_788_000.0, where=_TABLE_1),
    "price": Published(value=5_576_000.0, where=_TABLE_1),
}
"""By the name of the plan's line."""


def is_published_run(plan: TrainingPlan) -> bool:
    """Whether the numbers above are of this run: V3 on 2,048 H800, laid out as published."""
    config, parallel = plan.config, plan.config.parallel
    layout = (parallel.pipeline, parallel.expert, parallel.schedule, parallel.wire, parallel.context)
    return (
        config.recipe == "v3_671b"
        and plan.world == 2048
        and plan.gpu == H800
        and layout == (16, 64, "dualpipe", "fp8", 1)
        and (config.batch.sequence_length, config.batch.final_sequences) == (4096, 15_360)
    )
