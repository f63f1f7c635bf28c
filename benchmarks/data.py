"""Claim: a machine's own messy text becomes a corpus without a crash, faster than by datatrove's steps by hand.

The text: documentation, manual pages in many languages and every Python file of this Debian installation. Planted in
it: exact copies, near copies of known likeness, items of an evaluation, broken encodings, binary junk and one line of
500 MB. Checked: copies are found as often as MinHash's theory says, no item is left, memory stays flat, and two workers
end with the bytes of one. Timed in CPU seconds, beside datatrove's own steps on the same JSON lines.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from claims.record import Claim, arguments, report
from data_parts.messy import Planted, plant, real_folders, sample_lines

from dsv3.config.curation import DuplicateConfig
from dsv3.data.curation.duplicates import probability_of_a_find
from dsv3.data.prepared import load_prepared
from dsv3.data.shards import shard_files
from dsv3.data.tokenizer import Tokenizer

BENCHMARKS = Path(__file__).parent
PEER_MEGABYTES = 24
FLAT = 1.25
"""Peak memory of the whole corpus beside that of an eighth of it."""


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory(prefix="dsv3-data-") as scratch:
        folder = Path(scratch)
        planted = plant(folder / "planted", megabytes_of_line=40 if options.quick else 500)
        folders = real_folders(quick=options.quick)
        inputs = [*(f"{name}={path}" for name, path in folders.items()), f"planted={folder / 'planted'}"]
        details: dict[str, Any] = {}
        one = prepare(inputs, output=folder / "one", workers=1, items=planted.items_file)
        print(f"one worker: {one}")
        card = json.loads((folder / "one" / "data_card.json").read_text())
        details["one worker"] = one | {"megabytes": megabytes(card), "steps": cpu_by_step(folder / "one")}
        two = prepare(inputs, output=folder / "two", workers=2, items=planted.items_file)
        print(f"two workers: {two}")
        details["two workers"] = two
        part = prepare(inputs[:1], output=folder / "part", workers=1, items=planted.items_file)
        details["a part"] = part | {"megabytes": megabytes(json.loads((folder / "part/data_card.json").read_text()))}
        claims = [*found(planted, output=folder / "one"), *whole(folder, one=one, two=two, part=part)]
        claims += beside_peer(folder, inputs=inputs, details=details, quick=options.quick)
        claims.append(tokenising(folder / "one"))
        details["dropped"] = {step["name"]: step["dropped"] for step in card["steps"]}
        details["kept"] = {name: group["tokens"] for name, group in card["groups"].items()}
    report(claims, title="Corpus preparation", json_file=options.json, details=details)


def prepare(
    inputs: list[str], *, output: Path, workers: int, items: Path, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run the command, and return its seconds and the peak memory of its largest process."""
    command = [sys.executable, "-m", "dsv3.cli.main", "data", "prepare"]
    for one in inputs:
        command += ["--input", one]
    command += ["--output", str(output), "--workers", str(workers), "--eval-file", str(items)]
    command += ["--set", "task_bytes=16000000", *more]
    return timed(command)


def timed(command: list[str]) -> dict[str, Any]:
    """Run a command, and return wall and CPU seconds and the memory of its largest process in MB."""
    measure = BENCHMARKS / "data_parts" / "measure.py"
    run = subprocess.run([sys.executable, str(measure), *command], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def megabytes(card: dict[str, Any]) -> float:
    return next(step["bytes"] for step in card["steps"] if step["name"] == "read") / 1e6


def cpu_by_step(output: Path) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    for file in output.glob("work/accounts/documents/*.json"):
        for step in json.loads(file.read_text())["steps"]:
            seconds[step["name"]] += step["seconds"]
    return {name: round(spent, 2) for name, spent in seconds.items()}


def kept_names(output: Path) -> set[str]:
    corpus = load_prepared(output)
    names: set[str] = set()
    for source in corpus.sources:
        for file in shard_files(corpus.source_folder(source)):
            with file.with_suffix(".names.jsonl").open() as lines:
                names.update(map(json.loads, lines))
        with (corpus.source_folder(source) / "held_out.jsonl").open() as lines:
            names.update(json.loads(line)["name"] for line in lines)
    return names


def found(planted: Planted, *, output: Path) -> list[Claim]:
    """Return what became of what was planted."""
    names = kept_names(output)
    exact = [name for name in planted.exact if name not in names]
    near = [name for name in planted.near if name not in names]
    expected = sum(probability_of_a_find(share, config=DuplicateConfig()) for share in planted.near.values())
    items = [name for name in planted.contaminated if name not in names]
    theory = "MinHash's theory"
    recall, wanted = len(near) / len(planted.near), expected / len(planted.near)
    return [
        claim("exact copies found", len(exact), len(planted.exact), "planted", target=1.0),
        claim("near copies found, share", recall, wanted, theory, target=0.97),
        claim(
            "documents with an evaluation's item dropped", len(items), len(planted.contaminated), "planted", target=1.0
        ),
    ]


def claim(name: str, ours: float, peer: float, peer_name: str, *, target: float) -> Claim:
    return Claim(name=name, ours=ours, peer=peer, peer_name=peer_name, ratio=ours / peer, target=target)


def whole(folder: Path, *, one: dict[str, Any], two: dict[str, Any], part: dict[str, Any]) -> list[Claim]:
    """Return how two workers compare with one, and the whole with a part."""
    same = all(
        (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
        for name in sorted(
            file.relative_to(folder / "one").as_posix()
            for pattern in ("sources/*/*.bin", "sources/*/*.jsonl", "tokenizer/*", "data_card.json")
            for file in (folder / "one").glob(pattern)
        )
    )
    return [
        claim("two workers end with the bytes of one", float(same), 1.0, "one worker", target=1.0),
        claim("seconds, two workers", one["wall"] / two["wall"], 1.0, "one worker", target=1.6),
        Claim(
            name="peak memory of a process, MB",
            ours=one["megabytes"],
            peer=part["megabytes"],
            peer_name="a part of the text",
            ratio=part["megabytes"] / one["megabytes"],
            target=1 / FLAT,
        ),
    ]


def beside_peer(folder: Path, *, inputs: list[str], details: dict[str, Any], quick: bool) -> list[Claim]:
    """Return our CPU seconds beside datatrove's steps put together by hand, on the same JSON lines."""
    lines = folder / "lines"
    size = sample_lines(inputs, folder=lines, megabytes=4 if quick else PEER_MEGABYTES)
    tokenizer = folder / "one" / "tokenizer"
    ours = prepare(
        [f"lines={lines}"],
        output=folder / "ours",
        workers=1,
        items=folder / "items.jsonl",
        more=("--tokenizer", str(tokenizer)),
    )
    peer = timed([sys.executable, "-m", "data_parts.by_hand", str(lines), str(folder / "peer"), str(tokenizer)])
    details["beside datatrove"] = {"megabytes": size, "ours": ours, "peer": peer}
    rates = size / ours["cpu"], size / peer["cpu"]
    return [claim("MB a CPU second, JSON lines to tokens", *rates, "datatrove by hand", target=1.0)]


def tokenising(output: Path) -> Claim:
    """Return the speed of `Tokenizer.encode_batch` beside that of `tokenizers` on the held-out and kept text."""
    import tokenizers

    corpus = load_prepared(output)
    texts = [text for source in corpus.sources for text in corpus.held_out(source)]
    ours, peer = (
        Tokenizer.from_file(output / "tokenizer"),
        tokenizers.Tokenizer.from_file(str(output / "tokenizer" / "tokenizer.json")),
    )
    spent = {"ours": 1e9, "peer": 1e9}
    for _ in range(5):
        for name, encode in (
            ("ours", ours.encode_batch),
            ("peer", lambda some: [one.ids for one in peer.encode_batch(some, add_special_tokens=False)]),
        ):
            started = resource.getrusage(resource.RUSAGE_SELF)
            encode(texts)
            ended = resource.getrusage(resource.RUSAGE_SELF)
            spent[name] = min(spent[name], ended.ru_utime - started.ru_utime + ended.ru_stime - started.ru_stime)
    size = sum(len(text.encode()) for text in texts) / 1e6
    return claim("MB a CPU second, tokenising", size / spent["ours"], size / spent["peer"], "tokenizers", target=0.98)


if __name__ == "__main__":
    main()
