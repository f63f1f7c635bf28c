"""How differently kinds of text use the experts, under the bias and an auxiliary loss (report 4.5.3, Figure 9)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from dsv3.config.files import read_config
from dsv3.data.prepared import load_prepared
from dsv3.evals.evaluation import held_out_text
from dsv3.evals.specialisation import DomainLoad, expert_loads, moe_layers
from dsv3.infer.loaded import load
from dsv3.report.bars import Panel, draw_seeds
from dsv3.report.specialisation import draw_loads
from dsv3.reproduce import balancing
from dsv3.reproduce.arms import settings_of, train_arms
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Order

ARMS = tuple(arm for arm in balancing.ARMS if arm.name in ("bias", "sequence_loss"))
READ_TOKENS = 120_000
WINDOWS = 8
"""A source with less text than so many windows is left out: its halves would differ by chance."""


def run(ask: Ask) -> Outcome:
    """Read each source with both models."""
    runs = train_arms(ask, arms=ARMS, folder=ask.folder.parent / "balancing")
    apart: dict[str, tuple[float, ...]] = {}
    chance: dict[str, tuple[float, ...]] = {}
    for arm in ARMS:
        measured = [
            domain_loads(one.folder, picture=ask.folder / f"specialisation-{arm.name}.png", title=arm.label)
            for one in runs[arm.name]
        ]
        apart[arm.name] = tuple(beyond_chance(loads) for loads in measured)
        chance[arm.name] = tuple(fmean(fmean(one.by_chance) for one in loads) for loads in measured)
    draw_seeds(
        [Panel(title="distance of a source from the others", values={arm.label: apart[arm.name] for arm in ARMS})],
        title="Share of choices that fall on other experts, less chance",
        file=ask.folder / "specialisation.png",
    )
    captions = {arm.name: f"Load of each expert by source of text, {arm.label}, last seed." for arm in ARMS}
    return Outcome(
        findings=(
            Order(
                claim="distance between sources: sequence loss below bias",
                report="greater specialisation without auxiliary loss (Figure 9)",
                lower=apart["sequence_loss"],
                higher=apart["bias"],
            ),
        ),
        pictures=(
            Picture(file="specialisation.png", caption="How differently sources use the experts."),
            *(Picture(file=f"specialisation-{name}.png", caption=told) for name, told in captions.items()),
        ),
        settings=settings_of(ARMS) | {"read_tokens": READ_TOKENS, "runs": "those of balancing"},
        data={"apart_beyond_chance": apart, "by_chance": chance},
        remark="The report shows pictures and no number. Ours: the total variation distance of a source's experts from "
        "those of the others, less that of its own two halves, the mean over sources and layers.",
    )


def domain_loads(run: Path, *, picture: Path, title: str) -> tuple[DomainLoad, ...]:
    """Return where the held-out text of each source goes in a run's model, and draw it."""
    window = read_config(run / "config.json").batch.sequence_length
    documents = held_out_text(load_prepared(run / "corpus"), max_tokens=READ_TOKENS).documents
    enough = {name: texts for name, texts in documents.items() if sum(map(len, texts)) >= WINDOWS * window}
    model = load(run, plain=True, device="cpu").model
    loads = expert_loads(model, documents=enough, window=window)
    most = model.config.n_routed_experts / model.config.num_experts_per_tok
    draw_loads(loads, layers=moe_layers(model), most=most, file=picture, title=title)
    return loads


def beyond_chance(loads: Sequence[DomainLoad]) -> float:
    """Return how far sources lie apart, beyond the distance of each one's halves; the mean of sources and layers."""
    return fmean(fmean(one.apart) - fmean(one.by_chance) for one in loads)
