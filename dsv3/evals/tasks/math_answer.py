r"""Whether two answers to a problem of MATH are the same, as text of LaTeX or as mathematics.

said          "... so $\boxed{\dfrac12}$"     \dfrac12
normal form   \frac{1}{2}                     equal texts are equal answers
equivalent    0.5 and \frac{1}{2}             by math-verify
"""

import re

from dsv3.evals.final_answer import final_answer
from dsv3.evals.tasks.comparer import comparer

MINERVA = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")
UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "sue", "points", "feet"),
    *("minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples"),
)
"""Words that Minerva drops from an answer (Lewkowycz et al. 2022, appendix D)."""
DROPPED = (
    *("\\ldots", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}"),
    *("\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
WRAPS = ("text", "textbf", "overline")
COMMAND = re.compile(r"(\\[a-zA-Z]+)")
WHOLE_UNIT = re.compile(rf"(?<!\\)\b(?:{'|'.join(UNITS)})\b")
GLUED_UNIT = re.compile("|".join(UNITS))


def answer_said(text: str) -> str | None:
    """Return the answer in Minerva's closing sentence; without it, that in the last box, or what else ends a text."""
    match = MINERVA.search(text + " I hope it is correct.")
    return match[1].strip() if match is not None else final_answer(text)


def normal_form(answer: str) -> str:
    r"""Return an answer as Minerva compares it: without units, spaces and wrapping, fractions and roots in full.

    As the original rule but for three of its mistakes: '\left' keeps its 'ft', '\sqrt[3]{8}' its index, and '0,1' its
    comma.
    """
    plain = WHOLE_UNIT.sub("", answer.split("=")[-1])
    for old, new in REPLACED:
        plain = plain.replace(old, new)
    plain = "".join(part if COMMAND.fullmatch(part) else GLUED_UNIT.sub("", part) for part in COMMAND.split(plain))
    for dropped in DROPPED:
        plain = plain.replace(dropped, "")
    plain = re.sub(r".*?\$(.*?)\$.*", r"$\1$", plain)
    for wrap in WRAPS:
        plain = re.sub(rf"\\{wrap}\{{(.*?)\}}", r"\1", plain)
    plain = re.sub(r"\\boxed\{(.*)\}", r"\1", plain)
    plain = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", plain)
    plain = re.sub(r"sqrt(\[[^\]]*\])(\w)", r"sqrt\1{\2}", plain)
    plain = re.sub(r"sqrt(?!\[)([^{])", r"sqrt{\1}", plain).replace("$", "")
    return plain.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", plain) else plain


def equivalent(found: str, wanted: str) -> bool:
    """Tell whether two answers have one normal form, or else are the same mathematics.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    return normal_form(found) == normal_form(wanted) or comparer().same(found.strip("$"), wanted.strip("$"))
