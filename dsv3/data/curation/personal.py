"""Personal data and secrets, masked where a rule can tell them: the text stays readable, and says what was there."""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

from dsv3.config.curation import PersonalConfig

EMAIL = re.compile(r"[A-Za-z0-9](?<![\w.+%/:-].)[\w.+%-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,18}(?![\w@])")
EXAMPLES = re.compile(r"@(?:[\w-]+\.)*(?:example|localhost|invalid|test)(?:\.\w+)?$", re.IGNORECASE)
"""Domains that nobody owns."""
# What may not stand before a match is looked at after its first letter: an expression that begins with a letter or a
# class of them is found ten times as fast as one that begins with a look behind.
IPV4 = re.compile(r"\d(?<![\w.-]\d)\d{0,2}(?:\.\d{1,3}){3}(?![\w-]|\.\d|/\d)")
IPV6 = re.compile(r"[0-9a-fA-F](?<![\w:.].)[0-9a-fA-F]{0,3}(?::[0-9a-fA-F]{1,4}){7}(?![\w:.])")
PHONES = (
    re.compile(r"\+(?<![\w.+/-]\+)\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){2,4}(?![\w-])"),
    re.compile(r"\((?<![\w.+/-]\()\d{3}\) ?\d{3}-\d{4}(?![\w-])"),
    re.compile(r"1(?<![\w.+/-]1)[3-9]\d-\d{4}-\d{4}(?![\w-])"),
)
"""With a country's code, as in America, as in China."""
CARD = re.compile(r"\d(?<![\w.-]\d)(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
IBAN = re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
SECRET_MARKS = ("AKIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "sk-", "xox")
"""A text without any has no token; looking for these is a hundred times as fast."""
SECRET = re.compile(
    r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----[A-Za-z0-9+/=\s]{64,8000}?-----END (?:[A-Z]+ )?PRIVATE KEY-----"
    r"|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bsk-[A-Za-z0-9]{32,64}\b|\bxox[abpr]-[A-Za-z0-9-]{20,80}\b"
)


def mask(text: str, *, config: PersonalConfig) -> tuple[str, Counter[str]]:
    """Return a text with what is personal replaced by its kind, `<EMAIL>`, and how many of each kind there were."""
    found: Counter[str] = Counter()
    if config.secrets and ("PRIVATE KEY" in text or any(mark in text for mark in SECRET_MARKS)):
        text = _replace(SECRET, text, kind="SECRET", found=found)
    if config.emails and "@" in text:
        text = _replace(EMAIL, text, kind="EMAIL", found=found, accept=lambda match: not EXAMPLES.search(match))
    if config.addresses:
        if text.count(".") >= 3:
            text = _replace(IPV4, text, kind="IP", found=found, accept=is_public)
        if text.count(":") >= 7:
            text = _replace(IPV6, text, kind="IP", found=found, accept=is_public)
    if config.cards:
        text = _replace(CARD, text, kind="CARD", found=found, accept=is_card)
        text = _replace(IBAN, text, kind="IBAN", found=found, accept=is_iban)
    if config.phones:
        for pattern in PHONES:
            text = _replace(pattern, text, kind="PHONE", found=found)
    return text, found


def _replace(
    pattern: re.Pattern[str],
    text: str,
    *,
    kind: str,
    found: Counter[str],
    accept: Callable[[str], bool] | None = None,
) -> str:
    def replaced(match: re.Match[str]) -> str:
        if accept is not None and not accept(match[0]):
            return match[0]
        found[kind] += 1
        return f"<{kind}>"

    return pattern.sub(replaced, text)


def is_public(address: str) -> bool:
    """Tell whether an IP address can be somebody's: not one of a private net, of documentation, or malformed."""
    try:
        # Versions of programs look like addresses too; those end in 0 as often as not, and no machine does.
        return ipaddress.ip_address(address).is_global and not address.endswith(".0")
    except ValueError:
        return False


def is_card(number: str) -> bool:
    """Tell whether a number has a card's first digit, and its last digit is right (Luhn's sum)."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    if digits[0] not in (3, 4, 5, 6) or len(set(digits)) < 2:
        return False
    doubled = (sum(divmod(2 * digit, 10)) if place % 2 else digit for place, digit in enumerate(reversed(digits)))
    return sum(doubled) % 10 == 0


def is_iban(number: str) -> bool:
    """Tell whether the two check digits of an account's number are right (ISO 13616)."""
    packed = number.replace(" ", "")
    if not 15 <= len(packed) <= 34:
        return False
    moved = packed[4:] + packed[:4]
    return int("".join(str(int(sign, 36)) for sign in moved)) % 97 == 1
