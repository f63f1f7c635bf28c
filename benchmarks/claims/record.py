"""What every benchmark writes: claims with their peer, and the machine they were measured on."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number of ours beside one of a peer. `ratio` says how many times better ours is."""

    name: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    target: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.target


def arguments(description: str, **files: str) -> argparse.Namespace:
    """Read the command line; `files` are further options that take one, with their help."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under three minutes, with fewer tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims here")
    for name, told in files.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=told)
    return parser.parse_args()


def report(
    claims: list[Claim], *, title: str, json_file: Path | None, details: Mapping[str, object] | None = None
) -> None:
    """Print the claims as a table, and write them as JSON if a file is given, with `details` beside them."""
    table = Table(title=title)
    for column in ("claim", "ours", "peer", "peer is", "ratio", "target", "met"):
        table.add_column(column, justify="right" if column in ("ours", "peer", "ratio", "target") else "left")
    for claim in claims:
        numbers = (f"{claim.ours:.4g}", f"{claim.peer:.4g}", claim.peer_name, f"{claim.ratio:.3g}", f"{claim.target:g}")
        table.add_row(claim.name, *numbers, "yes" if claim.met else "NO")
    Console(width=140).print(table)
    if json_file is not None:
        record = {
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads",
            "commit": commit(),
            "versions": {name: version(name) for name in ("dsv3", "torch", "numpy")},
            "claims": [asdict(claim) | {"met": claim.met} for claim in claims],
            **(details or {}),
        }
        json_file.write_text(json.dumps(record, indent=2) + "\n")


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return run.stdout.strip() or "unknown"
