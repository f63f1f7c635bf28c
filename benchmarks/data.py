"""Claim: a machine's own messy text becomes a corpus without a crash, faster than by datatrove's steps by hand.

The text: documentation, manual pages in many languages and Python files of this Debian installation. Planted in it:
exact copies, near copies of known likeness, items of an evaluation, broken encodings, binary junk. Beside it, for the
claim on memory, a single line of 500 MB (text and JSON), a page of 100 MB, and all of them packed with gzip. Checked:
copies are found as often as MinHash's theory says, no item is left, the largest process takes at most 1.25 times what
it takes for an eighth of the text, and two workers end with the bytes of one. Timed: one and two workers in turn, on
the same text, with one thread each and without what a start costs; and CPU seconds beside datatrove's own steps on
the same JSON lines. Takes 20 to 30 minutes on two free cores (750 MB of text in all); `--quick` 155 CPU seconds.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from claims.record import Claim, arguments, report
from data_parts.messy import Planted, links, plant, real_folders, sample_lines, write_large

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
        planted = plant(folder / "planted")
        folders = real_folders(quick=options.quick)
        inputs = [
            *links(folders, folder=folder / "real", megabytes=3 if options.quick else 30),
            f"planted={folder / 'planted'}",
        ]
        details: dict[str, Any] = {}
        one = prepare(inputs, output=folder / "one", workers=1, items=planted.items_file)
        card = json.loads((folder / "one" / "data_card.json").read_text())
        details["one worker"] = one | {"megabytes_of_text": megabytes(card), "steps": cpu_by_step(folder / "one")}
        print(f"one worker: {one}")
        claims = found(planted, output=folder / "one")
        claims += scaling(folder, inputs=inputs, items=planted.items_file, details=details, quick=options.quick)
        claims.append(
            flat_memory(folder, folders=folders, items=planted.items_file, details=details, quick=options.quick)
        )
        claims += beside_peer(folder, inputs=inputs, details=details, quick=options.quick)
        claims.append(tokenising(folder / "one"))
        details["dropped"] = {step["name"]: step["dropped"] for step in card["steps"]}
        details["kept"] = {name: group["tokens"] for name, group in card["groups"].items()}
    report(claims, title="Corpus preparation", json_file=options.json, details=details)


def prepare(
    inputs: list[str], *, output: Path, workers: int, items: Path, more: tuple[str, ...] = (), threads: int = 0
) -> dict[str, Any]:
    """Run the command, and return its seconds and the peak memory of its largest process."""
    command = [sys.executable, "-m", "dsv3.cli.main", "data", "prepare"]
    for one in inputs:
        command += ["--input", one]
    command += ["--output", str(output), "--workers", str(workers), "--eval-file", str(items)]
    command += ["--set", "task_bytes=2000000", *more]
    return timed(command, threads=threads)


def timed(command: list[str], *, threads: int = 0) -> dict[str, Any]:
    """Run a command, and return wall and CPU seconds and the memory of its largest process in MB."""
    measure = BENCHMARKS / "data_parts" / "measure.py"
    limits = {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)} if threads else {}
    run = subprocess.run(
        [sys.executable, str(measure), *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | limits,
    )
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


def scaling(folder: Path, *, inputs: list[str], items: Path, details: dict[str, Any], quick: bool) -> list[Claim]:
    """Return how two workers compare with one: the bytes, and the seconds, in turn and without those of a start.

    The tokenizer is given, since training one takes the same few seconds however much text there is. All run with one
    thread: where one worker has the machine to itself, its tokenizer takes every core.
    """
    more = ("--tokenizer", str(folder / "one" / "tokenizer"))
    tiny = folder / "tiny"
    tiny.mkdir()
    for number in range(4):
        text = "The sea and the land of that time are to be seen with the eyes of those who were there before. "
        (tiny / f"{number}.txt").write_text(f"{text}\nIt was number {number} of them, and that is all of the story.")
    spent: dict[str, list[dict[str, Any]]] = {}
    for attempt in range(1 if quick else 3):
        for workers in (1, 2):
            for name, some in ((f"start of {workers}", [f"tiny={tiny}"]), (f"{workers} workers", inputs)):
                output = folder / f"{name.replace(' ', '-')}-{attempt}"
                spent.setdefault(name, []).append(
                    prepare(some, output=output, workers=workers, items=items, more=more, threads=1)
                )
    walls = {name: statistics.median(run["wall"] for run in runs) for name, runs in spent.items()}
    details["one and two workers"] = {"seconds": walls, "runs": spent}
    print(f"seconds of one and two workers: {walls}")
    return [
        claim(
            "two workers end with the bytes of one",
            float(same_bytes(folder / "1-workers-0", folder / "2-workers-0")),
            1.0,
            "one worker",
            target=1.0,
        ),
        Claim(
            name="seconds without the start, two workers",
            ours=(two := walls["2 workers"] - walls["start of 2"]),
            peer=(one := walls["1 workers"] - walls["start of 1"]),
            peer_name="one worker",
            ratio=one / two,
            target=1.6,
        ),
    ]


def same_bytes(first: Path, second: Path) -> bool:
    patterns = ("sources/*/*.bin", "sources/*/*.jsonl", "tokenizer/*", "data_card.json")
    names = sorted(
        {file.relative_to(place) for place in (first, second) for one in patterns for file in place.glob(one)}
    )
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def flat_memory(folder: Path, *, folders: dict[str, Path], items: Path, details: dict[str, Any], quick: bool) -> Claim:
    """Return the memory of the largest process for all text with the large files, beside an eighth without them."""
    size = 8 if quick else 100
    write_large(folder / "large", megabytes=40 if quick else 500)
    eighth = links(folders, folder=folder / "eighth", megabytes=size, every=8)
    whole = [*links(folders, folder=folder / "whole", megabytes=size), f"large={folder / 'large'}"]
    part = prepare(eighth, output=folder / "out-eighth", workers=2, items=items)
    all_of_it = prepare(whole, output=folder / "out-whole", workers=2, items=items)
    cards = [json.loads((folder / name / "data_card.json").read_text()) for name in ("out-eighth", "out-whole")]
    details["memory"] = {
        name: run | {"megabytes_of_text": megabytes(card)}
        for name, run, card in zip(("an eighth", "all, and large files"), (part, all_of_it), cards, strict=True)
    }
    details["memory"]["passed over"] = next(step["dropped"] for step in cards[1]["steps"] if step["name"] == "read")
    print(f"memory: {details['memory']}")
    return Claim(
        name="peak memory of a process, MB",
        ours=all_of_it["megabytes"],
        peer=part["megabytes"],
        peer_name="an eighth of the text",
        ratio=part["megabytes"] / all_of_it["megabytes"],
        target=1 / FLAT,
    )


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
    peer = timed(
        [
            sys.executable,
            str(BENCHMARKS / "data_parts" / "by_hand.py"),
            str(lines),
            str(folder / "peer"),
            str(tokenizer),
        ]
    )
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
