"""From raw text to a corpus, stage by stage: each a number of tasks that are done once, in any order, anywhere.

    documents    a task for every stretch of files: read, mend, tell languages, mask, judge, decontaminate, sign
    pairs        a task for every band of the signatures
    groups       one task: which documents are copies
    tokenizer    one task: copied, or trained
    shards       a task for every stretch of files: drop copies, encode, write
    finish       one task: the data card, held-out texts, the marker

A task leaves files that appear whole and then a mark that it is done, so a preparation that was killed at any moment
goes on with the same command and ends with the same bytes.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv3.config.curation import CurationConfig
from dsv3.config.files import leaves, to_dict
from dsv3.data.curation.duplicates import bands_of
from dsv3.data.curation.evaluation_items import EvaluationItem, write_tables
from dsv3.data.curation.files import make_plan
from dsv3.data.prepared import MARKER
from dsv3.errors import ConfigError, MissingExtraError
from dsv3.runtime.atomic import write_json
from dsv3.runtime.hold import hold_folder

WORK = "work"
SETTINGS = "settings.json"
FREE_TO_CHANGE = ("recipe",)

ProgressCallback = Callable[[str, int, int], None]
"""Called with the name of a stage, its tasks that are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Tasks that may all run at once, after those of the stage before."""

    name: str
    steps: Callable[[], list[Any]]
    tasks: int
    begins_anew: bool = False
    """What workers still hold of earlier stages is of no use to it and large: new ones take it up on this machine."""


def stages(config: CurationConfig, *, folder: Path, tasks: int) -> list[Stage]:
    """Return what is to be done, in order; `folder` is the work folder, `tasks` the number of stretches of files."""
    from dsv3.data.curation import later_steps
    from dsv3.data.curation.steps import document_steps

    def one(step: type[Any]) -> Callable[[], list[Any]]:
        return lambda: [step(config, folder=folder, tasks=tasks)]

    return [
        Stage(name="documents", steps=lambda: document_steps(config, folder=folder), tasks=tasks),
        Stage(name="pairs", steps=one(later_steps.FindPairs), tasks=bands_of(config.duplicates)),
        Stage(name="groups", steps=one(later_steps.GroupCopies), tasks=1),
        Stage(name="tokenizer", steps=one(later_steps.MakeTokenizer), tasks=1),
        Stage(name="shards", steps=one(later_steps.WriteShards), tasks=tasks, begins_anew=True),
        Stage(name="finish", steps=one(later_steps.Finish), tasks=1),
    ]


def curate(
    config: CurationConfig,
    *,
    output: Path,
    items: Iterable[EvaluationItem] = (),
    workers: int = 1,
    progress: ProgressCallback | None = None,
) -> Path:
    """Prepare a corpus in `output` on this machine, and return the folder; one that is finished stays as it is.

    `items` are what evaluations ask; a document that has one is dropped. Called again after an interruption, with the
    same settings, it goes on.

    Raises:
        ConfigError: no input, or the folder was begun with other settings.
        DataError: an input cannot be found, or nothing is left of it.
        MissingExtraError: datatrove, or what a step needs, is not installed.
    """
    report = progress or _no_progress
    with hold_folder(output, lock=".lock", doing="preparing a corpus", option="--output"):
        tasks = begin(config, output=output, items=items)
        if tasks is None:
            return output
        from dsv3.data.curation.local import LocalExecutor, Workers

        with Workers(workers) as pool:
            for stage in stages(config, folder=output / WORK, tasks=tasks):
                if stage.begins_anew and stage.tasks > workers:  # fewer are done before new workers are there
                    pool.end()
                executor = LocalExecutor(
                    stage.steps(),
                    tasks=stage.tasks,
                    workers=workers,
                    logging_dir=str(output / WORK / "logs" / stage.name),
                )
                executor.run_and_tell(partial(report, stage.name), workers=pool)
        tidy(output)
    return output


def begin(config: CurationConfig, *, output: Path, items: Iterable[EvaluationItem]) -> int | None:
    """Make the work folder, or take it up, and return the number of tasks; None where the corpus is finished.

    Raises:
        ConfigError: no input, or the folder was begun with other settings.
        DataError: an input has no files.
        MissingExtraError: datatrove is not installed.
    """
    _require_engine()
    if not config.inputs:
        raise ConfigError("there is no input; give one with --input [NAME=]PATH, as often as you like")
    check_output(output)
    folder = output / WORK
    begun = folder / SETTINGS
    if begun.is_file() or (output / MARKER).is_file():
        _check_same(config, output=output)
    if (output / MARKER).is_file():
        tidy(output)
        return None
    if not begun.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_tables(items, folder=folder, config=config.contamination)
        write_json(to_dict(config), path=begun)
    return make_plan(config, folder=folder)


def check_output(output: Path) -> None:
    """Raise ConfigError where shards could not be written: they are mapped into memory, so they must be files."""
    if "://" in str(output) or ":/" in str(output):
        raise ConfigError(
            f"--output {output} is no folder; shards are mapped into memory, so write them to a disk that all workers "
            "see, and copy them from there"
        )


def _check_same(config: CurationConfig, *, output: Path) -> None:
    """Raise ConfigError where the folder was begun with other settings, and say which."""
    begun = output / WORK / SETTINGS
    if begun.is_file():
        found = json.loads(begun.read_text(encoding="utf-8"))
    else:
        found = json.loads((output / MARKER).read_text(encoding="utf-8"))["settings"].get("curation")
    if found is None:
        raise ConfigError(f"{output} holds a corpus of `dsv3 prepare`; choose another folder with --output")
    wanted = to_dict(config)
    if found == wanted:
        return
    named = [name for name, _ in leaves(config)]
    changed = [name for name in named if _at(found, name) != _at(wanted, name) and name not in FREE_TO_CHANGE]
    if changed:
        raise ConfigError(
            f"the corpus in {output} was begun with other settings ({', '.join(changed)}); use those, or another "
            "--output, or remove the folder"
        )


def _at(values: dict[str, Any], name: str) -> Any:
    found: Any = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def tidy(output: Path) -> None:
    """Remove what only the stages needed: documents, signatures and pairs; plan, accounts and logs stay."""
    for name in ("documents", "signatures", "pairs", "held_out"):
        shutil.rmtree(output / WORK / name, ignore_errors=True)


def _require_engine() -> None:
    try:
        import datatrove  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(package="datatrove", extra="data", purpose="dsv3 data prepare") from error


def _no_progress(stage: str, done: int, total: int) -> None:
    pass
