"""Conversations as text: the jinja template that comes with a tokenizer, rendered in a sandbox."""

import json
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3.data.special_tokens import BOS, EOS
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import TokenizerError

MAX_REPEATED_CHARACTERS = 1_000_000
"""Longest result of a multiplication inside a template; no chat format comes near, a hostile one fills the memory."""


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for, without a way out of it and without endless multiplication."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and isinstance(left, int) and isinstance(right, int):
            return left * right if left.bit_length() + right.bit_length() < 256 else _refuse("a number too large")
        if operator == "*":
            items, times = (left, right) if isinstance(right, int) else (right, left)
            if len(items) * times > MAX_REPEATED_CHARACTERS:
                _refuse(f"text of {len(items) * times:,} characters")
        if operator == "**" and abs(right) * max(abs(left), 2).bit_length() > 256:
            _refuse("a number too large")
        if operator == "%" and isinstance(left, str):
            _refuse("% formatting")
        return super().call_binop(context, operator, left, right)


def render_chat(tokenizer: Tokenizer, *, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Return a conversation as the text to be encoded, special tokens spelled out, BOS included.

    Encode it without `add_bos`: the template has put one already.

    Raises:
        TokenizerError: the template refuses the conversation, or does what a template may not do.
    """
    return render_template(tokenizer.chat_template, messages=messages, add_generation_prompt=add_generation_prompt)


def render_template(
    template: str, *, messages: list[dict[str, Any]], add_generation_prompt: bool, **variables: Any
) -> str:
    """Render any chat template; `variables` are what some ask for besides, such as `thinking` of V3.1.

    Raises:
        TokenizerError: as `render_chat`.
    """
    try:
        return _compiled(template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=BOS,
            eos_token=EOS,
            **variables,
        )
    except TokenizerError:
        raise
    except Exception as error:  # A template is foreign code: whatever it raises is its own refusal.
        raise TokenizerError(
            f"the chat template cannot render this conversation ({type(error).__name__}: {error}); each message needs "
            "a 'role' and a 'content', and a template may only read what it is given"
        ) from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """Return a template ready to be rendered; to compile one takes a hundred times as long as to render it."""
    environment = _ChatEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = _refused_by_template
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refused_by_template(message: str) -> NoReturn:
    raise TokenizerError(f"the chat template refuses this conversation: {message}")


def _refuse(what: str) -> NoReturn:
    raise TokenizerError(f"the chat template asks for {what}, which a chat format has no need of; do not trust it")
