"""Write the claims of JSON files into README.md, between its two markers, so that no number is typed by hand.

.venv/bin/python benchmarks/claims/table.py benchmarks/results/*.json
"""

import json
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def table(files: list[Path]) -> str:
    lines = ["| claim | ours | peer | | ratio | target |", "|---|---|---|---|---|---|"]
    machines = []
    for file in files:
        record = json.loads(file.read_text())
        machines.append(f"`{file.stem}`: {record['machine']}, torch {record['versions']['torch']}, {record['commit']}")
        for claim in record["claims"]:
            missed = "" if claim["met"] else " (missed)"
            lines.append(
                f"| {claim['name']} | {claim['ours']:.4g} | {claim['peer']:.4g} | {claim['peer_name']} | "
                f"{claim['ratio']:.2f}{missed} | {claim['target']:.3g} |"
            )
    return "\n".join([*lines, "", "Measured on " + "; ".join(machines) + ". A ratio above 1 is better than the peer."])


def main() -> None:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    README.write_text(f"{head}{BEGIN}\n{table([Path(name) for name in sys.argv[1:]])}\n{END}{tail}")


if __name__ == "__main__":
    main()
