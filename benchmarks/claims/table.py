"""Write the claims of JSON files into docs/benchmarks.md, and those a newcomer asks for into README.md.

.venv/bin/python benchmarks/claims/table.py benchmarks/results/*.json

Both stand between two markers, so that no number is typed by hand.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A row of the README."""

    told: str
    file: str
    """Of benchmarks/results, and the benchmark that wrote it."""
    claim: str
    """Its name, or how it begins."""


HEADLINES = (
    Headline(
        told="training step of an 8M model, 256 tokens a row, CPU seconds",
        file="training",
        claim="training step, 8M, T=256 (CPU",
    ),
    Headline(told="the same, 2,048 tokens a row", file="training", claim="training step, 8M, T=2048 (CPU"),
    Headline(told="its peak memory, MB", file="training", claim="peak memory above idle, 8M, T=2048"),
    Headline(
        told="decoding on a CPU, int8, tokens a second",
        file="inference",
        claim="decode, batch 1, int8 (tokens a second",
    ),
    Headline(told="the same, 8 at once", file="inference", claim="decode, batch 8, int8 (tokens a second"),
    Headline(
        told="reading a prompt of 512, tokens a second", file="inference", claim="prompt of 512, int8 (tokens a second"
    ),
    Headline(
        told="scoring MMLU's questions, requests a CPU second", file="evaluation", claim="mmlu: requests a CPU second"
    ),
    Headline(
        told="GRPO until answers are worth 0.9, seconds", file="grpo", claim="seconds until answers are worth 0.9"
    ),
    Headline(
        told="loss in FP8, largest distance from FP32, %", file="fp8_loss", claim="largest difference of the loss"
    ),
    Headline(told="MaxVio, balancing by bias beside none", file="balance", claim="MaxVio"),
    Headline(told="99% of gaps between pieces of text, ms, prefill apart", file="deployment", claim="99th percentile"),
)


def main() -> None:
    records = {Path(name).stem: json.loads(Path(name).read_text()) for name in sys.argv[1:]}
    write(ROOT / "docs" / "benchmarks.md", table=whole(records))
    write(ROOT / "README.md", table=headlines(records))


def write(file: Path, *, table: str) -> None:
    text = file.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    file.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


def whole(records: dict[str, Any]) -> str:
    lines = ["| claim | ours | peer | | ratio | target |", "|---|---|---|---|---|---|"]
    machines = []
    for name, record in records.items():
        machines.append(f"`{name}`: {record['machine']}, torch {record['versions']['torch']}, {record['commit']}")
        for claim in record["claims"]:
            lines.append(
                f"| {claim['name']} | {claim['ours']:.4g} | {claim['peer']:.4g} | {claim['peer_name']} | "
                f"{ratio(claim)} | {claim['target']:.3g} |"
            )
    return "\n".join([*lines, "", "Measured on " + "; ".join(machines) + ". A ratio above 1 is better than the peer."])


def headlines(records: dict[str, Any]) -> str:
    lines = ["| | ours | peer | | times as good | command |", "|---|---|---|---|---|---|"]
    for headline in HEADLINES:
        claims = records.get(headline.file, {}).get("claims", [])
        for claim in claims:
            if claim["name"].startswith(headline.claim):
                lines.append(
                    f"| {headline.told} | {claim['ours']:.4g} | {claim['peer']:.4g} | {claim['peer_name']} | "
                    f"{ratio(claim)} | `benchmarks/{headline.file}.py` |"
                )
                break
        else:
            print(f"README: nothing measured for '{headline.told}' ({headline.file}: {headline.claim})")
    return "\n".join(lines)


def ratio(claim: dict[str, Any]) -> str:
    return f"{claim['ratio']:.2f}" + ("" if claim["met"] else " (target missed)")


if __name__ == "__main__":
    main()
