"""Conversations in the shapes they come in, and which of their tokens are trained."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from dsv3.batch import IGNORE
from dsv3.data.chat_data import Conversation, as_tokens, messages_of, read_conversations
from dsv3.data.chat_template import render_chat
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import DataError

ASKED = [{"role": "user", "content": "a sum?"}, {"role": "assistant", "content": "12"}]
RECORDS = {
    "messages": {"messages": ASKED},
    "prompt and completion": {"prompt": "a sum?", "completion": "12"},
    "lists of messages": {"prompt": ASKED[:1], "completion": ASKED[1:]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a sum?"}, {"from": "gpt", "value": "12"}]},
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["what is the sum of 12 and 7? it is 19, and no more."] * 3, vocab_size=320)


@pytest.mark.parametrize("shape", RECORDS)
def test_every_shape_says_the_same(shape):
    assert messages_of(RECORDS[shape], name="x") == ASKED


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"text": "a"}, "it needs 'messages'"),
        (["a"], "JSON list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer"),
        ({"messages": [{"content": "a"}]}, "without a role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content is no text"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "'bing'"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(record, told):
    with pytest.raises(DataError, match=told):
        messages_of(record, name="x#3")


def test_files_of_every_kind_are_read(tmp_path):
    lines = "\n".join(json.dumps(RECORDS["messages"]) for _ in range(3)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([RECORDS["messages"]] * 3), tmp_path / "c.parquet")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    found = list(read_conversations(paths))
    assert [one.messages for one in found] == [ASKED] * 9
    assert found[4].name == f"{paths[1]}#2"
    (tmp_path / "a.jsonl").write_text(lines + "{broken\n")
    with pytest.raises(DataError, match="line 5 is no JSON"):
        list(read_conversations(paths))
    with pytest.raises(DataError, match=r"cannot read .*absent"):
        list(read_conversations([str(tmp_path / "absent.jsonl")]))


def test_answers_and_their_end_tokens_are_trained_and_nothing_else(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, *ASKED, {"role": "user", "content": "sure?"}]
    messages.append({"role": "assistant", "content": "yes"})
    taught = as_tokens(Conversation(messages=messages, name="x"), tokenizer=tokenizer)
    assert tokenizer.decode(taught.ids) == render_chat(tokenizer, messages=messages, add_generation_prompt=False)
    said = [token for token, trained in zip(taught.ids, taught.trained, strict=True) if trained]
    assert tokenizer.decode(said) == "12<｜end▁of▁sentence｜>yes<｜end▁of▁sentence｜>"
    assert [token for token in taught.targets if token != IGNORE] == said
    assert len(taught.inputs) == len(taught.targets) == len(taught.ids) - 1
    # What comes before an answer is, token for token, what the model reads when it is asked for one.
    asked = render_chat(tokenizer, messages=messages[:2], add_generation_prompt=True)
    assert taught.ids[: taught.trained.index(True)] == tokenizer.encode(asked)
    whole = as_tokens(Conversation(messages=messages, name="x"), tokenizer=tokenizer, train_prompts=True)
    assert whole.ids == taught.ids
    assert all(whole.trained)


R1 = (
    "{{bos_token}}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{m.content}}{% else %}<｜Assistant｜>"
    "{% if loop.last %}{{m.content}}{% else %}{{m.content.split('</think>')[-1]}}{% endif %}<｜end▁of▁sentence｜>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


def test_a_template_that_hides_earlier_reasoning_has_its_last_answer_trained(tokenizer):
    """As R1's and V3.1's do."""
    own = Tokenizer(tokenizer._backend, settings={**tokenizer.settings, "chat_template": R1})
    turns = [ASKED[0], {"role": "assistant", "content": "<think>so</think>12"}] * 2
    taught = as_tokens(Conversation(messages=turns, name="x"), tokenizer=own)
    said = [token for token, trained in zip(taught.ids, taught.trained, strict=True) if trained]
    assert own.decode(said) == "<think>so</think>12<｜end▁of▁sentence｜>"
    assert own.decode(taught.ids) == render_chat(own, messages=turns, add_generation_prompt=False)
