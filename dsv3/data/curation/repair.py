"""Mending of text: encodings that were mistaken on the way, control characters, line ends. Nothing is made uniform."""

import re

CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufffe\uffff]")
ESCAPES = re.compile("\x1b\\[[0-9;?]*[A-Za-z]|.\x08")
"""What a terminal obeys: colours, and a letter struck twice to be bold."""
SUSPECT = re.compile(
    "[\u0080-\u009f]|[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u017e\u2013-\u2122\u20ac]|&(?:[a-z]{2,8}|#\\d{2,5});"
)
"""Signs of UTF-8 that was read as Latin-1 or Windows-1252, and of HTML."""
BLANK_LINES = re.compile("\n{4,}")
TRAILING = re.compile("[ \t\u3000]+$", re.MULTILINE)


def repair(text: str, *, is_code: bool) -> str:
    """Return a text as it was meant.

    Code keeps its spaces and entities; in prose, spaces before a line's end go and more than two empty lines become
    two. Letters are not composed and signs not changed, so that a model knows them all.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\ufeff", "")
    if "\x1b" in text or "\x08" in text:
        text = ESCAPES.sub("", text)
    if not is_code and not text.isascii() and SUSPECT.search(text):
        text = _as_meant(text)
    text = CONTROLS.sub("", text)
    if not is_code:
        if any(f"{space}\n" in text for space in " \t\u3000"):
            text = TRAILING.sub("", text)
        if "\n\n\n\n" in text:
            text = BLANK_LINES.sub("\n\n\n", text)
        text = text.rstrip()
    return text.strip("\n")


def _as_meant(text: str) -> str:
    """Return a text whose encoding was mistaken with the mistake undone; lines without one stay as they are."""
    try:
        import ftfy
    except ImportError:  # Of the extra `data`; what `dsv3 prepare` reads is mended without, but for this.
        return text
    settings = ftfy.TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        normalization=None,
    )
    lines = text.split("\n")
    return "\n".join(ftfy.fix_text(line, settings) if SUSPECT.search(line) else line for line in lines)
