from dsv3.data.document import Document
from dsv3.data.sample import EXCERPT_CHARACTERS, sample_texts

DOCUMENTS = [Document(name=str(number), text=f"{number:03d}" * 10) for number in range(300)]


def test_the_sample_has_about_the_size_asked_for():
    texts = sample_texts(DOCUMENTS, characters=1500, seed=0)
    assert sum(map(len, texts)) == 1500
    assert len(set(texts)) == len(texts)


def test_a_small_source_is_taken_whole():
    assert sorted(sample_texts(DOCUMENTS, characters=10**6, seed=0)) == sorted(d.text for d in DOCUMENTS)


def test_the_choice_does_not_depend_on_the_order_of_the_documents():
    assert sample_texts(DOCUMENTS, characters=900, seed=1) == sample_texts(DOCUMENTS[::-1], characters=900, seed=1)


def test_seeds_choose_differently_and_from_the_whole_source():
    first, second = (sample_texts(DOCUMENTS, characters=900, seed=seed) for seed in (1, 2))
    assert set(first) != set(second)
    numbers = [int(text[:3]) for text in first]
    assert min(numbers) < 75
    assert max(numbers) > 225


def test_a_long_document_gives_an_excerpt():
    [text] = sample_texts([Document(name="long", text="abc" * 50_000)], characters=10**6, seed=0)
    assert len(text) == EXCERPT_CHARACTERS


def test_no_documents_give_no_texts():
    assert sample_texts([], characters=100, seed=0) == []
