"""Claim: a student fine-tuned on an expert's worked answers is right more often, and answers at greater length.

The report's Table 9 in small, as `dsv3 reproduce distillation` makes it (dsv3/reproduce/distillation.py says how).
`runs/distill` keeps everything, and a call that was stopped goes on.
"""

import json
from pathlib import Path
from typing import Any

from claims.record import Claim, arguments, report

from dsv3.reproduce.distillation import ON_DISTILLED, ON_PLAIN, distil_chains

FOLDER = Path(__file__).parents[1] / "runs" / "distill"


def main() -> None:
    options = arguments(__doc__)
    folder = FOLDER.with_name("distill_quick") if options.quick else FOLDER
    found = distil_chains(folder, part=2 if options.quick else 1)
    print(json.dumps({name: found.card[name] for name in ("lines", "problems", "answers")}, indent=2))
    for name, row in found.table.items():
        print(f"{name:30} right {row['right']:6.1%}  length {row['length']:6.1f}")
    details = {"table": found.table, "card": found.card}
    report(claims_of(found.table), title="Distillation", json_file=options.json, details=details)


def claims_of(table: dict[str, dict[str, Any]]) -> list[Claim]:
    plain, distilled = table[ON_PLAIN], table[ON_DISTILLED]
    return [
        Claim(
            name=what,
            ours=distilled[key],
            peer=plain[key],
            peer_name="on plain answers, as many tokens",
            ratio=distilled[key] / max(plain[key], 1e-9),
            target=target,
        )
        for key, what, target in (
            ("right", "held-out problems right after distillation (report: x 1.12 and 1.20)", 1.12),
            ("length", "tokens of an answer after distillation (report: x 1.09 and 1.96)", 1.09),
        )
    ]


if __name__ == "__main__":
    main()
