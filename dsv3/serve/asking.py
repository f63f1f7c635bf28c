"""From the body of a request to what is asked of the engine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.data.chat_template import render_template
from dsv3.data.special_tokens import THINK_BEGIN
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.params import SamplingParams
from dsv3.serve.errors import ApiError
from dsv3.serve.grammar import GrammarSpec
from dsv3.serve.protocol import ChatBody, CompletionBody, NamedTool, Sampling
from dsv3.serve.tool_calls import render_tools, tool_call_grammar, tool_format


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt with all that its answers depend on."""

    prompt_ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...]
    grammar: GrammarSpec | None = None
    thinks: bool = False
    """The prompt ends inside `<think>`."""
    reads_tools: bool = False
    num_logprobs: int | None = None
    prompt_logprobs: bool = False


def chat_question(body: ChatBody, *, tokenizer: Tokenizer, max_tokens: int) -> Question:
    """Return the question of a chat.

    Raises:
        ApiError: parameters that contradict each other.
        ConfigError: messages, tools or a grammar that cannot be followed.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    names = [tool["function"]["name"] for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ApiError(400, f"{len(names)} tools, and more than one is called {twice[0]!r}", param="tools")
    choice: Any = body.tool_choice or ("auto" if tools else "none")
    if isinstance(choice, NamedTool):
        choice = choice.model_dump()
    uses_tools = bool(tools) and choice != "none"
    if choice != "none" and not tools:
        raise ApiError(400, f"tool_choice = {choice!r}, and there are no tools", param="tool_choice")
    if body.parallel_tool_calls is False and choice == "auto":
        raise ApiError(
            400,
            "parallel_tool_calls = false can be kept only where a call is demanded: use tool_choice 'required'",
            param="parallel_tool_calls",
        )
    template = tokenizer.chat_template
    messages = render_tools(
        [_as_rendered(message.model_dump(exclude_none=True)) for message in body.messages],
        tools=tools if uses_tools else [],
        chat_template=template,
    )
    text, thinks = _written(messages, template=template, body=body)
    demanded = tool_call_grammar(
        tools, choice=choice, format=tool_format(template), parallel=body.parallel_tool_calls is not False
    )
    grammar = _grammar(body, response_format=True)
    if demanded is not None and grammar is not None:
        raise ApiError(400, "an answer cannot be a demanded tool call and another format", param="tool_choice")
    limit = body.max_completion_tokens or body.max_tokens or max_tokens
    if body.max_tokens not in (None, limit):
        raise ApiError(
            400,
            f"max_tokens = {body.max_tokens} and max_completion_tokens = {limit} are two names of one limit; give one",
            param="max_tokens",
        )
    return Question(
        prompt_ids=tokenizer.encode(text),
        params=sampling(body, max_tokens=limit),
        stop=_stop(body),
        grammar=demanded or grammar,
        thinks=thinks,
        reads_tools=uses_tools,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def completion_questions(body: CompletionBody, *, tokenizer: Tokenizer, bos_id: int, max_tokens: int) -> list[Question]:
    """Return a question for each prompt; texts get the begin token in front, ids are taken as they are."""
    prompts: list[Any]
    if isinstance(body.prompt, str) or (body.prompt and isinstance(body.prompt[0], int)):
        prompts = [body.prompt]
    else:
        prompts = list(body.prompt)
    if not prompts:
        raise ApiError(400, "prompt is an empty list; give at least one text", param="prompt")
    params = sampling(body, max_tokens=body.max_tokens or max_tokens)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    return [
        Question(
            prompt_ids=[bos_id, *next(encoded)] if isinstance(prompt, str) else list(prompt),
            params=params,
            stop=_stop(body),
            grammar=_grammar(body, response_format=False),
            num_logprobs=body.logprobs,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        )
        for prompt in prompts
    ]


def sampling(body: Sampling, *, max_tokens: int) -> SamplingParams:
    """Return the engine's settings. What is left out is as the OpenAI API has it: temperature 1, top_p 1."""
    given = {
        "temperature": 1.0 if body.temperature is None else float(body.temperature),
        "top_p": 1.0 if body.top_p is None else float(body.top_p),
        "top_k": max(0, body.top_k or 0),
        "min_p": float(body.min_p or 0.0),
        "presence_penalty": float(body.presence_penalty or 0.0),
        "frequency_penalty": float(body.frequency_penalty or 0.0),
        "repetition_penalty": 1.0 if body.repetition_penalty is None else float(body.repetition_penalty),
        "logit_bias": tuple((int(token), float(bias)) for token, bias in (body.logit_bias or {}).items()),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_end": bool(body.ignore_eos),
        "seed": None if body.seed is None else body.seed % 2**63,
        "max_tokens": max_tokens,
    }
    return SamplingParams(**given)  # type: ignore[arg-type]


def _as_rendered(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message as templates know it: thoughts of earlier answers are not read again."""
    return {name: value for name, value in message.items() if name not in ("reasoning_content", "reasoning")}


def _written(messages: Sequence[dict[str, Any]], *, template: str, body: ChatBody) -> tuple[str, bool]:
    """Return the conversation as text, and whether it ends inside `<think>`."""
    variables = {} if body.thinking is None else {"thinking": body.thinking.type == "enabled"}
    text = render_template(template, messages=list(messages), add_generation_prompt=True, **variables)
    thinks = text.rstrip().endswith(THINK_BEGIN)
    if body.thinking is not None and body.thinking.type == "enabled" and not thinks:
        return f"{text}{THINK_BEGIN}\n", True
    if body.thinking is not None and body.thinking.type == "disabled" and thinks:
        raise ApiError(400, "this model's chat format always thinks first", param="thinking")
    return text, thinks


def _stop(body: Sampling) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _grammar(body: Sampling, *, response_format: bool) -> GrammarSpec | None:
    """Return the one grammar that was asked for.

    Raises:
        ApiError: more than one.
    """
    wanted: dict[str, GrammarSpec] = {}
    if body.guided_regex is not None:
        wanted["guided_regex"] = GrammarSpec("regex", body.guided_regex)
    if body.guided_choice is not None:
        wanted["guided_choice"] = GrammarSpec("choice", json.dumps(body.guided_choice))
    if body.guided_json is not None:
        wanted["guided_json"] = GrammarSpec("json_schema", json.dumps(body.guided_json))
    if body.guided_grammar is not None:
        wanted["guided_grammar"] = GrammarSpec("lark", body.guided_grammar)
    if response_format and isinstance(body, ChatBody) and body.response_format is not None:
        kind = body.response_format
        if kind.type == "json_schema":
            if kind.json_schema is None:
                raise ApiError(400, "response_format json_schema needs its json_schema", param="response_format")
            wanted["response_format"] = GrammarSpec("json_schema", json.dumps(kind.json_schema.schema_))
        elif kind.type == "json_object":
            wanted["response_format"] = GrammarSpec("json_object", "")
    if len(wanted) > 1:
        raise ApiError(400, f"an answer obeys one format; found {' and '.join(wanted)}", param=list(wanted)[1])
    return next(iter(wanted.values()), None)


def grammar_parameter(body: Sampling) -> str:
    """Return the name of the parameter that a question's grammar came from."""
    for name in ("guided_regex", "guided_choice", "guided_json", "guided_grammar"):
        if getattr(body, name) is not None:
            return name
    if isinstance(body, ChatBody) and body.response_format is not None and body.response_format.type != "text":
        return "response_format"
    return "tools"


def refuse_unknown_tokens(question: Question, *, num_embeddings: int, num_drawn: int, param: str) -> None:
    """Raise ApiError for ids that the model has no row for, or, where they are to be drawn, no token."""
    given = {
        param: (question.prompt_ids, num_drawn if question.prompt_logprobs else num_embeddings),
        "logit_bias": ([token for token, _ in question.params.logit_bias], num_drawn),
        "stop_token_ids": (question.params.stop_token_ids, num_drawn),
    }
    for name, (ids, limit) in given.items():
        if ids and max(ids) >= limit:
            raise ApiError(400, f"token {max(ids)} is beyond the vocabulary, 0 to {limit - 1}", param=name)


def refuse_long_prompt(question: Question, *, context_limit: int, param: str) -> None:
    """Raise ApiError where a prompt leaves no room for an answer."""
    if len(question.prompt_ids) >= context_limit:
        raise ApiError(
            400,
            f"the prompt has {len(question.prompt_ids)} tokens, and prompt and answer together may have "
            f"{context_limit}",
            param=param,
            code="context_length_exceeded",
        )
