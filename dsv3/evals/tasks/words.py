"""Words in capitals and sentences, counted as IFEval's checker does with NLTK, without its data."""

import re

MARK = re.compile(
    r"[][(){}<>;@#$%&?!*\"«»“”‘’„\u2012-\u2015]|--|\.{2,}|`+|[:,](?!\d)|(?<=[^\s'])'(?=\s|$)"
    r"|(?i:(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w))"
)
"""What NLTK parts from the word beside it."""
CONTRACTION = re.compile(r"(?<=[^' ])('[sS]|'[mM]|'[dD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?=\s|$)")
FUSED = re.compile(r"\b(CAN)(NOT)\b|\b(GIM)(ME)\b|\b(GON)(NA)\b|\b(GOT)(TA)\b|\b(LEM)(ME)\b|\b(WAN)(NA)(?=\s)")

END = re.compile(r"[.?!]+[\"'”’)\]*_]*(?=\s+\S)")
INITIAL = re.compile(r"(?:^|[\s(\"“])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z])$")
ABBREVIATIONS = frozenset(
    (
        *("mr", "mrs", "ms", "dr", "prof", "rev", "gen", "sen", "rep", "st", "jr", "sr", "inc", "ltd", "co", "corp"),
        *("vs", "etc", "no", "vol", "fig", "al", "approx", "dept", "est", "u.s", "u.k", "e.g", "i.e", "a.m", "p.m"),
        *("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"),
    )
)


def capital_words(text: str) -> int:
    """Count the words without a small letter: "IT'S" is two, "TOP-10" one, "5" none."""
    spaced = CONTRACTION.sub(r" \1", MARK.sub(r" \g<0> ", text))
    spaced = FUSED.sub(lambda match: " ".join(filter(None, match.groups())), spaced)
    return sum(word.isupper() for word in spaced.split())


def count_sentences(text: str) -> int:
    """Count what ends in '.', '?' or '!' before a space, but for abbreviations and initials, and what is left.

    Lines do not part sentences: a list without full stops is one.
    """
    if not text.strip():
        return 0
    return 1 + sum(ends_sentence(text, match) for match in END.finditer(text))


def ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Tell whether this mark ends a sentence."""
    if match[0].strip("\"'”’)]*_") != ".":
        return True
    before = text[max(0, match.start() - 40) : match.start()]
    word = before.split()[-1].lstrip("(\"'“[*_").lower() if before.strip() else ""
    if word in ABBREVIATIONS or INITIAL.search(before):
        return False
    return not (word.isdigit() and text[match.end() : match.end() + 10].lstrip()[:1].islower())
