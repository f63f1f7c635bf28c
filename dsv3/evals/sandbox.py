"""Programs that models write, run where they can do no harm: no network, files or processes, little memory and time.

Walls are the kernel's: namespaces for users, processes, mounts and networks, an empty root, limits, and a filter of
system calls. Where the kernel does not grant them nothing is run at all.
"""

import contextlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dsv3.errors import ConfigError

INSIDE = Path(__file__).with_name("sandbox_inside.py")
WALL_FAILED = 71
OUTPUT_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """On the clock; CPU time is limited to as much."""
    memory: int = 512 << 20
    """Bytes of address space."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a program."""

    passed: bool
    """Whether it passed its tests; without tests, whether it ended well."""
    reason: str
    output: str
    """The end of what it printed."""


def run_tests(program: str, *, tests: tuple[str, ...], limits: Limits | None = None) -> Verdict:
    """Load a program and run assertions that use what it defines, such as "assert add(1, 2) == 3".

    Raises:
        ConfigError: there is no sandbox here.
    """
    return _run(program, tests=list(tests), stdin="", limits=limits or Limits())


def run_on_input(program: str, *, stdin: str, limits: Limits | None = None) -> Verdict:
    """Run a program that reads its input and prints its output. Raises as `run_tests`."""
    return _run(program, tests=None, stdin=stdin, limits=limits or Limits())


def program_in(answer: str) -> str:
    """Return the program in an answer: its last fenced block, else all of it; a thought before </think> is none."""
    said = answer.rsplit("</think>", 1)[-1]
    parts = said.split("```")
    return parts[-2].removeprefix("python").removeprefix("py") if len(parts) >= 3 else said


@cache
def why_no_sandbox() -> str | None:
    """Return why nothing can be run here, or None."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return (
            f"the walls are those of Linux on x86-64 or 64-bit Arm, and this is {sys.platform} on {platform.machine()}"
        )
    try:
        found = _start("x = 1", tests=["assert x == 1"], stdin="", limits=Limits())
    except OSError as error:
        return f"it cannot be started ({error})"
    if isinstance(found, str):
        return found
    return None if found.passed else found.reason


def _run(program: str, *, tests: list[str] | None, stdin: str, limits: Limits) -> Verdict:
    if (reason := why_no_sandbox()) is not None:
        raise ConfigError(
            f"programs cannot be run here without harm: {reason}. It takes Linux with user namespaces "
            "(sysctl kernel.unprivileged_userns_clone=1, or a container that allows them)"
        )
    found = _start(program, tests=tests, stdin=stdin, limits=limits)
    return found if isinstance(found, Verdict) else Verdict(passed=False, reason=found, output="")


def _start(program: str, *, tests: list[str] | None, stdin: str, limits: Limits) -> Verdict | str:
    """Return the verdict, or why the walls could not be made."""
    reading, writing = os.pipe()
    proof = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="dsv3-sandbox-") as root, os.fdopen(reading, "rb") as verdict:
        job = {
            "program": program,
            "tests": tests,
            "stdin": stdin,
            "root": root,
            "python": _python_folders(),
            "memory": limits.memory,
            "cpu_seconds": max(1, round(limits.seconds)),
            "output": OUTPUT_BYTES,
            "proof": proof,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(INSIDE), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
            start_new_session=True,
            env={},
        )
        os.close(writing)
        try:
            _, errors = process.communicate(json.dumps(job).encode(), timeout=limits.seconds + 2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Verdict(passed=False, reason=f"it took more than {limits.seconds:g} seconds", output="")
        if process.returncode == WALL_FAILED:
            return errors.decode(errors="replace").strip() or "the walls could not be made"
        try:
            said = json.loads(verdict.read())
        except ValueError:
            return Verdict(passed=False, reason="it ended before its tests did", output="")
        if not isinstance(said, dict) or said.get("proof") != proof:
            return Verdict(passed=False, reason="it wrote a verdict of its own", output="")
        passed = said["said"] in ("passed", "ended")
        return Verdict(passed=passed, reason=said["said"], output=said["output"])


def _python_folders() -> list[str]:
    """Return what Python itself needs to see of the file system: its prefix, and not our packages."""
    return sorted({sys.base_prefix, sysconfig.get_paths()["stdlib"]})
