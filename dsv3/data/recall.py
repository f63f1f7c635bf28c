"""Documents that cannot be continued without looking back: `builtin://recall`, `builtin://facts`, `builtin://cycles`.

Documents of recall are real text with statements between its lines, each of which is made once more further down: after
its first words, the rest of it can only be known from where it stood before. The distances are even on a scale of
octaves for one half, from the line above to most of the document, and even over the rest of the document for the other,
since a needle may lie anywhere; the lengths of the documents are octaves too, so that rows of any length hold something
to look for. A small model learns from easier documents first: to look back at all from lists of words that go round
and round, and to look for what a name tells apart from facts that are stated again and again. Ours; the report does not
say what its long context was trained on.

Three of five statements are of the forms that `dsv3 eval needle` hides and asks for, with names, words and numbers
drawn at random.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random

from dsv3.data.chance import falls_below, hash_text
from dsv3.data.document import Document

SHORTEST = 400
"""Characters of the shortest documents, a hundred tokens or so."""
OCTAVES = 8
"""Lengths of documents, each twice the one before."""
CHARACTERS_OF_AN_OCTAVE = 800_000
CHARACTERS_OF_THE_LONGEST = 4_000_000
"""Of the last two octaves each: of all documents of recall only these fill the rows of an extension's last phase."""
MAYBE_HELD_OUT = 0.1
"""Text whose hash falls below this may be held out of its own source, and is left out here: a rate of a tenth or less
never trains on what it holds out."""
CYCLES = 18_000
CYCLE_CHARACTERS = 600
"""Of a document of cycles, or so."""
CYCLE_WORDS = (3, 8)
"""Words of a cycle, at least and at most."""
NUMBER_SHARE = 0.1
"""Of the words of a cycle, so many are numbers instead; a number is several tokens."""
COMMON_WORDS = 250
"""So many words are common: those of half of all cycles. Looking back is learned from them first."""
FAMILIAR_WORDS = 2500
"""So many are those that texts are about, most of them one token. A model learns to say a word again by having said it,
and of all words, each as often as the others, it would see each of these a few times only."""
FACTS = 24_000
FACT_CHARACTERS = 600
"""Of a document of facts, or so."""
FACTS_OF_A_DOCUMENT = {0.0: 4, 0.3: 4, 0.6: 3, 0.8: 2}
"""By the share of its lines that are lines of the text: so many at most, or a row would not have them twice."""
TEXT_WORDS = 12
"""Of each of these lines, so many words at most: a row of a hundred tokens must have place for facts as well."""
NEAREST = 60
"""Characters from a statement to the next time that it is made, at least."""
NEW_SHARES = (0.1, 0.4, 0.7)
"""Of the lines of a document that repeat nothing, so many state something; the others are lines of the text."""
LIST_SHARE, FACT_SHARE = 0.2, 0.6
"""Of the statements, so many are no sentence but a list of words, where nothing but memory helps, and so many are facts
as `facts` has them; the others are sentences of other forms."""
FAR_SHARE = 0.5
"""Of what is stated again, so much at a distance that is even over the rest of the document."""
AGAIN_SHARE = 0.75
"""So many statements are made once more, after each time."""
PATTERNS = (
    "The {0} {1} of {2} is {3}.",
    "The {1} of {2} is {3}.",
    "The {0} of the {1} {2} is {3}.",
    "{2} keeps the {0} {1} {3}.",
    "The {1} that {2} gave to the {0} was {3}.",
    "In {2} the {0} {1} is called {3}.",
)
"""Words and names of the text stand for all but the last place."""


@dataclass(frozen=True, kw_only=True)
class _Words:
    """What statements are made of."""

    common: list[str]
    familiar: list[str]
    all: list[str]
    """In lower case, the common and the familiar ones too; each once."""
    names: list[str]
    """Words that begin with a capital letter where no line begins."""

    @classmethod
    def of(cls, lines: list[str]) -> "_Words":
        """Return those of lines."""
        counts = Counter(word for line in lines for word in line.split() if word.isalpha() and word.islower())
        names = {word for line in lines for word in line.split()[1:] if word.isalpha() and word.istitle()}
        ranked = [word for word, _ in counts.most_common()]
        return cls(
            common=ranked[:COMMON_WORDS], familiar=ranked[:FAMILIAR_WORDS], all=sorted(counts), names=sorted(names)
        )


def cycle_documents(text: Sequence[str], *, seed: int = 0) -> Iterator[Document]:
    """Yield documents that are each one list of words and numbers, said again and again."""
    lines = _lines(text)
    words = _Words.of(lines)
    for number in range(CYCLES):
        random = Random(f"{seed} cycle {number}")
        cycle = random.sample(random.choice((words.common, words.familiar)), random.randint(*CYCLE_WORDS))
        for place in range(len(cycle)):
            if random.random() < NUMBER_SHARE:
                cycle[place] = str(random.randrange(10 ** random.randint(1, 6)))
        times = 1 + CYCLE_CHARACTERS // len(" ".join(cycle))
        yield Document(name=f"cycle#{number}", text=" ".join(cycle * times))


def fact_documents(text: Sequence[str], *, seed: int = 0) -> Iterator[Document]:
    """Yield short documents that state a few facts again and again, in any order, with lines of the text between.

    Nothing but a name tells facts of a form apart, and two of three documents have one form only: to look back for the
    last place that began so finds the wrong one. A row that has half a document has most facts twice.
    """
    lines = _lines(text)
    words = _Words.of(lines)
    for number in range(FACTS):
        random = Random(f"{seed} facts {number}")
        text_share, most = random.choice(list(FACTS_OF_A_DOCUMENT.items()))
        known: dict[str, str] = {}
        forms = random.choice((FACT_FORMS, *((form,) for form in FACT_FORMS)))
        for _ in range(random.randint(2, most)):
            beginning, line = random.choice(forms)(random, words)
            known.setdefault(beginning, line)
        facts = list(known.values())
        at, written = random.randrange(len(lines)), 0
        told: list[str] = []
        while written < FACT_CHARACTERS:
            if random.random() < text_share:
                told.append(" ".join(lines[at % len(lines)].split()[:TEXT_WORDS]))
                at += 1
            else:
                told.append(random.choice(facts))
            written += len(told[-1]) + 1
        yield Document(name=f"facts#{number}", text="\n".join(told))


def recall_documents(text: Sequence[str], *, seed: int = 0) -> Iterator[Document]:
    """Yield documents whose lines are those of `text`, statements between them; the shortest documents come first."""
    lines = _lines(text)
    words = _Words.of(lines)
    for octave in range(OCTAVES):
        characters = SHORTEST * 2**octave
        all_characters = CHARACTERS_OF_THE_LONGEST if octave >= OCTAVES - 2 else CHARACTERS_OF_AN_OCTAVE
        for number in range(all_characters // characters):
            random = Random(f"{seed} {octave} {number}")
            text_lines = _recalling(random, lines=lines, words=words, characters=characters)
            yield Document(name=f"recall#{characters}-{number}", text="\n".join(text_lines))


def _lines(text: Sequence[str]) -> list[str]:
    """Return the lines of some words, of text that is held out nowhere."""
    spared = [document for document in text if not falls_below(hash_text(document), rate=MAYBE_HELD_OUT)]
    return [line.strip() for document in spared for line in document.splitlines() if len(line.split()) > 2]


def _recalling(random: Random, *, lines: list[str], words: _Words, characters: int) -> Iterator[str]:
    """Yield the lines of one document."""
    # A few words and names for each document, so that many statements begin alike and differ in one place.
    few_words = [*random.sample(words.familiar, 12), *random.sample(words.all, 12)]
    few_names = random.sample(words.names, 6)
    random.shuffle(few_words)
    new_share = random.choice(NEW_SHARES)
    at = random.randrange(len(lines))
    due: list[tuple[int, str]] = []  # by the character at which they are to be made again
    written = 0
    stated: set[str] = set()
    while written < characters:
        again = 1.0
        if due and due[0][0] <= written:
            line, again = heappop(due)[1], AGAIN_SHARE
        elif random.random() < new_share:
            kind = random.random()
            if kind < LIST_SHARE:
                beginning = line = " ".join(random.choice(few_words) for _ in range(random.randrange(3, 13)))
            elif kind < LIST_SHARE + FACT_SHARE:
                beginning, line = random.choice(FACT_FORMS)(random, words)
            else:
                beginning, line = _statement(random, words=few_words[:12], names=few_names)
            if beginning in stated:
                continue
            stated.add(beginning)
        else:
            line, again = lines[at % len(lines)], 0.0
            at += 1
        if random.random() < again:
            if random.random() < FAR_SHARE:
                distance = random.uniform(NEAREST, max(NEAREST, characters - written))
            else:
                distance = NEAREST * (characters / NEAREST) ** random.random()
            heappush(due, (written + round(distance), line))
        yield line
        written += len(line) + 1


def _statement(random: Random, *, words: list[str], names: list[str]) -> tuple[str, str]:
    """Return the first words of a statement, and the whole of it."""
    value = random.choice(VALUES)(random, words)
    thing, other, name = random.choice(words), random.choice(words), random.choice(names)
    pattern = random.choice(PATTERNS)
    line = pattern.format(thing, other, name, value)
    return line.removesuffix(f"{value}."), line


def _number(random: Random, words: Sequence[str]) -> str:  # noqa: ARG001
    return str(random.randrange(10 ** random.randrange(2, 6), 10**6))


def _words(random: Random, words: Sequence[str]) -> str:
    return " ".join(random.choice(words) for _ in range(random.randrange(1, 5)))


VALUES: tuple[Callable[[Random, Sequence[str]], str], ...] = (_number, _number, _words)


def _secret(random: Random, words: _Words) -> tuple[str, str]:
    # Words as names too: those of the texts end in few ways, and the end of a name is what stands nearest to " is". Not
    # any word: a third of all words share twenty ends.
    name = random.choice(random.choice((words.names, words.names, words.familiar))).title()
    beginning = f"The secret number of {name} is"
    return beginning, f"{beginning} {random.randrange(100_000, 1_000_000)}."


def _password(random: Random, words: _Words) -> tuple[str, str]:
    some = random.choice((words.familiar, words.familiar, words.all))
    beginning = f"The password of the {random.choice(words.familiar)} {random.choice(some)} is"
    return beginning, f"{beginning} {' '.join(random.choice(some) for _ in range(3))}."


FACT_FORMS: tuple[Callable[[Random, _Words], tuple[str, str]], ...] = (_secret, _password)
"""Those of needles, in other words; the first words of a fact, and the whole of it."""
