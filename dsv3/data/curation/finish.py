"""The last stage: one account of all tasks, held-out texts by group, and the marker that makes the folder a corpus."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dsv3.config.curation import CurationConfig
from dsv3.config.files import to_dict
from dsv3.data.curation.account import StepAccount, add_up, read_account
from dsv3.data.curation.domain import DOMAINS
from dsv3.data.curation.groups import group_folder
from dsv3.data.document import Remark
from dsv3.data.prepared import FORMAT, HELD_OUT, PreparedCorpus, PreparedSource, save_prepared
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import DataError
from dsv3.runtime.atomic import whole_file, write_json

CARD = "data_card.json"
MADE_BY = "dsv3 data prepare"


def finish(config: CurationConfig, *, folder: Path, tasks: int) -> None:
    """Write `data_card.json`, `held_out.jsonl` of every group and, last, `corpus.json` beside the work folder.

    Raises:
        DataError: nothing is left to train on.
    """
    output, keep = folder.parent, config.reading.max_remarks
    first = [read_account(folder / "accounts" / "documents" / f"{task:05d}.json") for task in range(tasks)]
    last = [read_account(folder / "accounts" / "shards" / f"{task:05d}.json") for task in range(tasks)]
    steps = add_up([*(steps for steps, _ in first), *(steps for steps, _ in last)], keep=keep)
    groups = _groups([more["groups"] for _, more in last])
    held_out = _gather_held_out(folder, output=output, tasks=tasks, limit=config.tokens.max_held_out_documents)
    for name, (documents, size) in held_out.items():
        groups[name].update(held_out_documents=documents, held_out_bytes=size)
    groups = {name: counts for name, counts in groups.items() if counts["tokens"]}
    if not groups:
        raise DataError(f"no document is left to train on{_why(steps)}")
    tokenizer = Tokenizer.from_file(output / "tokenizer")
    corpus = PreparedCorpus(
        folder=output,
        vocab_size=tokenizer.vocab_size,
        sources=tuple(_prepared(name, counts, config=config, output=output) for name, counts in groups.items()),
        absent=(),
        settings={"format": FORMAT, "made by": MADE_BY, "curation": to_dict(config)},
    )
    card = _card(config, steps=steps, firsts=[more for _, more in first], groups=groups, folder=folder)
    write_json(card, path=output / CARD)
    save_prepared(corpus)


def _groups(parts: list[dict[str, dict[str, int]]]) -> dict[str, Counter[str]]:
    """Return the counts of each group over all tasks, in the order of sources and domains."""
    total: dict[str, Counter[str]] = {}
    for part in parts:
        for name, counts in part.items():
            entry = total.setdefault(name, Counter())
            entry.update({key: value for key, value in counts.items() if key != "source"})
            entry["source"] = counts["source"]
    for counts in total.values():
        counts["held_out_documents"] = counts["held_out_bytes"] = 0  # Each task held back as many as all may.

    def order(name: str) -> tuple[int, int, str]:
        domain = name.rsplit("/", 1)[1]
        return total[name]["source"], DOMAINS.index(domain) if domain in DOMAINS else len(DOMAINS), domain

    return {name: total[name] for name in sorted(total, key=order)}


def _gather_held_out(folder: Path, *, output: Path, tasks: int, limit: int) -> dict[str, tuple[int, int]]:
    """Write the held-out texts of each group, and return how many there are and how long."""
    lines: dict[str, list[bytes]] = {}
    sizes: Counter[str] = Counter()
    for task in range(tasks):
        with (folder / "held_out" / f"{task:05d}.jsonl").open("rb") as file:
            for line in file:
                group, name, text = json.loads(line)
                kept = lines.setdefault(group, [])
                if len(kept) < limit:
                    kept.append(json.dumps({"name": name, "text": text}).encode() + b"\n")
                    sizes[group] += len(text.encode())
    for group, kept in lines.items():
        place = group_folder(output, name=group)
        place.mkdir(parents=True, exist_ok=True)
        with whole_file(place / HELD_OUT) as file:
            file.writelines(kept)
    return {group: (len(kept), sizes[group]) for group, kept in lines.items()}


def _prepared(name: str, counts: Counter[str], *, config: CurationConfig, output: Path) -> PreparedSource:
    folder = group_folder(output, name=name)
    if not (folder / HELD_OUT).is_file():
        with whole_file(folder / HELD_OUT):
            pass
    skipped = counts["left_out"]
    return PreparedSource(
        name=name,
        path=config.inputs[counts["source"]].path,
        folder=folder.relative_to(output).as_posix(),
        documents=counts["documents"],
        bytes=counts["bytes"],
        tokens=counts["tokens"],
        fim_documents=counts["fim_documents"],
        held_out_documents=counts["held_out_documents"],
        held_out_bytes=counts["held_out_bytes"],
        duplicates=0,
        skipped=(Remark(reason="held out, and beyond max_held_out_documents", count=skipped, examples=()),)
        if skipped
        else (),
        changed=(),
        domain=name.rsplit("/", 1)[1],
    )


def _why(steps: list[StepAccount]) -> str:
    """Say at which step most was dropped, and why."""
    reasons = [
        (documents, f"{step.name}: {reason}") for step in steps for reason, (documents, _) in step.dropped.items()
    ]
    if not reasons:
        return ": the input has no text"
    return ": " + "; ".join(f"{reason} ({count:,})" for count, reason in sorted(reasons, reverse=True)[:5])


def _card(
    config: CurationConfig,
    *,
    steps: list[StepAccount],
    firsts: list[dict[str, Any]],
    groups: dict[str, Counter[str]],
    folder: Path,
) -> dict[str, Any]:
    """Return everything that the data card tells. It holds no times, so that a resumed preparation tells the same."""
    plan = json.loads((folder / "plan" / "plan.json").read_text(encoding="utf-8"))
    copies = json.loads((folder / "accounts" / "groups.json").read_text(encoding="utf-8"))
    told: dict[str, Counter[str]] = {"languages": Counter(), "domains": Counter(), "lengths": Counter()}
    for more in firsts:
        for name, counts in told.items():
            counts.update(more[name])
    return {
        "settings": to_dict(config),
        "files": plan["files"],
        "file_bytes": plan["bytes"],
        "not_listed": plan["skipped"],
        "steps": [{key: value for key, value in vars(step).items() if key != "seconds"} for step in steps],
        "before_copies": {name: dict(counts.most_common()) for name, counts in told.items()},
        "copies": copies,
        "groups": {name: {**counts, "provenance": _provenance(config, counts)} for name, counts in groups.items()},
    }


def _provenance(config: CurationConfig, counts: Counter[str]) -> str:
    return config.inputs[counts["source"]].provenance
