from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.infer.stop import StopStrings


def shown(pieces, *, stop):
    strings = StopStrings(tuple(stop))
    return "".join(strings.add(piece) for piece in pieces) + strings.finish(), strings.found


def test_a_stop_string_across_pieces_is_not_shown():
    assert shown(["Once", " up", "on a ti", "me, and"], stop=["pon a time"]) == ("Once u", "pon a time")


def test_text_that_only_began_like_a_stop_string_is_shown_in_the_end():
    strings = StopStrings(("###",))
    assert strings.add("a #") == "a "
    assert strings.add("b##") == "#b"
    assert strings.finish() == "##"
    assert strings.found is None


def test_nothing_comes_after_the_stop_string():
    strings = StopStrings(("\n",))
    assert strings.add("one\ntwo") == "one"
    assert strings.add("three") == ""
    assert strings.finish() == ""


def test_text_without_stop_strings_passes_at_once():
    strings = StopStrings(())
    assert [strings.add(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]


def test_the_string_that_is_complete_first_wins():
    assert shown(["abcd"], stop=["abcd", "bc"]) == ("a", "bc")


def test_of_two_that_end_together_the_longer_counts():
    assert shown(["xabc"], stop=["bc", "abc"]) == ("x", "abc")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="empty stop string"):
        StopStrings(("",))


@given(
    st.text(alphabet="ab\n", max_size=24),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 24), max_size=6),
)
def test_how_text_is_cut_into_pieces_changes_nothing(text, stop, cuts):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(bounds)]
    assert shown(pieces, stop=stop) == shown([text], stop=stop)


@given(st.text(alphabet="ab\n", max_size=24), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
def test_the_answer_is_the_text_before_a_stop_string_and_holds_none(text, stop):
    answer, found = shown(list(text), stop=stop)
    assert not any(string in answer for string in stop)
    assert (found is not None) == any(string in text for string in stop)
    assert text.startswith(answer if found is None else answer + found)


@given(st.text(alphabet="ab", max_size=24), st.text(alphabet="ab", min_size=1, max_size=4))
def test_only_what_could_become_a_stop_string_is_held_back(text, stop):
    strings = StopStrings((stop,))
    out = ""
    for count, character in enumerate(text, start=1):
        out += strings.add(character)
        if strings.found is None:
            held = text[len(out) : count]
            assert stop.startswith(held)
