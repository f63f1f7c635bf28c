"""C++ sources to a shared library on the machine at hand: compiled once, kept, found again by what went into it."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dsv3.errors import CompilerError
from dsv3.runtime.log import get_logger

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
"""OpenMP with the threads torch has; this processor's own instructions; errors of sqrt and exp are not looked up."""


def compiled_library(
    name: str, *, sources: Sequence[Path], headers: Sequence[Path] = (), flags: Sequence[str] = FLAGS
) -> Path:
    """Return the shared library made of C++ `sources`, compiled now unless it was before.

    Its file name carries a hash of sources, flags, compiler and processor, so a change of any makes another file, and
    a home folder shared by unlike machines serves all of them. Headers beside the sources count as sources, as do
    `headers` from elsewhere.

    Raises:
        CompilerError: there is no C++ compiler here, it refuses the sources, or the result cannot be kept.
    """
    compiler = find_compiler()
    library = cache_folder() / f"{name}-{_fingerprint([*sources, *headers], compiler=compiler, flags=flags)}.so"
    if not library.exists():
        get_logger(__name__).info("compiling the %s kernels with %s, once: a few seconds", name, compiler.name)
        _compile(sources, compiler=compiler, flags=flags, library=library)
    return library


def find_compiler() -> Path:
    """Return the C++ compiler: what CXX names, else the first of c++, g++ and clang++ on the path."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return Path(found)
    looked = f"CXX = '{wanted}' is not on the path" if wanted else "none of c++, g++ and clang++ is on the path"
    raise CompilerError(f"there is no C++ compiler: {looked}; install one (on Debian: apt install g++)")


def cache_folder() -> Path:
    """Return where compiled libraries are kept: under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3"


def processor() -> str:
    """Return what -march=native depends on: the processor's maker and model, and the instructions it offers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    named = ("vendor_id", "model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


def _compile(sources: Sequence[Path], *, compiler: Path, flags: Sequence[str], library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [str(compiler), *flags, "-o", str(made), *(str(source) for source in sources)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                first = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[:200])
                raise CompilerError(f"{compiler} refused the sources: {first}")
            made.replace(library)  # whole or not at all, however many processes compile at once
    except OSError as error:
        raise CompilerError(f"the compiled kernels cannot be kept in {library.parent}: {error.strerror}") from error


def _fingerprint(sources: Sequence[Path], *, compiler: Path, flags: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((tuple(flags), _version(compiler), processor())).encode())
    headers = sorted({header for source in sources for header in source.parent.glob("*.h")})
    for file in [*sources, *headers]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _version(compiler: Path) -> str:
    run = subprocess.run([str(compiler), "--version"], capture_output=True, text=True, check=False)
    return run.stdout
