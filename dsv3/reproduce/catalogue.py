"""All experiments by name, in the order of the report's own chapters; no part of the system is loaded for it."""

import difflib

from dsv3.errors import ConfigError
from dsv3.reproduce.experiment import Experiment

_ALL = (
    Experiment(
        name="cost",
        title="Training cost: GPU-hours and dollars",
        source="report, Table 1",
        how="dsv3 plan works out every phase of the published run on 2,048 H800 from the model's shape, the hardware's "
        "rates and the published profile; nothing is measured here.",
    ),
    Experiment(
        name="cache",
        title="MLA's cache beside MHA, GQA and MQA",
        source="report 2.1.1; 'Insights into DeepSeek-V3', table 1",
        how="The cache of our engine is allocated at the published shape and its bytes are counted; the others are "
        "counted by formula, which two published models check.",
    ),
    Experiment(
        name="balancing",
        title="Balancing experts: the bias, auxiliary losses, nothing",
        source="report 4.5.2 and 4.5.3, Table 5; Wang et al. 2024",
        how="A small V3 is trained with each method on the same rows from the same weights. MaxVio and loss are those "
        "of held-out text at the end. As in the report's ablation, the run with the bias has no auxiliary loss at all; "
        "the losses have V2-Lite's weight of 0.001. 'x2' has twice that, as gamma is twice the published one; it was "
        "added after the published weight had not balanced in every seed, so its rows were not planned beforehand.",
        seeds=3,
        tokens=600_000,
        minutes=30,
    ),
    Experiment(
        name="moe",
        title="Mixture of experts beside dense models of equal FLOPs",
        source="report 2.1.2 and 4.4.2, Table 3; DeepSeekMoE",
        how="A small V3, its V2 variant (softmax, three auxiliary losses) and a dense model whose every token passes "
        "as many weights read the same rows.",
        seeds=3,
        tokens=400_000,
        minutes=17,
    ),
    Experiment(
        name="mtp",
        title="Multi-token prediction on and off",
        source="report 4.5.1, Table 4",
        how="A small V3 is trained with and without the MTP module on the same rows, and scored without it on held-out "
        "text. Table 4's benchmarks need larger models; its bits per byte can be seen in small ones.",
        seeds=3,
        tokens=400_000,
        minutes=10,
    ),
    Experiment(
        name="acceptance",
        title="MTP as drafts: acceptance and speed",
        source="report 5.4.3",
        how="The models that `mtp` has trained go on with held-out texts while their module drafts the second token; "
        "then whole answers are timed with drafts and without.",
        seeds=3,
        tokens=400_000,
        minutes=3,
    ),
    Experiment(
        name="specialisation",
        title="Experts specialise where no auxiliary loss forbids it",
        source="report 4.5.3, Figure 9",
        how="The models that `balancing` has trained read held-out text of each source; how differently sources use "
        "the experts is measured as a distance, less what two halves of one source differ by.",
        seeds=3,
        tokens=600_000,
        minutes=1,
    ),
    Experiment(
        name="fp8",
        title="Training in FP8 beside BF16",
        source="report 3.3 and B.1, Figure 10",
        how="A small V3 is trained with FP8's products and caches as published, and without; the difference of the "
        "smoothed losses is compared with that of two runs that differ in the order of their sums alone.",
        seeds=1,
        tokens=400_000,
        minutes=7,
    ),
    Experiment(
        name="accumulator",
        title="Sums of 14 bits in FP8 products",
        source="report 3.3.2, Figure 7",
        how="Products over K are summed as Hopper's tensor cores do, bit by bit, with and without promotion to FP32 "
        "every 128 products, and compared with float64.",
        minutes=0.5,
    ),
    Experiment(
        name="bubbles",
        title="Bubbles and memory of pipeline schedules",
        source="report 3.2.1, Table 2",
        how="Schedules are generated chunk by chunk for 16 ranks and 120 micro-batches, run on paper, and their idle "
        "time and held activations compared with the formulas.",
    ),
    Experiment(
        name="schedule",
        title="DualPipe on 8 ranks with 20 micro-batches",
        source="report 3.2.1, Figure 5",
        how="The schedule is generated and drawn; its counts of woven pairs are compared with those of the published "
        "code.",
    ),
    Experiment(
        name="niah",
        title="Needles in a haystack",
        source="report 4.3, Figure 8",
        how="A small V3 learns to look back, is pre-trained on rows of 128 tokens, extended with YaRN to 1,024 and "
        "8,192, and asked for facts hidden at 15 depths of 15 lengths.",
        minutes=150,
    ),
    Experiment(
        name="distillation",
        title="Distillation: right more often, and longer",
        source="report 5.4.1, Table 9",
        how="An expert taught to reason step by step answers problems; one base is fine-tuned on its right answers, "
        "and on plain ones for as many tokens.",
        minutes=7,
    ),
)

EXPERIMENTS = {one.name: one for one in _ALL}


def find(name: str) -> Experiment:
    """Return an experiment by name; a ConfigError names the nearest one there is."""
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(EXPERIMENTS)}"
        raise ConfigError(f"unknown experiment '{name}'; {hint}")
    return EXPERIMENTS[name]
