import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config.curation import DuplicateConfig
from dsv3.data.curation.duplicates import (
    Signer,
    find_pairs,
    group,
    group_roots,
    probability_of_a_find,
    save_signatures,
)
from dsv3.data.curation.words import WordCounter

CONFIG = DuplicateConfig()


def test_the_probability_of_a_find_is_the_published_one():
    """FineWeb's settings: 14 bands of 8; MinHash's S-curve, 'Mining of Massive Datasets' 3.4.2."""
    found = [probability_of_a_find(share, config=CONFIG) for share in (0.7, 0.75, 0.8, 0.85)]
    assert found == pytest.approx([0.565, 0.772, 0.924, 0.988], abs=1e-3)


def test_two_texts_are_found_as_often_as_the_theory_says():
    """Pairs with a third to nearly all of their shingles in common, each found as likely as its share makes it."""
    config = DuplicateConfig(bands=10, rows=4, shingle_words=1)
    signer, counter, chance = Signer(config), WordCounter(), random.Random(0)
    found = expected = variance = 0.0
    for pair in range(200):
        common = [f"w{pair}x{number}" for number in range(60)]
        size = chance.randint(5, 50)
        first = counter.words(" ".join([*common, *(f"a{pair}x{number}" for number in range(size))]))
        second = counter.words(" ".join([*common, *(f"b{pair}x{number}" for number in range(size))]))
        same = (signer.sign("one", words=first)[:-1] == signer.sign("two", words=second)[:-1]).all(axis=1).any()
        likely = probability_of_a_find(60 / (60 + 2 * size), config=config)
        found, expected, variance = found + same, expected + likely, variance + likely * (1 - likely)
    assert 50 < expected < 175
    assert abs(found - expected) < 3.5 * variance**0.5


def test_the_share_of_equal_hashes_estimates_the_share_of_common_shingles():
    signer, counter = Signer(DuplicateConfig(bands=500, rows=4, shingle_words=1)), WordCounter()
    first = counter.words(" ".join(f"w{number}" for number in range(0, 300)))
    second = counter.words(" ".join(f"w{number}" for number in range(100, 400)))
    equal = signer.sign("one", words=first)[:-1] == signer.sign("two", words=second)[:-1]
    assert equal.mean() == pytest.approx(0.5, abs=0.04)  # 200 of 400; three deviations of 2,000 draws are 0.034


def test_the_last_band_is_equal_for_the_same_text_and_no_other():
    signer, counter = Signer(CONFIG), WordCounter()
    words = counter.words("the same words here twice")
    one, two, other = (signer.sign(text, words=words)[-1] for text in ("text", "  text\n", "texts"))
    assert (one == two).all()
    assert (one != other).any()


def test_texts_without_a_word_are_copies_of_nothing_but_themselves():
    signer, counter = Signer(CONFIG), WordCounter()
    first, second = (signer.sign(text, words=counter.words(text)) for text in ("!!!", "???"))
    assert first.shape == second.shape == (15, 8)
    assert (first != second).any(axis=1).all()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=60))
def test_groups_are_those_of_a_search_and_their_root_is_the_lowest(pairs):
    edges = [(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]]
    if not edges:
        return
    nodes, roots = group_roots(np.asarray(edges))
    neighbours: dict[int, set[int]] = {}
    for first, second in edges:
        neighbours.setdefault(first, set()).add(second)
        neighbours.setdefault(second, set()).add(first)
    for node, root in zip(nodes.tolist(), roots.tolist(), strict=True):
        seen, waiting = {node}, [node]
        while waiting:
            for other in neighbours[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        assert root == min(seen)


def test_pairs_are_found_across_tasks_and_the_first_document_stays(tmp_path):
    counter, signer = WordCounter(), Signer(CONFIG)
    texts = [["one two three four five six", "alpha beta gamma"], ["other words in here at all", "alpha beta gamma "]]
    for task, some in enumerate(texts):
        signed = [signer.sign(text, words=counter.words(text)) for text in some]
        save_signatures(signed, folder=tmp_path, task=task, bands=15)
    exact = find_pairs(tmp_path, band=14, tasks=2)
    assert exact.tolist() == [[1, 3]]
    found = group([find_pairs(tmp_path, band=0, tasks=2)], exact=exact, documents=[2, 2])
    assert [dropped.index.tolist() for dropped in found.dropped] == [[], [1]]
    assert found.dropped[1].first.tolist() == [1]
    assert found.dropped[1].is_exact.tolist() == [True]
    assert found.group_sizes == {2: 1}


def test_a_task_without_a_document_has_no_pairs(tmp_path):
    save_signatures([], folder=tmp_path, task=0, bands=15)
    pairs = find_pairs(tmp_path, band=0, tasks=1)
    assert pairs.shape == (0, 2)
    assert [dropped.index.tolist() for dropped in group([pairs], exact=pairs, documents=[0]).dropped] == [[]]
