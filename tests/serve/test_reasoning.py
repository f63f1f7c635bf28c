from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.serve.reasoning import ReasoningSplitter

PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", ">", "\n", " ", "a", "你好", "</thin", "<thi"]),
    max_size=12,
).map("".join)


def split(pieces: list[str], *, starts_inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(starts_inside=starts_inside)
    shown = [*map(splitter.add, pieces), splitter.finish()]
    return "".join(reasoning for reasoning, _ in shown), "".join(content for _, content in shown)


@pytest.mark.parametrize(
    ("text", "starts_inside", "reasoning", "content"),
    [
        ("<think>\nso\n</think>\n\nyes", False, "so", "yes"),
        ("so\n</think>\n\nyes", True, "so", "yes"),
        ("yes", False, "", "yes"),
        ("\n<think>so</think>yes", False, "so", "yes"),
        ("\n yes", False, "", "\n yes"),
        ("never closed\n", True, "never closed\n", ""),
        ("<think>never closed </thin", False, "never closed </thin", ""),
        ("<thin", False, "", "<thin"),
        ("", True, "", ""),
        ("</think>yes", True, "", "yes"),
        ("<think></think>", False, "", ""),
        ("<think>a\n\nb</think>c\n\n<think>d</think>\n", False, "a\n\nb", "c\n\n<think>d</think>\n"),
        ("yes <think>no</think>", False, "", "yes <think>no</think>"),
        ("a<think>b</think>    code", True, "a<think>b", "    code"),
        ("<think>\r\n思考</think>回答", False, "\r\n思考", "回答"),
    ],
)
def test_a_text_is_parted_at_its_first_pair_of_tags(text, starts_inside, reasoning, content):
    assert split([text], starts_inside=starts_inside) == (reasoning, content)
    assert split(list(text), starts_inside=starts_inside) == (reasoning, content)


@given(text=PARTS, cuts=st.lists(st.integers(0, 60)), starts_inside=st.booleans())
def test_the_parts_do_not_depend_on_how_the_text_was_cut(text, cuts, starts_inside):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    assert split(pieces, starts_inside=starts_inside) == split([text], starts_inside=starts_inside)


@given(text=PARTS)
def test_a_text_without_tags_is_passed_on_whole(text):
    text = text.replace("<think>", "").replace("</think>", "")
    if "</think>" not in text and "<think>" not in text:
        assert split([text]) == ("", text)
        assert split([text], starts_inside=True) == (text.lstrip("\n"), "")


def test_text_is_passed_on_as_soon_as_no_tag_can_come_of_it():
    splitter = ReasoningSplitter(starts_inside=True)
    shown = [splitter.add(piece) for piece in ["hm", " <", "b", "\n", "</", "think>", "\n", "yes"]]
    assert shown == [("hm", ""), (" ", ""), ("<b", ""), ("", ""), ("", ""), ("", ""), ("", ""), ("", "yes")]
