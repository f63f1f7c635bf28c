"""What a context extension is worth: perplexity by position before it, and after each of its phases."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3.config.files import read_config
from dsv3.data.prepared import load_prepared
from dsv3.evals.evaluation import held_out_text
from dsv3.evals.positions import PositionLoss, loss_by_position, whole_rows
from dsv3.infer.loaded import load
from dsv3.runtime.atomic import write_json

FILE = "extension.json"
"""In the folder of the run that was extended."""


def compare_phases(
    run: Path,
    *,
    phases: Sequence[Path],
    rows: int,
    device: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[PositionLoss]:
    """Read the same held-out rows, as long as the last phase's, with each model; write `extension.json` of `run`.

    The run itself reads on beyond its positions as if nothing were the matter: that is what an extension mends. Rows
    are shorter where held-out text does not fill one, and nothing is compared where it goes no further than
    pre-training did.
    """
    folders = (run, *phases)
    lengths = [read_config(folder / "config.json").batch.sequence_length for folder in folders]
    text = held_out_text(load_prepared(run / "corpus"), max_tokens=2 * rows * lengths[-1])
    longest = min(lengths[-1], max(sum(map(len, texts)) for texts in text.documents.values()) - 1)
    curves: list[PositionLoss] = []
    if longest > lengths[0]:
        read = whole_rows(text.documents, length=longest, most=rows)
        for place, (folder, length) in enumerate(zip(folders, lengths, strict=True)):
            if progress is not None:
                progress("reading long text", place, len(folders))
            model = load(folder, plain=True, device=device).model
            when = f"after rows of {length:,} tokens" if place else f"before: rows of {length:,} tokens"
            curves.append(loss_by_position(model, rows=read, name=when))
    found: dict[str, Any] = {
        "trained": lengths[0],
        "lengths": lengths[1:],
        "curves": [curve.as_dict() for curve in curves],
    }
    write_json(found, path=run / FILE)
    return curves
