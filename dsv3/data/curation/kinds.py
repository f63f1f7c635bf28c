"""What a file is by its name: prose, a web page, code in which language, mathematics, or nothing that is read."""

import re
from dataclasses import dataclass

PROSE, WEB, CODE, MATHS = "prose", "web", "code", "maths"

CODE_ENDINGS = {
    "ada": ".adb .ads",
    "assembly": ".s .asm",
    "awk": ".awk",
    "c": ".c .h",
    "c++": ".cc .cpp .cxx .hh .hpp .hxx",
    "c#": ".cs",
    "clojure": ".clj",
    "cmake": ".cmake",
    "css": ".css .scss .less",
    "cuda": ".cu .cuh",
    "dart": ".dart",
    "elixir": ".ex .exs",
    "erlang": ".erl .hrl",
    "fortran": ".f .f90 .f95",
    "go": ".go",
    "haskell": ".hs",
    "java": ".java",
    "javascript": ".js .jsx .mjs",
    "julia": ".jl",
    "kotlin": ".kt .kts",
    "lisp": ".el .lisp .scm",
    "lua": ".lua",
    "m4": ".m4",
    "make": ".mk .mak",
    "ocaml": ".ml .mli",
    "pascal": ".pas",
    "perl": ".pl .pm",
    "php": ".php",
    "powershell": ".ps1",
    "prolog": ".pro",
    "python": ".py .pyi .pyx",
    "r": ".r",
    "roff": ".1 .2 .3 .4 .5 .6 .7 .8",
    "ruby": ".rb",
    "rust": ".rs",
    "scala": ".scala",
    "shell": ".sh .bash .zsh",
    "sql": ".sql",
    "swift": ".swift",
    "tcl": ".tcl",
    "toml": ".toml",
    "typescript": ".ts .tsx",
    "verilog": ".v .sv",
    "vhdl": ".vhd .vhdl",
    "vim": ".vim",
    "xml": ".xml .xsd .xsl",
    "yaml": ".yaml .yml",
    "zig": ".zig",
}
LANGUAGES = {ending: language for language, endings in CODE_ENDINGS.items() for ending in endings.split()}
LANGUAGES |= {"makefile": "make", "cmakelists.txt": "cmake", "dockerfile": "dockerfile"}
PROSE_ENDINGS = (".txt", ".text", ".md", ".rst", ".adoc", ".org", ".asc", ".info")
NAMED_PROSE = ("readme", "copyright", "changelog", "changes", "news", "authors", "license", "todo")
WEB_ENDINGS = (".html", ".htm", ".xhtml")
RECORD_ENDINGS = (".jsonl", ".ndjson", ".parquet")
WARC_ENDINGS = (".warc", ".wet")
MANUAL = re.compile(r"\.[1-8][a-z]*$")
READABLE = (
    f"{' '.join((*PROSE_ENDINGS, *WEB_ENDINGS, '.tex', *RECORD_ENDINGS, *WARC_ENDINGS))} and code, each also with .gz"
)


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """What a file holds, and how it is read."""

    reader: str
    """'text', 'page', 'lines', 'table', 'archive'."""
    kind: str
    """'prose', 'web', 'code' or 'maths'."""
    language: str = ""
    """Of code, the programming language."""


def kind_of(name: str) -> FileKind | None:
    """Return what a file of this name holds; None where it is of no kind that is read."""
    lowered = name.lower().removesuffix(".gz")
    ending = lowered[lowered.rfind(".") :] if "." in lowered else lowered
    if ending in (".jsonl", ".ndjson"):
        return FileKind(reader="lines", kind=PROSE)
    if ending == ".parquet":
        return FileKind(reader="table", kind=PROSE)
    if ending in WARC_ENDINGS:
        return FileKind(reader="archive", kind=WEB)
    if ending in WEB_ENDINGS:
        return FileKind(reader="page", kind=WEB)
    if lowered in LANGUAGES or ending in LANGUAGES:
        return FileKind(reader="text", kind=CODE, language=LANGUAGES.get(lowered) or LANGUAGES[ending])
    if MANUAL.search(lowered):
        return FileKind(reader="text", kind=CODE, language="roff")
    if ending == ".tex":
        return FileKind(reader="text", kind=MATHS)
    if ending in PROSE_ENDINGS or lowered.startswith(NAMED_PROSE):
        return FileKind(reader="text", kind=PROSE)
    return None
