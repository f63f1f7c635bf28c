import gzip
import json
import random
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance", reason="needs the extra 'serve'")

from dsv3.data.chat_template import render_template
from dsv3.data.special_tokens import CHAT_TEMPLATE, LAST_TOKENS
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError
from dsv3.serve import tool_calls
from dsv3.serve.grammar import GrammarFactory
from dsv3.serve.tool_calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    ToolCallDelta,
    ToolCallParser,
    render_tools,
    tool_call_grammar,
    tool_format,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "北京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TEMPLATE_NAMES = ["v3", "r1", "v3.1"]


def calls_text(*calls: tuple[str, str], format: str) -> str:
    """Write calls as the published formats have them."""
    if format == "v3.1":
        written = "".join(f"{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}" for name, arguments in calls)
    else:
        written = "\n".join(
            f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}" for name, arguments in calls
        )
    return CALLS_BEGIN + written + CALLS_END


def parse(pieces: list[str]) -> tuple[str, list[tuple[str, str, str]]]:
    """Return the joined content, and (id, name, arguments) of each call; check that deltas come as the API has them."""
    numbers = count()
    parser = ToolCallParser(new_id=lambda: f"id-{next(numbers)}")
    found = [delta for piece in pieces for delta in parser.add(piece)] + parser.finish()
    content, calls = "", []
    for delta in found:
        if isinstance(delta, str):
            content += delta
        elif delta.name is not None:
            assert delta.index == len(calls)
            calls.append((delta.id, delta.name, delta.arguments))
        else:
            assert delta.id is None
            assert delta.index == len(calls) - 1
            calls[-1] = (*calls[-1][:2], calls[-1][2] + delta.arguments)
    assert parser.num_calls == len(calls)
    return content, calls


def pieces_of(text: str, *, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[start:end] for start, end in pairwise(edges)]


@pytest.fixture(scope="module")
def templates(shared_data) -> dict[str, str]:
    folder = shared_data / "deepseek-v3-tokenizer"
    return {
        name: json.loads((folder / f"tokenizer_config.{name}.json").read_text(encoding="utf-8"))["chat_template"]
        for name in TEMPLATE_NAMES
    }


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    text = '{"city": "Paris", "days": 3}\nfunction get_weather\n```json\n```北京' * 20
    return Tokenizer.train([text], vocab_size=400)


def test_the_names_of_the_tags_are_special_tokens():
    tags = [value for name, value in vars(tool_calls).items() if isinstance(value, str) and value.startswith("<｜")]
    assert len(tags) == 9
    assert set(tags) == {token for token in LAST_TOKENS if "tool" in token}


@pytest.mark.parametrize("format", ["v3", "v3.1"])
def test_calls_are_read_with_the_content_before_them(format):
    text = "先看看。" + calls_text(("get_weather", '{"city": "北京"}'), ("clock", "{}"), format=format)
    expected = ("先看看。", [("id-0", "get_weather", '{"city": "北京"}'), ("id-1", "clock", "{}")])
    assert parse([text]) == expected
    assert parse(list(text)) == expected


@pytest.mark.parametrize("format", ["v3", "v3.1"])
def test_arguments_are_passed_on_while_they_are_written(format):
    start, end = calls_text(("get_weather", "SPLIT"), format=format).split("SPLIT")
    parser = ToolCallParser(new_id=lambda: "call_1")
    assert parser.add(start) == []
    assert parser.add('{"ci') == [
        ToolCallDelta(index=0, id="call_1", name="get_weather"),
        ToolCallDelta(index=0, arguments='{"ci'),
    ]
    assert parser.add('ty": "a') == [ToolCallDelta(index=0, arguments='ty": "a')]
    assert parser.add('"}') == [ToolCallDelta(index=0, arguments='"}')]
    assert parser.add(end) == []
    assert parser.finish() == []


def test_a_fence_inside_the_arguments_is_kept():
    arguments = json.dumps({"code": "```py\n1\n```"})
    for format in ("v3", "v3.1"):
        assert parse(list(calls_text(("run", arguments), format=format)))[1] == [("id-0", "run", arguments)]


@pytest.mark.parametrize(
    "text",
    [
        "no calls",
        f"{CALLS_BEGIN}",
        f"a{CALLS_BEGIN}{CALLS_END}b",
        f"{CALLS_BEGIN}{CALL_BEGIN}get_weather",
        f"{CALLS_BEGIN}{CALL_BEGIN}get_weather{SEPARATOR}no JSON{CALL_END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}a name with spaces{SEPARATOR}{{}}{CALL_END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}\n```json\n{{}}\n```{CALL_END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}{{}}{CALL_END}{CALLS_END} and more",
        f"{CALLS_BEGIN}{CALL_BEGIN}{'x' * 500}{SEPARATOR}{{}}{CALL_END}{CALLS_END}",
        f"{CALL_BEGIN}get_weather{SEPARATOR}{{}}{CALL_END}",
        "<｜tool▁calls▁be",
    ],
)
def test_what_is_no_call_comes_back_as_content(text):
    assert parse([text]) == (text, [])
    assert parse(list(text)) == (text, [])


def test_a_good_call_beside_a_bad_one_is_kept():
    good, bad = f"{CALL_BEGIN}clock{SEPARATOR}{{}}{CALL_END}", f"{CALL_BEGIN}bad{CALL_END}"
    assert parse([CALLS_BEGIN + good + bad + CALLS_END]) == (bad, [("id-0", "clock", "{}")])
    assert parse([CALLS_BEGIN + bad + good + CALLS_END]) == (CALLS_BEGIN + bad, [("id-0", "clock", "{}")])


def test_text_between_calls_is_content():
    call = f"{CALL_BEGIN}clock{SEPARATOR}{{}}{CALL_END}"
    text = f"{CALLS_BEGIN}{call} and {call}\n{CALLS_END}."
    expected = (" and .", [("id-0", "clock", "{}"), ("id-1", "clock", "{}")])
    assert parse([text]) == expected
    assert parse(list(text)) == expected


def test_a_call_that_breaks_off_in_its_arguments_stays_a_call():
    text = f'{CALLS_BEGIN}{CALL_BEGIN}clock{SEPARATOR}{{"zone": "a'
    assert parse([text]) == ("", [("id-0", "clock", '{"zone": "a')])


FRAGMENTS = st.lists(
    st.sampled_from(
        (
            *(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR, "function", "clock", "\n```json\n", "\n```"),
            *("`", "{}", '{"a": 1}', " ", "\n", "你好", "<｜tool", "<｜tool▁call▁", "x" * 200),
        )
    ),
    max_size=14,
).map("".join)
GOOD = st.builds(
    lambda names, format: "hi" + calls_text(*((name, '{"a": "`<"}') for name in names), format=format) + "bye",
    st.lists(st.sampled_from(["f", "function", "get-x_1"]), min_size=1, max_size=3),
    st.sampled_from(["v3", "v3.1"]),
)


@settings(max_examples=300)
@given(text=st.one_of(FRAGMENTS, GOOD), cuts=st.lists(st.integers(0, 400), max_size=20))
def test_what_is_read_does_not_depend_on_how_the_text_was_cut(text, cuts):
    assert parse(pieces_of(text, cuts=cuts)) == parse([text])
    assert parse(list(text)) == parse([text])


@given(text=FRAGMENTS)
def test_nothing_is_lost_where_no_call_was_found(text):
    content, calls = parse([text])
    if not calls:
        assert "".join(content.split()) == "".join(text.split())  # line breaks beside tags may go


CONVERSATION = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "天气"}, {"type": "text", "text": "?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}},
            {"id": "b", "type": "function", "function": {"name": "clock", "arguments": {}}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "晴"},
    {"role": "tool", "tool_call_id": "b", "content": "12:00"},
]


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_conversation_is_written_as_the_published_template_writes_its_calls(templates, name):
    # The templates want a string as arguments, which is all that is changed for them here.
    plain = json.loads(json.dumps(CONVERSATION))
    plain[0]["role"], plain[1]["content"] = "system", "天气?"
    plain[2]["tool_calls"][1]["function"]["arguments"] = "{}"
    expected = render_template(templates[name], messages=plain, add_generation_prompt=True)
    messages = render_tools(CONVERSATION, chat_template=templates[name])
    assert render_template(templates[name], messages=messages, add_generation_prompt=True) == expected


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_the_golden_conversation_with_a_call_is_reproduced(shared_data, templates, name):
    with gzip.open(shared_data / "deepseek-v3-tokenizer" / "golden_chat.jsonl.gz", "rt", encoding="utf-8") as lines:
        cases = [case for case in map(json.loads, lines) if case["template"] == name and case["case"] == "tool_call"]
    assert cases
    for case in cases:
        variables = {"thinking": case["thinking"]} if "thinking" in case else {}
        messages = render_tools(case["messages"], chat_template=templates[name])
        generation = case["add_generation_prompt"]
        text = render_template(templates[name], messages=messages, add_generation_prompt=generation, **variables)
        # V3's template leaves the list open after a single call, and the turn too; ours closes both.
        closed = f"{CALL_END}{CALLS_END}<｜end▁of▁sentence｜>"
        assert text == (case["text"].replace(CALL_END, closed) if name == "v3" else case["text"])


@pytest.mark.parametrize("name", [*TEMPLATE_NAMES, "ours"])
def test_calls_written_by_a_template_are_read_back(templates, name):
    template = templates | {"ours": CHAT_TEMPLATE}
    text = render_template(
        template[name],
        messages=render_tools(CONVERSATION[:3], chat_template=template[name]),
        add_generation_prompt=False,
    )
    answer = text.split("<｜Assistant｜>")[1].removesuffix("<｜end▁of▁sentence｜>").removeprefix("</think>")
    assert parse([answer]) == ("", [("id-0", "get_weather", '{"city": "北京"}'), ("id-1", "clock", "{}")])


def test_results_are_a_users_message_where_the_template_knows_no_tools():
    messages = render_tools(CONVERSATION, chat_template=CHAT_TEMPLATE)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    text = render_template(CHAT_TEMPLATE, messages=messages, add_generation_prompt=True)
    assert text.endswith(
        "<｜end▁of▁sentence｜><｜User｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>晴<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>12:00<｜tool▁output▁end｜><｜tool▁outputs▁end｜><｜Assistant｜>"
    )


def test_content_beside_calls_is_kept(templates):
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Wait. ", "tool_calls": [call]}]
    for template in [*templates.values(), CHAT_TEMPLATE]:
        rendered = render_tools(messages, chat_template=template)
        text = render_template(template, messages=rendered, add_generation_prompt=False)
        assert parse([text.split("Wait. ")[1]])[1] == [("id-0", "clock", "{}")]


@pytest.mark.parametrize("name", [*TEMPLATE_NAMES, "ours"])
def test_tools_are_described_in_the_first_system_text_with_the_format_to_use(templates, name):
    template = (templates | {"ours": CHAT_TEMPLATE})[name]
    for messages, start in [(CONVERSATION, "Be brief.\n\n## Tools"), (CONVERSATION[1:], "## Tools")]:
        first = render_tools(messages, tools=[WEATHER, CLOCK], chat_template=template)[0]
        assert first["role"] == "system"
        assert first["content"].startswith(start)
        assert json.dumps(WEATHER["function"]["parameters"], ensure_ascii=False) in first["content"]
        assert calls_text(("NAME", "{ARGUMENTS}"), format=tool_format(template)) in first["content"]


def test_each_template_is_known_by_its_format(templates):
    assert {name: tool_format(template) for name, template in templates.items()} == {
        "v3": "v3",
        "r1": "v3",
        "v3.1": "v3.1",
    }
    assert tool_format(CHAT_TEMPLATE) == "v3"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "robot", "content": ""}, "role 'robot'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "parts of type 'text'"),
        ({"role": "user", "content": "", "tool_calls": [CLOCK]}, "only an assistant's message"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}, "'a b'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 3}}]}, "found int"),
        ({"role": "assistant", "tool_calls": ["clock"]}, "found clock"),
    ],
)
def test_a_message_that_cannot_be_written_is_refused(message, told):
    with pytest.raises(ConfigError, match=told):
        render_tools([message], chat_template=CHAT_TEMPLATE)


@pytest.mark.parametrize("format", ["v3", "v3.1"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_any_walk_through_the_grammar_is_calls_of_known_tools(small, format, choice, seed):
    validator = pytest.importorskip("jsonschema_rs", reason="needs the extra 'dev'")
    spec = tool_call_grammar([WEATHER, CLOCK], choice=choice, format=format)
    constraint = GrammarFactory(small, eos_id=small.eos_id).make(spec)
    rng = random.Random(seed)
    closing = [small.eos_id, *(small.encode(mark)[0] for mark in (CALLS_END, CALL_END, '"', "}", "\n", "`", ":"))]
    tokens = []
    while not constraint.finished:
        mask = constraint.allowed(vocab_size=small.vocab_size)
        soon = [token for token in closing if mask[token]]
        choices = mask.nonzero()[0].tolist()
        tokens.append(soon[0] if soon and (len(tokens) > 60 or rng.random() < 0.3) else rng.choice(choices))
        assert constraint.advance(tokens[-1])
        assert len(tokens) < 600
    content, calls = parse([small.decode(tokens)])
    assert content == ""
    assert calls
    for _, name, arguments in calls:
        assert name in ("get_weather", "clock")
        if name == "get_weather":
            assert validator.is_valid(WEATHER["function"]["parameters"], json.loads(arguments))
        else:
            assert isinstance(json.loads(arguments), dict)
    if choice != "required":
        assert [name for _, name, _ in calls] == ["get_weather"]


def test_one_call_is_the_most_where_calls_are_not_to_be_parallel(small):
    spec = tool_call_grammar([CLOCK], choice="required", format="v3.1", parallel=False)
    constraint = GrammarFactory(small, eos_id=small.eos_id).make(spec)
    assert all(map(constraint.advance, small.encode(calls_text(("clock", "{}"), format="v3.1"))))
    assert constraint.finished


def test_no_grammar_is_made_where_the_model_may_choose():
    assert tool_call_grammar([CLOCK], choice="auto", format="v3") is None
    assert tool_call_grammar([CLOCK], choice="none", format="v3") is None


@pytest.mark.parametrize(
    ("tools", "choice", "told"),
    [
        ([CLOCK], "always", "tool_choice is 'always'"),
        ([], "required", "there are no tools"),
        ([CLOCK], {"type": "function", "function": {"name": "weather"}}, "known are: clock"),
        ([{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], "required", "type object"),
        ([{"type": "web_search"}], "required", "type 'function'"),
    ],
)
def test_a_choice_that_cannot_be_obeyed_is_refused(tools, choice, told):
    with pytest.raises(ConfigError, match=told):
        tool_call_grammar(tools, choice=choice, format="v3")


def test_parameters_that_cannot_be_followed_in_full_are_refused(small):
    tool = {"function": {"name": "a", "parameters": {"properties": {"x": {"type": "array", "uniqueItems": True}}}}}
    spec = tool_call_grammar([tool], choice="required", format="v3")
    with pytest.raises(ConfigError, match="uniqueItems"):
        GrammarFactory(small, eos_id=small.eos_id).make(spec)
