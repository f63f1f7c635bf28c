"""The page of all reproductions, written from what was really run: pictures, verdicts, machine, time, commit."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.config.files import read_json
from dsv3.errors import ConfigError
from dsv3.reproduce.catalogue import EXPERIMENTS
from dsv3.reproduce.experiment import Experiment
from dsv3.reproduce.record import RESULT, read_record
from dsv3.reproduce.running import duration
from dsv3.runtime.atomic import whole_file

LARGEST_PICTURE = 100_000
"""Bytes: the pictures are kept with the code."""
INTRODUCTION = """\
# The report's tables and figures, in small

Written by `dsv3 reproduce --page docs/reproduction.md` from what was run; nothing here is typed by hand. Each section
is one command, which trains or counts on a CPU core what the report did on thousands of GPUs, and holds what came
out against what the report says. A small model can show which of two is better, seldom by how much; where it shows the
opposite, or nothing, that stands here too. `--scale full` writes the settings and the launch command for a cluster
instead; none of these has been run.

- **same sign**: as the report has it, in every seed. **other sign**: against it, in every seed. **within the
  spread**: seeds disagree, so nothing was seen.
- **agrees**, **differs**: a number or a bound, within the tolerance of the experiment.
- `±` is the standard error over seeds, whose runs differ in initial weights, rows and tokenizer. Both sides of a
  comparison have the same of each.
"""


def write_page(page: Path, *, root: Path) -> list[str]:
    """Write the page from the experiments finished in `root` and those kept beside the page; return their names.

    Records and pictures lie in a folder named as the page, so that one experiment can be made again by itself.

    Raises:
        ConfigError: a picture is too large to be kept.
    """
    kept = page.with_suffix("")
    kept.mkdir(parents=True, exist_ok=True)
    for name in EXPERIMENTS:
        record = read_record(root / name)
        if record is not None:
            _keep(record, folder=root / name, kept=kept)
    records = {name: read_json(kept / f"{name}.json") for name in EXPERIMENTS if (kept / f"{name}.json").is_file()}
    with whole_file(page) as file:
        file.write(page_text(records, pictures=kept.name).encode())
    return list(records)


def page_text(records: Mapping[str, Mapping[str, Any]], *, pictures: str) -> str:
    """Return the page in Markdown; `pictures` is where they lie, as seen from it."""
    parts = [INTRODUCTION, _overview(records)]
    for name, experiment in EXPERIMENTS.items():
        section = _section(records[name], pictures=pictures) if name in records else _not_run(experiment)
        parts.append(f"## {experiment.title}\n\n{section}")
    return "\n".join(parts)


def _keep(record: Mapping[str, Any], *, folder: Path, kept: Path) -> None:
    for picture in record["pictures"]:
        source = folder / picture["file"]
        if source.stat().st_size > LARGEST_PICTURE:
            raise ConfigError(f"{source} has {source.stat().st_size:,} bytes; a page keeps {LARGEST_PICTURE:,} at most")
        shutil.copyfile(source, kept / picture["file"])
    shutil.copyfile(folder / RESULT, kept / f"{record['name']}.json")


def _overview(records: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| experiment | report | verdicts | took |", "|---|---|---|---|"]
    for name, experiment in EXPERIMENTS.items():
        link = f"[{name}](#{anchor(experiment.title)})"
        if name not in records:
            lines.append(f"| {link} | {experiment.source} | not run | |")
            continue
        record = records[name]
        lines.append(f"| {link} | {record['source']} | {_counts(record['findings'])} | {duration(record['seconds'])} |")
    return "\n".join([*lines, ""])


def _counts(findings: Sequence[Mapping[str, Any]]) -> str:
    verdicts = [finding["verdict"] for finding in findings]
    return ", ".join(f"{verdicts.count(one)} {one}" for one in dict.fromkeys(verdicts))


def _section(record: Mapping[str, Any], *, pictures: str) -> str:
    lines = [f"{record['source']}. `{record['command']}`", "", record["how"], ""]
    for picture in record["pictures"]:
        lines += [f"![{picture['caption']}]({pictures}/{picture['file']})", "", f"*{picture['caption']}*", ""]
    lines += ["| what | report | seen here | verdict |", "|---|---|---|---|"]
    lines += [
        f"| {_cell(finding['claim'])} | {_cell(finding['report'])} | {_cell(finding['seen'])} | {finding['verdict']} |"
        for finding in record["findings"]
    ]
    lines.append("")
    if record["remark"]:
        lines += [record["remark"], ""]
    lines += [_circumstances(record), ""]
    return "\n".join(lines)


def _circumstances(record: Mapping[str, Any]) -> str:
    said = [
        record["machine"],
        duration(record["seconds"]),
        record["date"],
        f"commit {record['commit']}",
        f"torch {record['versions']['torch']}",
    ]
    if record["seeds"]:
        said.append(f"{len(record['seeds'])} seed{'s' if len(record['seeds']) > 1 else ''}")
    if record["tokens"]:
        said.append(f"{record['tokens']:,} tokens a run")
    return f"<sub>{'; '.join(said)}.</sub>"


def _not_run(experiment: Experiment) -> str:
    return (
        f"{experiment.source}. {experiment.how}\n\nNot run for this page. It takes about {experiment.minutes:g} "
        f"minutes on one core: `{experiment.command}`\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def anchor(title: str) -> str:
    """Return the name that a heading gets in a rendered page."""
    kept = "".join(one for one in title.lower() if one.isalnum() or one in " -_")
    return kept.replace(" ", "-")
