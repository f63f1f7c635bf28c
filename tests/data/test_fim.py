import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.fim import FimParts, cut_document, psm_ids, psm_text

TEXT = "The quick brown fox jumps over the lazy dog."


def test_the_sequence_is_spelled_as_in_the_report():
    parts = FimParts(prefix="def f(", middle="x):", suffix="\n    return x")
    assert psm_text(parts) == ("<｜fim▁begin｜>def f(<｜fim▁hole｜>\n    return x<｜fim▁end｜>x):<｜end▁of▁sentence｜>")


def test_ids_decode_to_the_spelled_sequence(small_tokenizer):
    parts = FimParts(prefix="one ", middle="two ", suffix="three")
    encoded = {name: small_tokenizer.encode(getattr(parts, name)) for name in ("prefix", "middle", "suffix")}
    ids = psm_ids(small_tokenizer, **encoded)
    assert small_tokenizer.decode([*ids, small_tokenizer.eos_id]) == psm_text(parts)


def test_published_ids_mark_the_parts(published):
    assert psm_ids(published, prefix=[10], suffix=[20], middle=[30]) == [128801, 10, 128800, 20, 128802, 30]


@given(st.text(), st.integers(0, 1000))
def test_the_parts_joined_are_the_document(text, seed):
    parts = cut_document(text, document="d", seed=seed, rate=1.0)
    assert parts is not None
    assert parts.prefix + parts.middle + parts.suffix == text


def test_a_tenth_of_the_documents_is_cut():
    cut = sum(cut_document(TEXT, document=str(number), seed=3, rate=0.1) is not None for number in range(10_000))
    assert cut == pytest.approx(1000, abs=120)  # Four standard deviations of a binomial.


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, 200)])
def test_the_ends_of_the_rate_are_exact(rate, expected):
    assert sum(cut_document(TEXT, document=str(n), seed=0, rate=rate) is not None for n in range(200)) == expected


def test_cuts_depend_on_seed_and_document_alone():
    def cuts(seed):
        return [cut_document(TEXT, document=str(number), seed=seed, rate=0.5) for number in range(50)]

    assert cuts(1) == cuts(1)
    assert cuts(1) != cuts(2)


def test_both_cuts_are_uniform_over_the_document():
    text = "x" * 999
    parts = [cut_document(text, document=str(number), seed=0, rate=1.0) for number in range(4000)]
    # The lower and higher of two uniform places lie at a third and two thirds on average.
    assert sum(len(part.prefix) for part in parts) / 4000 == pytest.approx(333, abs=15)
    assert sum(len(part.suffix) for part in parts) / 4000 == pytest.approx(333, abs=15)
