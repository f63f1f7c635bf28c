"""The domain of a document, by which the mixture is weighed."""

import re

from dsv3.data.curation.kinds import CODE, MATHS

SYNTHETIC = "synthetic"
ENGLISH, CHINESE, OTHER = "english", "chinese", "other-languages"
CHINESE_LANGUAGES = ("zh", "wuu", "yue")
"""What the model of languages takes Chinese for."""
DOMAINS = (ENGLISH, CHINESE, OTHER, CODE, MATHS, SYNTHETIC)

MATHS_SIGNS = re.compile(
    r"\\(?:frac|sum|int|sqrt|alpha|beta|gamma|delta|theta|lambda|mathbb|mathcal|partial|infty|cdot|leq|geq|begin\{equation)"
    r"|\$[^$\n]{1,80}\$|[∀∃∈∉⊂⊆∑∏∫√∞≤≥≠≈∂∇→⇒⇔±×÷]|(?<![\w.:/-])\d+(?:\.\d+)?\s*[-+*/=^]\s*\d+(?:\.\d+)?(?![\w:/-])"
)
"""TeX's commands and formulas, signs of mathematics, sums of numbers, which dates are not."""
MIN_SIGNS, SIGNS_PER_CHARACTER = 3, 1 / 150


def has_maths(text: str) -> bool:
    """Tell whether a text is full of formulas: one for every 150 characters."""
    seen = text[:20_000]
    wanted = max(MIN_SIGNS, len(seen) * SIGNS_PER_CHARACTER)
    return any(count >= wanted for count, _ in enumerate(MATHS_SIGNS.finditer(seen), start=1))


def domain_of(*, kind: str, language: str, provenance: str, configured: str) -> str:
    """Return the domain: as configured for the input, or by what is known of the document."""
    if configured:
        return configured
    if provenance:
        return SYNTHETIC
    if kind in (CODE, MATHS):
        return kind
    return ENGLISH if language == "en" else CHINESE if language in CHINESE_LANGUAGES else OTHER
