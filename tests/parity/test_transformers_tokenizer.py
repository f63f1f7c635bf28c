"""transformers' AutoTokenizer reads the tokenizer files of our export and gives the same ids and the same chats."""

import pytest
import torch

from dsv3.checkpoint.published import save_published
from dsv3.data.chat_template import render_chat
from dsv3.data.tokenizer import Tokenizer

TEXTS = ("In the beginning, there was 12345 + 1.\n\n\tdef f(x):", "你好，世界！ naïve café 🙂", "", "  two  spaces ")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And 1 more?"},
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer.train([*TEXTS, "In the beginning was the word. " * 3], vocab_size=400)
    tokenizer.save(folder / "tokenizer")
    model = make_model(vocab_size=tokenizer.vocab_size)
    save_published(model, folder=folder / "out", tokenizer_folder=folder / "tokenizer", dtype=torch.float32)
    return folder / "out", tokenizer


@pytest.fixture(scope="module")
def theirs(exported, load_with_transformers):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported[0])


def test_texts_get_the_same_ids_and_come_back(exported, theirs):
    for text in TEXTS:
        ids = exported[1].encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_special_tokens_are_the_same(exported, theirs):
    ours = exported[1]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_a_chat_is_written_the_same_way(exported, theirs):
    expected = render_chat(exported[1], messages=CHAT, add_generation_prompt=True)
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == expected
