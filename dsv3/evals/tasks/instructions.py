"""The 25 kinds of instruction of IFEval, each a rule that a program can check (Zhou et al. 2023).

A rule takes the response and the instruction's own numbers and words. Strict is the response as it is; loose is any of
eight readings of it, without its first line, its last, and the stars of Markdown.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from dsv3.errors import DataError, MissingExtraError
from dsv3.evals.tasks.words import capital_words, count_sentences

Rule = Callable[..., bool]
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")


def follows(response: str, *, instruction: str, values: Mapping[str, Any], loose: bool = False) -> bool:
    """Tell whether a response follows one instruction, such as 'punctuation:no_comma'. An empty one follows none.

    Raises:
        DataError: no such instruction, or its values are not those that it takes.
        MissingExtraError: langdetect is not installed, and the instruction is about a language.
    """
    rule = RULES.get(instruction)
    if rule is None:
        raise DataError(f"there is no instruction '{instruction}'; there are {', '.join(RULES)}")
    given = {name: value for name, value in values.items() if value}
    try:
        return any(rule(one, **given) for one in (readings(response) if loose else [response]) if one.strip())
    except re.error as error:
        raise DataError(f"a keyword of '{instruction}' is no pattern: {error}; they are in {given}") from error
    except TypeError as error:
        raise DataError(f"'{instruction}' does not take the values {given}: {error}") from error


def readings(response: str) -> list[str]:
    """Return a response with and without its first line, its last line and its stars."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [text.replace("*", "") if bare else text for text, bare in product(cut, (False, True))]


def compared(count: int, *, relation: str, wanted: int) -> bool:
    """Tell whether a count is 'less than' or 'at least' what is wanted."""
    if relation not in ("less than", "at least"):
        raise DataError(f"a count is 'less than' or 'at least' another; '{relation}' is neither")
    return count < wanted if relation == "less than" else count >= wanted


# Keywords


def keywords_exist(text: str, *, keywords: Sequence[str]) -> bool:
    """Every keyword occurs. Keywords are patterns, as in the published checker."""
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword occurs so often, within other words too."""
    return compared(len(re.findall(keyword.strip(), text, re.IGNORECASE)), relation=relation, wanted=frequency)


def forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a whole word."""
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A letter occurs so often, small or capital.

    The published checker draws a letter by chance where the asked one is a mark, such as '#'; here the mark is counted.
    """
    return compared(text.lower().count(letter.lower()), relation=let_relation, wanted=let_frequency)


# Language and case


def response_language(text: str, *, language: str) -> bool:
    """The text is in a language, as langdetect sees it; a text without a letter passes."""
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError as error:
        raise MissingExtraError(package="langdetect", extra="eval", purpose="telling a language") from error
    DetectorFactory.seed = 0  # Else it draws, and a verdict may change from one run to the next.
    try:
        return bool(detect(text) == language)
    except LangDetectException:
        return True


def english_capital(text: str) -> bool:
    """All letters are capitals, and the text is English."""
    return text.isupper() and response_language(text, language="en")


def english_lowercase(text: str) -> bool:
    """All letters are small, and the text is English."""
    return text.islower() and response_language(text, language="en")


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words are in capitals."""
    return compared(capital_words(text), relation=capital_relation, wanted=capital_frequency)


# Length


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    """The text has so many words."""
    return compared(len(re.findall(r"\w+", text)), relation=relation, wanted=num_words)


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """The text has so many sentences."""
    return compared(count_sentences(text), relation=relation, wanted=num_sentences)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """The text has exactly so many paragraphs with '***' between them, none of them empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """There are so many paragraphs with an empty line between them, and one of them begins with a word."""
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count or not (words := parts[nth_paragraph - 1].split()):
        return False
    begins = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return count == num_paragraphs and begins.lower() == first_word.lower()


# Content and format


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least so many [placeholders] stand in the text."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript is there, whatever the space between its letters."""
    marks = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(marks.get(postscript_marker, postscript_marker.lower()), text.lower()) is not None


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines begin with '*' or '-'."""
    stars, dashes = (re.findall(rf"^\s*{mark}.*$", text, re.MULTILINE) for mark in (r"\*[^*]", "-"))
    return len(stars) + len(dashes) == num_bullets


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least so many passages stand between *stars*; between two stars they count twice over, as published."""
    single = [found.strip("*") for found in re.findall(r"\*[^\n*]*\*", text)]
    double = [found.removeprefix("**").removesuffix("**") for found in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(found.strip()) for found in single + double) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings such as 'Section 1' are there."""
    return len(re.findall(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) >= num_sections


def json_format(text: str) -> bool:
    """The whole text is JSON, fenced or not."""
    inside = text.strip()
    for fence in FENCES:
        inside = inside.removeprefix(fence)
    try:
        json.loads(inside.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A <<title>> is there."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def constrained_response(text: str) -> bool:
    """One of three given answers is there."""
    return any(option in text for option in OPTIONS)


# Beginning, end and the rest


def two_responses(text: str) -> bool:
    """Two different responses are there, with six stars between them."""
    parts = [part.strip() for part in text.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """The text begins with the request."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    """The text ends with a phrase, quotation marks aside."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """The text stands between double quotation marks."""
    inside = text.strip()
    return len(inside) > 1 and inside[0] == inside[-1] == '"'


def no_comma(text: str) -> bool:
    """There is no comma."""
    return "," not in text


RULES: dict[str, Rule] = {
    "keywords:existence": keywords_exist,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_words": number_words,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "detectable_format:constrained_response": constrained_response,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""By the name in the data."""
