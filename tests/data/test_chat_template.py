import gzip
import json

import pytest

from dsv3.data.chat_template import render_chat, render_template
from dsv3.data.special_tokens import CHAT_TEMPLATE
from dsv3.errors import TokenizerError

USER = [{"role": "user", "content": "hi"}]


def golden_chats(shared_data):
    with gzip.open(shared_data / "deepseek-v3-tokenizer" / "golden_chat.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def render_case(template, case):
    variables = {"thinking": case["thinking"]} if "thinking" in case else {}
    return render_template(
        template, messages=case["messages"], add_generation_prompt=case["add_generation_prompt"], **variables
    )


def test_the_published_templates_render_every_golden_chat(shared_data):
    folder = shared_data / "deepseek-v3-tokenizer"
    templates = {
        name: json.loads((folder / f"tokenizer_config.{name}.json").read_text(encoding="utf-8"))["chat_template"]
        for name in ("v3", "r1", "v3.1")
    }
    cases = golden_chats(shared_data)
    assert len(cases) == 32
    for case in cases:
        assert render_case(templates[case["template"]], case) == case["text"]


def test_our_template_renders_the_v3_chats_that_use_no_tools(shared_data):
    cases = [case for case in golden_chats(shared_data) if case["template"] == "v3" and case["case"] != "tool_call"]
    assert len(cases) == 6
    for case in cases:
        assert render_case(CHAT_TEMPLATE, case) == case["text"]


def test_system_texts_are_joined_by_a_blank_line_and_put_first():
    messages = [{"role": "system", "content": "one"}, *USER, {"role": "system", "content": "two"}]
    rendered = render_template(CHAT_TEMPLATE, messages=messages, add_generation_prompt=True)
    assert rendered == "<｜begin▁of▁sentence｜>one\n\ntwo<｜User｜>hi<｜Assistant｜>"


def test_texts_keep_their_spaces_and_line_breaks(small_tokenizer):
    messages = [{"role": "user", "content": "  a\n\n"}, {"role": "assistant", "content": "\n{{ b }}  "}]
    rendered = render_chat(small_tokenizer, messages=messages, add_generation_prompt=False)
    assert rendered == "<｜begin▁of▁sentence｜><｜User｜>  a\n\n<｜Assistant｜>\n{{ b }}  <｜end▁of▁sentence｜>"


def test_a_rendered_chat_encodes_to_single_special_tokens(small_tokenizer):
    rendered = render_chat(small_tokenizer, messages=USER, add_generation_prompt=True)
    ids = small_tokenizer.encode(rendered)
    assert ids[:2] == [small_tokenizer.bos_id, small_tokenizer.user_id]
    assert ids[-1] == small_tokenizer.assistant_id


def test_transformers_renders_our_template_alike(small_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    small_tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "be brief"}, *USER, {"role": "assistant", "content": "hello"}]
    for prompt in (False, True):
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == render_chat(
            small_tokenizer, messages=messages, add_generation_prompt=prompt
        )


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "12"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "system", "content": 3}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
    ],
)
def test_our_template_refuses_what_it_cannot_say(messages):
    with pytest.raises(TokenizerError, match="chat template"):
        render_template(CHAT_TEMPLATE, messages=messages, add_generation_prompt=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * [1] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ unfinished",
        "{{ missing.field }}",
    ],
)
def test_hostile_and_broken_templates_are_refused(template):
    with pytest.raises(TokenizerError, match="chat template"):
        render_template(template, messages=USER, add_generation_prompt=False)
