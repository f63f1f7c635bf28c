"""Claim: balancing by bias keeps experts more evenly loaded than no balancing, in the same run length (report 2.1.2).

Recipe `tiny` is trained once for each method on the same rows from the same weights. MaxVio is the mean over MoE
layers and over the last fifth of the steps; the loss is the mean over the same steps. The report's other methods are
shown too.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

from claims.record import Claim, arguments, report
from rich.console import Console

from dsv3.config.override import apply_overrides
from dsv3.recipes import tiny
from dsv3.recipes.milestones import learning_rate, milestones
from dsv3.train.loop import pretrain

METHODS = ("none", "bias", "sequence_loss", "batch_loss", "v2_losses")


def main() -> None:
    options = arguments(__doc__)
    tokens = 60_000 if options.quick else 400_000
    methods = METHODS[:2] if options.quick else METHODS
    console = Console()
    results: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        first: Path | None = None
        for method in methods:
            folder = Path(root) / method
            if first is not None:  # the same corpus and tokenizer for all
                folder.mkdir()
                (folder / "corpus").symlink_to(first / "corpus")
            first = first or folder
            results[method] = train(method, tokens=tokens, folder=folder)
            violation, loss = results[method]
            console.print(f"{method:>14}: MaxVio {violation:.3f}, next-token loss {loss:.3f} nats")
    ours, peer = results["bias"][0], results["none"][0]
    claim = Claim(
        name=f"MaxVio at the end of {tokens:,} tokens",
        ours=ours,
        peer=peer,
        peer_name="balance.method=none",
        ratio=peer / ours,
        target=1.2 if options.quick else 2.0,
    )
    report([claim], title="Balance", json_file=options.json)


def train(method: str, *, tokens: int, folder: Path) -> tuple[float, float]:
    """Train `tiny` for so many tokens; return MaxVio and loss over the last fifth of the steps."""
    base = tiny()
    scaled = milestones(tokens)
    rate = base.optim.learning_rate
    config = replace(
        base,
        total_tokens=tokens,
        optim=replace(
            base.optim,
            learning_rate=learning_rate(rate.peak, total_tokens=tokens, warmup_steps=rate.warmup_steps),
        ),
        batch=replace(base.batch, ramp_tokens=scaled.ramp_tokens),
        mtp=replace(base.mtp, switch_tokens=scaled.mtp_switch_tokens),
        balance=replace(base.balance, method=method, bias_freeze_tokens=scaled.bias_freeze_tokens),
    )
    # No validation and no snapshots on the way: they are not what is measured.
    config = apply_overrides(config, assignments=["snapshot.every_steps=1000000", "evaluation.every_steps=1000000"])
    pretrain(config, folder=folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    last = steps[-max(1, len(steps) // 5) :]
    return mean(mean(step["max_violation"]) for step in last), mean(step["loss"] for step in last)


if __name__ == "__main__":
    main()
