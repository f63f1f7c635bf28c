"""Programs in the sandbox: right ones pass, wrong ones fail, hostile ones fail and harm nothing."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from dsv3.errors import ConfigError
from dsv3.evals import sandbox
from dsv3.evals.sandbox import Limits, run_on_input, run_tests, why_no_sandbox
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import code_passes

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ("assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert not add(0, 0)")


@pytest.fixture(autouse=True)
def walls(request):
    if "no_walls" not in request.keywords and (reason := why_no_sandbox()) is not None:
        pytest.skip(reason)


def test_a_right_program_passes_and_says_what_it_printed():
    verdict = run_tests("print('here')\n" + ADD, tests=TESTS)
    assert (verdict.passed, verdict.reason, verdict.output) == (True, "passed", "here\n")


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("def add(a, b):\n    return a - b", "failed 'assert add"),
        ("def add(a, b):\n    return None", "failed 'assert add"),
        ("", "NameError"),
        ("def add(", "SyntaxError"),
        ("raise ValueError('no')", "ValueError: no"),
    ],
)
def test_a_wrong_program_fails_and_says_why(program, told):
    verdict = run_tests(program, tests=TESTS)
    assert not verdict.passed
    assert told in verdict.reason


HOSTILE = {
    "leaves before the tests": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves from within": "import os\ndef add(a, b):\n    os._exit(0)",
    "writes its own verdict": (
        'import os\nfor fd in range(3, 32):\n    try: os.write(fd, b\'{"said": "passed", "output": ""}\')\n'
        "    except OSError: pass\nos._exit(0)"
    ),
    "prints the answer": "print(3)\nprint('passed')",
    "equals everything": (
        "class Yes:\n    def __eq__(self, other): return True\n    def __bool__(self): return False\n"
        "def add(a, b): return Yes()"
    ),
    "is a list that equals everything": (
        "class Yes(list):\n    def __eq__(self, o): return True\ndef add(a, b): return Yes()"
    ),
    "changes builtins": (
        "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\n"
        "builtins.type = lambda x: int\nbuiltins.__import__ = None\ndef add(a, b): return 4"
    ),
    "shadows what tests call": "def add(a, b): return 4\nlen = set = sorted = lambda *a: 3",
    "eats memory": "x = bytearray(10 << 30)",
    "eats memory slowly": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "never ends": "while True: pass",
    "sleeps": "import time\ntime.sleep(60)",
    "forks": "import os\nwhile True: os.fork()",
    "starts processes": "import subprocess\nsubprocess.run(['ls'])\nadd = max",
    "makes many threads": (
        "import threading, time\nfor _ in range(100000): threading.Thread(target=time.sleep, args=(60,)).start()"
    ),
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(1, 9)\nos.kill(-1, 9)",
    "talks to the network": "import socket\nsocket.create_connection(('1.1.1.1', 80), timeout=2)",
    "recurses": "def add(a, b): return add(a, b)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_and_harms_nothing(name):
    started = time.monotonic()
    verdict = run_tests(HOSTILE[name], tests=TESTS, limits=Limits(seconds=2.0, memory=256 << 20))
    assert not verdict.passed
    assert time.monotonic() - started < 8
    assert run_tests(ADD, tests=TESTS).passed


def test_files_outside_are_neither_read_nor_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, Path("/etc/passwd"), Path(__file__), Path.home() / ".bashrc"):
        program = f"text = open({str(path)!r}).read()\ndef add(a, b): return a + b"
        assert "FileNotFoundError" in run_tests(program, tests=TESTS).reason, path
    for path in ("/usr/bin/x", "/usr/lib/x.so", str(Path(os.__file__).with_name("x.py"))):
        program = f"open({path!r}, 'w').write('x')\ndef add(a, b): return a + b"
        assert "Read-only file system" in run_tests(program, tests=TESTS).reason, path
    program = f"import os\nos.makedirs({str(tmp_path)!r}, exist_ok=True)\nopen({str(secret)!r}, 'w').write('x')\n" + ADD
    run_tests(program, tests=TESTS)
    assert secret.read_text() == "secret"


def test_a_program_may_use_the_standard_library_a_folder_and_threads():
    program = (
        "import math, re, json, collections, itertools, threading, tempfile\n"
        "with tempfile.TemporaryFile() as f: f.write(b'x')\n"
        "t = threading.Thread(target=print)\nt.start(); t.join()\n" + ADD
    )
    assert run_tests(program, tests=TESTS).passed


def test_programs_that_read_and_print():
    assert (
        run_on_input("n = int(input())\nprint(sum(map(int, input().split())), n)", stdin="2\n3 4\n").output == "7 2\n"
    )
    assert not run_on_input("raise SystemExit(1)", stdin="").passed
    assert run_on_input("import sys\nprint(len(sys.stdin.read()))\nsys.exit(0)", stdin="abc").passed


def test_the_program_of_an_answer_is_found():
    problem = Problem(messages=({"role": "user", "content": "add"},), tests=TESTS)
    assert code_passes(problem, f"<think>so</think>Here:\n```python\n{ADD}```\nDone.") == 1
    assert code_passes(problem, ADD) == 1
    assert code_passes(problem, "```python\npass\n```") == 0
    assert code_passes(Problem(messages=problem.messages), ADD) == 0


def records_of(file: Path) -> list[dict]:
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_reference_solutions_pass_and_empty_ones_fail(shared_data):
    """Some of them here; all of them with -m slow."""
    check_humaneval(shared_data, step=12)
    check_mbpp(shared_data, step=60)


@pytest.mark.slow
def test_all_reference_solutions_pass_and_all_empty_ones_fail(shared_data):
    check_humaneval(shared_data, step=1)
    check_mbpp(shared_data, step=1)


def check_humaneval(shared_data, *, step):
    for record in records_of(shared_data / "humaneval" / "HumanEval.jsonl.gz")[::step]:
        tests = (record["test"] + f"\ncheck({record['entry_point']})",)
        verdict = run_tests(record["prompt"] + record["canonical_solution"], tests=tests)
        assert verdict.passed, (record["task_id"], verdict.reason)
        assert not run_tests(record["prompt"] + "    return None\n", tests=tests).passed, record["task_id"]


def check_mbpp(shared_data, *, step):
    for record in records_of(shared_data / "mbpp" / "mbpp.jsonl.gz")[::step]:
        tests = tuple(filter(None, [record.get("test_setup_code"), *record["test_list"]]))
        verdict = run_tests(record["code"], tests=tests)
        assert verdict.passed, (record["task_id"], verdict.reason)
        name = record["test_list"][0].split("(")[1 if record["test_list"][0].startswith("assert(") else 0].split()[-1]
        assert not run_tests(f"def {name}(*a): return None", tests=tests).passed, (record["task_id"], name)


@pytest.mark.no_walls
def test_without_walls_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "why_no_sandbox", lambda: "there are no namespaces")
    with pytest.raises(ConfigError, match="without harm: there are no namespaces"):
        run_tests(ADD, tests=TESTS)
