"""The tutorials of docs/tutorials/ do what they say: their blocks run as they stand and print what they show."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dsv3.cli.main import VERBS

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tutorials"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANYTHING = "…"
TIMEOUT_SECONDS = 400
COMMANDS = {"dsv3": "-m dsv3.cli.main", "python": "", "torchrun": "-m torch.distributed.run"}


@dataclass
class Block:
    """What is run, and lines that its output must have, in this order."""

    language: str
    content: str
    shown: list[str] = field(default_factory=list)


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    for language, content in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "text":
            found[-1].shown += content.splitlines()
        else:
            assert language in ("bash", "python"), f"{page.name} has a block in {language!r}, which nobody runs"
            found.append(Block(language=language, content=content))
    return found


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder; beside it the commands of this checkout."""
    folder = tmp_path_factory.mktemp("tutorials")
    (folder / "bin").mkdir()
    for name, options in COMMANDS.items():
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {options} "$@"\n')
        command.chmod(0o755)
    (folder / "work").mkdir()
    return folder


@pytest.fixture(scope="module")
def trained(workshop: Path) -> Path:
    """The folder that the first page leaves, from which the others go on."""
    return run_page("train-your-own", workshop=workshop)


def run_page(name: str, *, workshop: Path) -> Path:
    """Run the blocks of a page in one shell, and hold their output against what the page shows."""
    blocks, work = blocks_of(PAGES / f"{name}.md"), workshop / "work"
    pages = workshop / name
    pages.mkdir()
    status, complaints = run_script(script_of(blocks, folder=pages), work=work, commands=workshop / "bin")
    outputs = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(pages.glob("*.out"))]
    last = outputs[-1][-3000:] if outputs else ""
    assert status == 0, f"block {len(outputs)} of {name}.md ended with {status}:\n{last}\n{complaints}"
    for number, (block, output) in enumerate(zip(blocks, outputs, strict=True), start=1):
        missing = first_missing(block.shown, output=output)
        assert missing is None, f"block {number} of {name}.md does not print {missing!r} but\n{output[-3000:]}"
    return work


def script_of(blocks: list[Block], *, folder: Path) -> str:
    """Return a script that runs the blocks one after the other, the output of each to a file of its own."""
    lines = ["set -e -o pipefail"]
    for number, block in enumerate(blocks, start=1):
        content = block.content
        if block.language == "python":
            file = folder / f"{number:02}.py"
            file.write_text(content, encoding="utf-8")
            content = f"python {shlex.quote(str(file))}\n"
        lines.append(f"{{\n{content}}} > {shlex.quote(str(folder / f'{number:02}.out'))} 2>&1")
    return "\n".join(lines)


def run_script(script: str, *, work: Path, commands: Path) -> tuple[int, str]:
    # A wide terminal, so that no line of the log is broken where a page shows it whole.
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PORT": str(free_port())}
    with subprocess.Popen(
        ["bash", "-c", script], cwd=work, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as shell:
        try:
            return shell.wait(TIMEOUT_SECONDS), shell.stderr.read() if shell.stderr else ""
        finally:
            end_group(shell.pid)  # a server that a block has left behind


def end_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_missing(shown: list[str], *, output: str) -> str | None:
    """Return the first line shown that the output does not have behind the one before it."""
    lines = iter([" ".join(line.split()) for line in output.splitlines()])
    for line in shown:
        parts = [re.escape(" ".join(part.split())) for part in line.split(ANYTHING)]
        pattern = re.compile(r"\s*.*\s*".join(parts))
        if not any(pattern.fullmatch(found) for found in lines):
            return line
    return None


def commands_in(page: Path) -> list[str]:
    """Return the verbs of all commands that a page names, those in its sentences too."""
    return re.findall(r"(?:^|`|-- )dsv3 ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_a_line_that_is_shown_and_not_printed_is_found():
    output = "a 12 b\n  the   end\n"
    assert first_missing(["a … b", "the end"], output=output) is None
    assert first_missing(["the end", "a … b"], output=output) == "a … b"
    assert first_missing(["a 12"], output=output) == "a 12"


def test_a_block_that_fails_fails_its_page(tmp_path, workshop):
    status, _ = run_script("set -e\n{\nfalse\n} > out 2>&1\ntrue", work=tmp_path, commands=workshop / "bin")
    assert status == 1


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorial_has_blocks_that_run_and_names_verbs_that_there_are(page):
    assert sum(bool(block.shown) for block in blocks_of(page)) >= 2
    assert set(commands_in(page)) <= set(VERBS)


def test_there_is_a_test_for_every_tutorial():
    assert {page.stem for page in PAGES.glob("*.md")} == {"train-your-own", *AFTER_THE_FIRST}


def test_train_your_own(trained):
    assert (trained / "runs" / "first" / "report.html").stat().st_size > 10_000


def test_grpo_with_your_own_reward(trained, workshop):
    run_page("grpo-your-own-reward", workshop=workshop)


@pytest.mark.slow
def test_serve_and_plan_a_deployment(trained, workshop):
    run_page("serve-and-plan", workshop=workshop)
    assert (trained / "day.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_fine_tune_and_distil(trained, workshop):
    run_page("fine-tune-and-distil", workshop=workshop)


@pytest.mark.slow
def test_go_to_a_cluster(trained, workshop):
    run_page("go-to-a-cluster", workshop=workshop)


AFTER_THE_FIRST = {"fine-tune-and-distil", "grpo-your-own-reward", "serve-and-plan", "go-to-a-cluster"}
