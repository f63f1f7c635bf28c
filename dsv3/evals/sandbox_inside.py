"""The inside of the sandbox: a program of its own that imports nothing but the standard library. sandbox.py starts it.

    new namespaces -> an empty root with Python in it, read-only -> limits -> no new processes -> the program -> tests

It is given a job as JSON on stdin, and a pipe for the verdict: what the program prints is kept and proves nothing.
Results that are compared with == are taken for what they hold of Python's own types, so that no object of the program's
own says that it is equal to everything.
"""

import ast
import builtins
import contextlib
import ctypes
import io
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUTS = 0x00020000, 0x08000000, 0x04000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_THREAD = 0x00010000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
ALLOW, ERRNO_EPERM, ERRNO_ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
# (audit architecture, clone, clone3, system calls that are refused)
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 56, 435, (57, 58, 101, 165, 166, 272, 308, 321, 250, 248, 249)),
    "aarch64": (0xC00000B7, 220, 435, (117, 40, 39, 97, 268, 280, 219, 217, 218)),
}
LIBRARIES = ("/usr", "/lib", "/lib64", "/bin")
PLAIN = (type(None), bool, int, float, complex, str, bytes)
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the job, make the walls, and run it behind them."""
    job = json.load(sys.stdin)
    verdict, proof = int(sys.argv.pop()), job.pop("proof")
    user, group = os.getuid(), os.getgid()
    check(
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS), "unshare"
    )
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    inside = os.fork()
    if inside:
        os.close(verdict)
        _, status = os.waitpid(inside, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    make_root(Path(job["root"]), python=job["python"])
    set_limits(job)
    refuse_new_processes()
    output = io.StringIO()
    said = judge(job, output=output) if job["tests"] is not None else run_with_input(job, output=output)
    os.write(
        verdict, json.dumps({"said": said, "proof": proof, "output": output.getvalue()[-job["output"] :]}).encode()
    )
    os._exit(0)


def make_root(root: Path, *, python: list[str]) -> None:
    """Leave the file system for one that holds system libraries and Python, read-only, and a small /tmp."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", str(root), "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    for place in dict.fromkeys([*LIBRARIES, *python]):
        source = Path(place)
        target = root / place.lstrip("/")
        if source.is_symlink() and place in LIBRARIES:
            target.symlink_to(source.readlink())
        elif source.is_dir() and not target.exists():
            target.mkdir(parents=True)
            mount(place, str(target), "", MS_BIND | MS_REC)
            mount("none", str(target), "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for name in ("tmp", "proc", "dev", "old"):
        (root / name).mkdir(exist_ok=True)
    os.chdir(root)
    check(libc.syscall({"x86_64": 155, "aarch64": 41}[platform.machine()], b".", b"old"), "pivot_root")
    os.chdir("/tmp")
    check(libc.umount2(b"/old", MNT_DETACH), "umount2")


def set_limits(job: dict[str, Any]) -> None:
    """Limit memory, CPU time, files and their size."""
    for which, most in (
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, 8 << 20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (most, most))


def refuse_new_processes() -> None:
    """Have the kernel refuse forks, traces and mounts from here on; threads are allowed."""
    architecture, clone, clone3, refused = SYSTEM_CALLS[platform.machine()]

    def step(code: int, yes: int, no: int, value: int) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, has, give = 0x20, 0x15, 0x45, 0x06
    steps = [step(load, 0, 0, 4), step(equal, 1, 0, architecture), step(give, 0, 0, KILL), step(load, 0, 0, 0)]
    for number in refused:
        steps += [step(equal, 0, 1, number), step(give, 0, 0, ERRNO_EPERM)]
    steps += [step(equal, 0, 1, clone3), step(give, 0, 0, ERRNO_ENOSYS)]  # threads then ask by clone
    steps += [
        step(equal, 0, 3, clone),
        step(load, 0, 0, 16),
        step(has, 1, 0, CLONE_THREAD),
        step(give, 0, 0, ERRNO_EPERM),
    ]
    steps += [step(give, 0, 0, ALLOW)]
    code = b"".join(steps)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), "seccomp")


def judge(job: dict[str, Any], *, output: io.StringIO) -> str:
    """Load the program, then run its tests one by one; 'passed' if all of them are."""
    names = vars(builtins)
    own = dict(names)
    scope: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            exec(compile(job["program"], "program", "exec"), scope)
        except BaseException as error:
            return f"the program failed: {type(error).__name__}: {error}"
        names.clear()
        names.update(own)
        scope["__builtins__"] = builtins
        defined: dict[str, Any] = {}
        for test in job["tests"]:
            try:
                run_test(test, scope=scope, defined=defined)
            except BaseException as error:
                return f"failed {test.strip()[:200]!r}: {type(error).__name__}: {error}"
    return "passed"


def run_test(test: str, *, scope: dict[str, Any], defined: dict[str, Any]) -> None:
    """Run a test, its comparisons by == made by us and of plain values alone.

    Functions that it calls around what it asks for, such as `sorted`, are Python's, whatever the program calls so. What
    a test defines is there for those after it.
    """
    tree = ast.parse(test)
    asked = {
        call.func.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and not any(isinstance(one, ast.Call) for part in (*call.args, *call.keywords) for one in ast.walk(part))
    }
    own = {name: value for name, value in scope.items() if name in asked or not hasattr(builtins, name)}
    tree = ast.fix_missing_locations(Compared().visit(tree))
    space = {**own, **defined, "__builtins__": builtins, "__dsv3_same__": same}
    exec(compile(tree, "test", "exec"), space)
    defined.update({name: value for name, value in space.items() if value is not scope.get(name)})


class Compared(ast.NodeTransformer):
    """Turns `a == b` into a call of `same`."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Rewrite a single comparison for equality."""
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq):
            return node
        name = ast.Name(id="__dsv3_same__", ctx=ast.Load())
        return ast.Call(func=name, args=[node.left, node.comparators[0]], keywords=[])


def same(a: object, b: object) -> bool:
    """Tell whether two values are equal; one of the two is the test's own, so both are taken for what they hold."""
    return plain(a) == plain(b)


def plain(value: Any) -> Any:
    """Return a value of Python's own types, whatever class of the program's it is of; such as a Counter for a dict.

    Raises:
        TypeError: it holds something else.
    """
    if type(value) in PLAIN:
        return value
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(plain(one) for one in kind.__iter__(value))
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in dict.items(value)}
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"a {type(value).__name__} was compared, and only plain values are")


def run_with_input(job: dict[str, Any], *, output: io.StringIO) -> str:
    """Run the program on a text as its stdin; 'ended', with what it printed, if nothing went wrong."""
    sys.stdin = io.TextIOWrapper(io.BytesIO(job["stdin"].encode()), encoding="utf-8")
    with contextlib.redirect_stdout(output):
        try:
            exec(compile(job["program"], "program", "exec"), {"__name__": "__main__"})
        except SystemExit as error:
            return "ended" if error.code in (None, 0) else f"the program left with {error.code}"
        except BaseException as error:
            return f"the program failed: {type(error).__name__}: {error}"
    return "ended"


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Call mount(2)."""
    given = [one.encode() for one in (source, target, kind)]
    check(libc.mount(*given, flags, options.encode() or None), f"mount {target}")


def check(result: int, what: str) -> None:
    """Leave with the reason where a system call failed."""
    if result:
        print(f"{what}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(71)


if __name__ == "__main__":
    main()
