"""Grammars that an answer must obey: JSON, a JSON schema, a regular expression, a choice, or a Lark grammar.

llguidance computes which tokens may come next; what is here gives it our tokenizer, sets limits, refuses what it would
obey only in part, and words its errors. A `GrammarSpec` travels to the engine's process, which makes a `Constraint`
of it for each request.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from jaxtyping import Bool

from dsv3.data.special_tokens import EOS, THINK_BEGIN, THINK_END
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, MissingExtraError
from dsv3.infer.constraint import Constraint

try:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
except ImportError as error:
    raise MissingExtraError(package="llguidance", extra="serve", purpose="an answer that obeys a grammar") from error

MAX_SOURCE_CHARACTERS = 200_000
"""Longest schema, expression or grammar that is read."""

MAX_CACHED_GRAMMARS = 32
"""Compiled grammars that are kept for the next request that asks for the same."""

MAX_COMMON_MULTIPLE = 10_000
"""Largest common multiple of a schema's `multipleOf` values: digits are checked by a machine with as many states."""

MAX_ALL_OF_PATTERNS = 8
"""Parts of `allOf` in a schema with patterns or formats: each part is one more machine to run beside the others."""

MAX_SCHEMA_DEPTH = 100
"""Objects and lists within one another in a schema, keywords included."""

MAX_INTERSECTIONS = 8
"""Uses of `&` and `~` in a Lark grammar: each may multiply the size of the machine, and twenty take a second."""

JSON_OPTIONS = {
    # Without a limit, a model that likes spaces need never end.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}",
    # Both would loosen the schema where it is not supported.
    "lenient": False,
    "coerce_one_of": False,
}

LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    step_lexer_fuel=200_000,  # About 15 ms of one mask.
    step_max_items=50_000,
    max_lexer_states=20_000,  # At up to 12 kB each, as measured on hostile ones.
    max_grammar_size=200_000,
    verbose_errors=False,
)

Kind = Literal["json_object", "json_schema", "regex", "lark", "choice"]


class GrammarSpec(msgspec.Struct, frozen=True):
    """A grammar as it is asked for. Equal ones share one compiled grammar."""

    kind: Kind
    source: str = ""
    """By kind: nothing; a schema as JSON; an expression for the whole text (the syntax of Rust's `regex`, so without
    look-around and back-references); a grammar in llguidance's dialect of Lark; a JSON list of the texts to choose
    from."""


class GrammarFactory:
    """Makes constraints for one tokenizer, and remembers the grammars compiled last. Used from one thread."""

    def __init__(self, tokenizer: Tokenizer, *, eos_id: int) -> None:
        """`eos_id` is the token that ends a text, the only special one that a grammar without special tokens allows."""
        self._tokenizer = tokenizer
        self._eos_id = eos_id
        self._vocabulary = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, eos_id=eos_id)))
        self._compiled: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()
        self._thinking: _ThinkingTokens | None = None

    def make(self, spec: GrammarSpec) -> Constraint:
        """Return a constraint at the start of its text, for one request.

        Raises:
            ConfigError: the source cannot be read, asks for what is not supported in full, or allows no text at all.
        """
        if spec not in self._compiled:
            self._remember(spec)
        self._compiled.move_to_end(spec)
        return GrammarConstraint(
            self._compiled[spec].deep_copy(),
            renew=lambda: self._remember(spec),
            num_tokens=self._tokenizer.vocab_size,
            eos_id=self._eos_id,
        )

    def reasoning_first(self, constraint: Constraint, *, starts_inside: bool) -> Constraint:
        """Return `constraint` for an answer that begins with thoughts, to which it does not apply."""
        if self._thinking is None:
            self._thinking = _ThinkingTokens(self._tokenizer)
        return ReasoningFirst(constraint, tokens=self._thinking, starts_inside=starts_inside)

    def _remember(self, spec: GrammarSpec) -> LLMatcher:
        """Compile a grammar for this request and later ones; return a matcher at its start."""
        self._compiled[spec] = self._compile(spec)
        self._compiled.move_to_end(spec)
        if len(self._compiled) > MAX_CACHED_GRAMMARS:
            self._compiled.popitem(last=False)
        return self._compiled[spec].deep_copy()

    def _compile(self, spec: GrammarSpec) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary, _grammar_source(spec), log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()  # Finds some errors; and what it builds here, each request finds done.
        if matcher.is_error():
            raise _refusal(spec, reason=_reason(matcher.get_error()))
        if warnings := matcher.get_grammar_warnings():
            raise _refusal(spec, reason=warnings[0])
        if matcher.is_stopped() and not matcher.is_accepting():
            raise _refusal(spec, reason="no text satisfies it")
        return matcher


class GrammarConstraint:
    """Where one text stands in its grammar; see `infer/constraint.py`.

    The end token is counted here: the matcher does not keep it, and would roll back one token too many after it.

    Matchers of one grammar share their lexer, with what it has built so far and the limit on that. So a matcher can
    fail for what others have built; it is then replaced, once, by one that begins with a lexer of its own.
    """

    def __init__(self, matcher: LLMatcher, *, renew: Callable[[], LLMatcher], num_tokens: int, eos_id: int) -> None:
        self._matcher = matcher
        self._renew = renew
        self._num_tokens = num_tokens
        self._eos_id = eos_id
        self._tokens: list[int] = []
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but the end token may follow."""
        return self._ended or (self._matcher.is_stopped() and self._matcher.is_accepting())

    def allowed(self, *, vocab_size: int) -> Bool[np.ndarray, " vocab"]:
        """Return which of `vocab_size` tokens may come next, the end token among them where the text may end.

        At least one may: after the end token, that token again. Where the text is forced, the one token is allowed
        that the tokenizer would write, not every shorter one.

        Raises:
            ConfigError: the grammar became too large to follow, or has come to where no text can go on.
        """
        if self._ended:
            mask = np.zeros(vocab_size, dtype=np.bool_)
            mask[self._eos_id] = True
            return mask
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._start_afresh()
            bits = self._matcher.compute_bitmask()
        self._check()
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            raise ConfigError("the grammar has no way to go on from this text, nor to end it; check its rules")
        # Rows of the model beyond the tokenizer's ids are zeros, which `count` appends.
        unpacked = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little", count=vocab_size)
        return unpacked.view(np.bool_)

    def advance(self, token: int) -> bool:
        """Take one token; False, and no move, if the grammar does not allow it.

        Raises:
            ConfigError: the grammar became too large to follow.
        """
        if self._ended or not 0 <= token < self._num_tokens:  # The matcher takes no more after an id it does not know.
            return False
        if token == self._eos_id:
            self._ended = self._matcher.is_accepting()
            return self._ended
        taken = self._matcher.try_consume_tokens([token]) == 1
        if self._matcher.is_error():
            self._start_afresh()
            taken = self._matcher.try_consume_tokens([token]) == 1
            self._check()
        if taken:
            self._tokens.append(token)
        return taken

    def roll_back(self, count: int) -> None:
        """Take back the last `count` tokens, the end token among them."""
        if count and self._ended:
            self._ended = False
            count -= 1
        if count:
            assert count <= len(self._tokens)
            del self._tokens[-count:]
            if self._matcher.is_error() or not self._matcher.rollback(count):
                self._start_afresh()

    def _start_afresh(self) -> None:
        self._matcher = self._renew()
        self._matcher.consume_tokens(self._tokens)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(
                f"the grammar cannot be followed any further: {_reason(self._matcher.get_error())}; use a simpler one"
            )


class ReasoningFirst:
    """Lets a model think freely, and applies a constraint to what follows `</think>`.

    The tag counts however it is spelled: V3's tokenizer has no token for it, and a model that has one may still write
    `</`, `think`, `>`. A token that would run past the tag's end is not allowed, for the answer would begin inside
    it; nor are the end token, which would leave no answer, and other special tokens. Takes back thoughts and answer
    alike.
    """

    def __init__(self, constraint: Constraint, *, tokens: "_ThinkingTokens", starts_inside: bool) -> None:
        """`starts_inside`: the prompt already opened `<think>`; otherwise the model must write that first."""
        self._constraint = constraint
        self._tokens = tokens
        self._places = [_Place(THINK_END if starts_inside else THINK_BEGIN, 0)]
        self._num_answered = 0

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing but the end token may follow."""
        return self._answering and self._constraint.finished

    def allowed(self, *, vocab_size: int) -> Bool[np.ndarray, " vocab"]:
        """Return which of `vocab_size` tokens may come next."""
        if self._answering:
            return self._constraint.allowed(vocab_size=vocab_size)
        known = self._tokens.allowed(self._places[-1])[:vocab_size]
        mask = np.zeros(vocab_size, dtype=np.bool_)
        mask[: len(known)] = known
        return mask

    def advance(self, token: int) -> bool:
        """Take one token; False, and no move, if it is not allowed here."""
        if self._answering:
            taken = self._constraint.advance(token)
            self._num_answered += taken
            return taken
        place = self._places[-1]
        mask = self._tokens.allowed(place)
        if not 0 <= token < len(mask) or not mask[token]:
            return False
        self._places.append(self._tokens.after(place, token=token))
        return True

    def roll_back(self, count: int) -> None:
        """Take back the last `count` tokens, out of the answer and into the thoughts if need be."""
        answered = min(count, self._num_answered)
        self._constraint.roll_back(answered)
        self._num_answered -= answered
        if count > answered:
            del self._places[answered - count :]

    @property
    def _answering(self) -> bool:
        return self._places[-1] == _CLOSED


class _Place(msgspec.Struct, frozen=True):
    """Which tag is awaited, and how many bytes of it stand at the end of the text."""

    tag: str
    matched: int


_CLOSED = _Place(THINK_END, len(THINK_END))


class _ThinkingTokens:
    """Which tokens may be written before `<think>` is complete, and between it and `</think>`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.token_bytes
        special = tokenizer.added_tokens
        pieces = [b"" if token in special else tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self._ordinary = np.array([bool(piece) for piece in pieces])
        self._parts_of_opening = [
            token for token, piece in enumerate(pieces) if piece and piece in THINK_BEGIN.encode()
        ]  # fmt: skip
        # Only a token with a ">" before its own end can run past the end of a tag.
        self._risky = [token for token, piece in enumerate(pieces) if b">" in piece[:-1]]
        self._tag_tokens = {spelling: token for token, spelling in special.items()}
        self._masks: dict[_Place, Bool[np.ndarray, " vocab"]] = {}

    def allowed(self, place: _Place) -> Bool[np.ndarray, " vocab"]:
        """Return the mask for a place, which is not to be changed."""
        if place not in self._masks:
            self._masks[place] = self._opening(place) if place.tag == THINK_BEGIN else self._closing(place)
        return self._masks[place]

    def after(self, place: _Place, *, token: int) -> _Place:
        """Return the place after an allowed token."""
        matched, _ = _follow(place, self._bytes_of(token))
        if place.tag == THINK_BEGIN and matched == len(THINK_BEGIN):
            return _Place(THINK_END, 0)
        return _Place(place.tag, matched)

    def _opening(self, place: _Place) -> Bool[np.ndarray, " vocab"]:
        mask = np.zeros_like(self._ordinary)
        rest = THINK_BEGIN.encode()[place.matched :]
        mask[[token for token in self._parts_of_opening if rest.startswith(self._bytes_of(token))]] = True
        if place.matched == 0 and THINK_BEGIN in self._tag_tokens:
            mask[self._tag_tokens[THINK_BEGIN]] = True
        return mask

    def _closing(self, place: _Place) -> Bool[np.ndarray, " vocab"]:
        mask = self._ordinary.copy()
        mask[[token for token in self._risky if _follow(place, self._bytes_of(token))[1]]] = False
        if THINK_END in self._tag_tokens:
            mask[self._tag_tokens[THINK_END]] = True
        return mask


def _follow(place: _Place, piece: bytes) -> tuple[int, bytes]:
    """Return how much of the tag stands at the end after `piece`, and what of it lies beyond the tag's end."""
    tag, matched = place.tag.encode(), place.matched
    for index, byte in enumerate(piece):
        if byte == tag[matched]:
            matched += 1
        else:
            matched = int(byte == tag[0])  # The first byte does not occur again in the tag.
        if matched == len(tag):
            return matched, piece[index + 1 :]
    return matched, b""


class _Vocabulary:
    """Our tokenizer as llguidance's `TokenizerWrapper` wants one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, *, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.added_tokens)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def json_grammar(schema: Any) -> dict[str, Any]:
    """Return a JSON schema with our options in it, for use after `%json` in a Lark grammar.

    Raises:
        ConfigError: the schema is no schema, or one that cannot be followed at a bearable cost.
    """
    _check_schema(schema)
    return {"x-guidance": JSON_OPTIONS, **(schema if isinstance(schema, dict) else {"allOf": [schema]})}


def _grammar_source(spec: GrammarSpec) -> str:
    if spec.kind not in get_args(Kind):
        raise ConfigError(f"there is no kind of grammar called {spec.kind!r}; use one of {', '.join(get_args(Kind))}")
    if len(spec.source) > MAX_SOURCE_CHARACTERS:
        raise _refusal(
            spec, reason=f"it has {len(spec.source):,} characters, and at most {MAX_SOURCE_CHARACTERS:,} are read"
        )
    try:
        spec.source.encode()
    except UnicodeEncodeError as error:
        raise _refusal(spec, reason="it holds half a surrogate pair, which no text can") from error
    match spec.kind:
        case "json_object":
            return _json_source({"type": "object"})
        case "json_schema":
            return _json_source(_read_json(spec))
        case "regex":
            return str(LLMatcher.grammar_from_regex(spec.source))
        case "choice":
            return str(LLMatcher.grammar_from_regex(_one_of(spec)))
        case "lark":
            _check_lark(spec)
            return str(LLMatcher.grammar_from_lark(spec.source))


def _json_source(schema: Any) -> str:
    return str(LLMatcher.grammar_from_json_schema(json.dumps(json_grammar(schema))))


def _read_json(spec: GrammarSpec) -> Any:
    try:
        return json.loads(spec.source)
    except (ValueError, RecursionError) as error:
        raise _refusal(spec, reason=f"it is not JSON ({error})") from error


def _one_of(spec: GrammarSpec) -> str:
    """Return an expression for the texts of a choice."""
    texts = _read_json(spec)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise _refusal(spec, reason="it must be a JSON list of one or more strings")
    return "|".join("".join(_literal(character) for character in text) for text in texts)


def _literal(character: str) -> str:
    return character if character.isalnum() else f"\\x{{{ord(character):x}}}"


def _check_schema(schema: Any) -> None:
    """Refuse what would loosen a schema, and what llguidance would take seconds or gigabytes over."""
    if not isinstance(schema, dict | bool):
        raise ConfigError(f"a JSON schema must be an object, true or false; found {json.dumps(schema)[:40]}")
    parts = _objects_of(schema)
    if any("x-guidance" in part for part in parts):
        raise ConfigError("a JSON schema may not hold 'x-guidance', which could loosen it; leave it out")
    if _common_multiple([step for part in parts for step in _step(part.get("multipleOf"))]) > MAX_COMMON_MULTIPLE:
        raise ConfigError(
            f"the values of 'multipleOf' in a JSON schema may have a common multiple of {MAX_COMMON_MULTIPLE:,} "
            "at most, counted in units of their last decimal place; use smaller ones, or 'enum'"
        )
    if any(_counts_names_twice(part) for part in parts):
        raise ConfigError(
            "'minProperties' in a JSON schema may ask for one property more than 'required' names: further ones could "
            "be the same name again; require more names, or lower it"
        )
    num_parts = sum(len(part["allOf"]) for part in parts if isinstance(part.get("allOf"), list))
    if num_parts > MAX_ALL_OF_PATTERNS and any("pattern" in part or "format" in part for part in parts):
        raise ConfigError(
            f"a JSON schema with 'pattern' or 'format' may have {MAX_ALL_OF_PATTERNS} parts in 'allOf'; "
            f"found {num_parts}: join them by hand"
        )


def _objects_of(schema: Any) -> list[dict[str, Any]]:
    """Return all objects in a schema, itself among them."""
    objects: list[dict[str, Any]] = []
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        part, depth = pending.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise ConfigError(f"a JSON schema may be nested {MAX_SCHEMA_DEPTH} levels deep; use $defs and $ref instead")
        if isinstance(part, dict):
            objects.append(part)
            pending += [(value, depth + 1) for value in part.values()]
        elif isinstance(part, list):
            pending += [(value, depth + 1) for value in part]
    return objects


def _counts_names_twice(part: dict[str, Any]) -> bool:
    least, required = part.get("minProperties"), part.get("required")
    return isinstance(least, int | float) and least > 1 + (len(required) if isinstance(required, list) else 0)


def _step(value: Any) -> list[Decimal]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    step = Decimal(str(value))
    return [step] if step.is_finite() and step > 0 else []  # llguidance refuses what is left out.


def _common_multiple(steps: list[Decimal]) -> int:
    digits = max((-int(step.as_tuple().exponent) for step in steps), default=0)
    return math.lcm(*(int(step.scaleb(max(digits, 0))) for step in steps))


def _check_lark(spec: GrammarSpec) -> None:
    bare = re.sub(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\])*/', "", spec.source)
    if "<[" in bare or EOS in bare:
        raise _refusal(spec, reason=f"special tokens are named by their spelling, and {EOS} may only end the text")
    if bare.count("&") + bare.count("~") > MAX_INTERSECTIONS:
        raise _refusal(spec, reason=f"it uses & and ~ more than {MAX_INTERSECTIONS} times")
    for found in re.finditer(r"%json\b", spec.source):
        try:
            schema, _ = json.JSONDecoder().raw_decode(spec.source, found.end() + _spaces(spec.source[found.end() :]))
        except (ValueError, RecursionError):
            continue  # llguidance says what is wrong with it, if it is not within a string.
        ours = isinstance(schema, dict) and schema.get("x-guidance") == JSON_OPTIONS
        _check_schema({key: value for key, value in schema.items() if key != "x-guidance"} if ours else schema)


def _spaces(text: str) -> int:
    return len(text) - len(text.lstrip())


def _refusal(spec: GrammarSpec, *, reason: str) -> ConfigError:
    name = {"json_object": "JSON grammar", "json_schema": "JSON schema", "lark": "Lark grammar"}.get(
        spec.kind, "regular expression" if spec.kind == "regex" else "choice"
    )
    return ConfigError(f"this {name} cannot be used: {reason}")


def _reason(message: str) -> str:
    """Return the telling part of llguidance's message, on one line."""
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    if message.startswith("oneOf"):
        return "the parts of 'oneOf' must be of such types that no value fits two of them; use 'anyOf'"
    told = re.search(r"^error: (.*)$", message, re.MULTILINE)
    line = told[1] if told else message.removesuffix("<non-verbose/>").strip().split("\n", 1)[0]
    line = re.sub(r"^at \S+: (?=invalid regex)", "", line)
    return line.split("; following special tokens", 1)[0][:300]
