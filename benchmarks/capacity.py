"""Claim: plans of a deployment come near the published one, and placing experts by load keeps devices even.

The published day of production, simulated by `dsv3 plan serve`, beside the published numbers; the ratio is how near the
plan comes, 1 being the same. Two numbers of the plan are fitted, one of them to this day (docs/deployment.md).

Experts: a small model with 64 experts a layer is trained on English, Chinese and Python, and reads some of each that
it was not trained on. Experts are placed for a first part of that and meet a second one. The largest load of 8 devices
beside the mean, with experts in order and placed with 0, 12.5% and 25% copies; the ratio is how much less the busiest
device has to do. English and Chinese come from the folder of real data; without it, experts are left out.
"""

import gzip
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from claims.record import Claim, arguments, report
from plan import nearness

DATA = Path(__file__).parents[1].parent / "shared" / "data"
CHARACTERS = 400_000
"""Of each kind of text, trained on; then a tenth as much is read, and another tenth that experts are not placed for."""
NAMES = {
    "nodes_mean": ("nodes, mean", 226.75),
    "input_tokens_per_second_of_a_prefill_node": ("input tokens a second of a prefill node", 73_700),
    "output_tokens_per_second_of_a_decode_node": ("output tokens a second of a decode node", 14_800),
    "tokens_per_second_of_a_user": ("tokens a second of a user (published: 20 to 22)", 21),
    "dollars": ("dollars of the day", 87_072),
}
"""Of the plan's JSON, and the published number."""


def main() -> None:
    options = arguments(__doc__, picture="draw the experts' loads here")
    claims, seconds = published_day()
    details: dict[str, object] = {"seconds_of_the_plan": seconds}
    if (DATA / "wikitext2").is_dir():
        more, details["balances"] = trained_experts(
            tokens=60_000 if options.quick else 400_000, picture=options.picture
        )
        claims += more
    report(claims, title="Deployment on paper", json_file=options.json, details=details)


def published_day() -> tuple[list[Claim], float]:
    began = time.perf_counter()
    day = json.loads(dsv3("plan", "serve", "--json"))
    seconds = time.perf_counter() - began
    return [
        Claim(
            name=f"published day: {name}",
            ours=day[key],
            peer=published,
            peer_name="published",
            ratio=nearness(day[key], published),
            target=0.9,
        )
        for key, (name, published) in NAMES.items()
    ], seconds


def trained_experts(*, tokens: int, picture: Path | None) -> tuple[list[Claim], list[dict]]:
    with tempfile.TemporaryDirectory() as root:
        run = Path(root) / "run"
        files: dict[str, list[Path]] = {"train": [], "known": [], "met": []}
        for name, text in texts().items():
            parts = {"train": text[:CHARACTERS]}
            for number, part in enumerate(("known", "met")):
                parts[part] = text[CHARACTERS * (10 + number) // 10 : CHARACTERS * (11 + number) // 10]
            for part, piece in parts.items():
                files[part].append(Path(root) / part / f"{name}.txt")
                files[part][-1].parent.mkdir(exist_ok=True)
                files[part][-1].write_text(piece)
        experts = ("model.n_routed_experts=64", "model.num_experts_per_tok=6", "model.moe_intermediate_size=32")
        sizes = [word for setting in (*experts, f"total_tokens={tokens}") for word in ("--set", setting)]
        dsv3("pretrain", "tiny", "--run", run, *sizes, "--data", *files["train"])
        for part in ("known", "met"):
            data = [word for file in files[part] for word in ("--data", file)]
            loads = dsv3("eval", "domains", run, "--answers", "0", "--json", *data)
            (Path(root) / f"{part}.json").write_text(loads)
        table = ("plan", "experts", Path(root) / "met.json", "--known", Path(root) / "known.json", "--devices", "8")
        drawn = () if picture is None else ("--picture", picture)
        found = json.loads(dsv3(*table, "--json", *drawn))["balances"]
        print(dsv3(*table))
    return [
        Claim(
            name=f"largest of 8 devices over the mean, {one['traffic']} alone, {one['copies']} copies of 64 experts",
            ours=one["mean"],
            peer=before["mean"],
            peer_name="in order",
            ratio=before["mean"] / one["mean"],
            target=1.1,
        )
        for before in found
        if before["placed_for"] is None
        for one in found
        if one["placed_for"] == one["traffic"] == before["traffic"]
    ], found


def texts() -> dict[str, str]:
    with gzip.open(DATA / "wikitext2" / "valid.txt.gz", "rt", encoding="utf-8") as file:
        english = file.read()
    with gzip.open(DATA / "chinese-classics" / "sanguo_yanyi.jsonl.gz", "rt", encoding="utf-8") as file:
        chinese = "\n\n".join(json.loads(line)["text"] for line in file)
    code = ""
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        code += source.read_text(encoding="utf-8", errors="ignore") + "\n\n"
    return {"english": english, "chinese": chinese, "python": code}


def dsv3(*arguments: object) -> str:
    command = [sys.executable, "-m", "dsv3.cli.main", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
