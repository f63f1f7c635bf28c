"""The API against a real server, with the real `openai` client as the judge."""

import asyncio
import json
import os
import signal
from contextlib import ExitStack

import httpx
import openai
import pytest

from dsv3.infer.loaded import load

from .conftest import eventually

PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load(tiny_folder, device="cpu")


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 12, "temperature": 0} | options)


def chat(client, text="a word", **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model="tiny", messages=messages, **{"max_tokens": 12, "temperature": 0} | options
    )


def test_a_completion_is_what_the_library_generates(client, loaded):
    answer = complete(client)
    assert answer.choices[0].text == loaded.generate(PROMPT, max_tokens=12, temperature=0.0)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(loaded.prompt_ids(PROMPT)), 12)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_chat_is_what_the_library_answers(client, loaded):
    answer = chat(client)
    expected = loaded.chat([{"role": "user", "content": "a word"}], max_tokens=12, temperature=0.0)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected)


@pytest.mark.parametrize("options", [{}, {"seed": 5, "temperature": 1.0}], ids=["greedy", "seeded"])
def test_a_stream_joined_is_the_whole_answer(client, options):
    whole = complete(client, **options)
    pieces = list(complete(client, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (pieces[-1].choices, pieces[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert all(piece.usage is None for piece in pieces[:-1])


def test_a_streamed_chat_begins_with_its_role_and_ends_with_its_reason(client):
    whole, pieces = chat(client), list(chat(client, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == "length"
    assert all(piece.choices for piece in pieces)


def test_a_seed_gives_the_same_answer_again_and_another_one_another(client):
    first, again, other = (complete(client, seed=seed, temperature=1.2).choices[0].text for seed in (1, 1, 2))
    assert first == again != other


def test_several_answers_are_those_of_rising_seeds(client):
    several = complete(client, n=3, seed=7, temperature=1.0)
    alone = [complete(client, seed=7 + place, temperature=1.0).choices[0].text for place in range(3)]
    assert [choice.text for choice in several.choices] == alone
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.completion_tokens == 36
    assert several.usage.prompt_tokens == complete(client).usage.prompt_tokens


def test_several_prompts_are_answered_in_order(client):
    together = complete(client, prompt=[PROMPT, "the word"])
    assert [choice.text for choice in together.choices] == [
        complete(client, prompt=prompt).choices[0].text for prompt in (PROMPT, "the word")
    ]


def test_token_ids_are_taken_as_they_are(client, loaded):
    assert complete(client, prompt=loaded.prompt_ids(PROMPT)).choices[0].text == complete(client).choices[0].text


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client):
    text = complete(client, max_tokens=24).choices[0].text
    stop = text[5:8]
    answer = complete(client, max_tokens=24, stop=["never there", stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    streamed = list(complete(client, max_tokens=24, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in streamed) == text[: text.index(stop)]


def test_log_probabilities_are_the_models(client, loaded):
    answer = complete(client, logprobs=3, max_tokens=4)
    found = answer.choices[0].logprobs
    ids = loaded.prompt_ids(PROMPT)
    logits = loaded.logits(ids)[-1, : loaded.tokenizer.vocab_size].log_softmax(-1)
    assert found.token_logprobs[0] == pytest.approx(float(logits.max()), abs=1e-4)
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 4
    assert sorted(found.top_logprobs[0].values()) == pytest.approx(sorted(logits.topk(3).values.tolist()), abs=1e-4)
    of_chat = chat(client, logprobs=True, top_logprobs=2, max_tokens=3).choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in of_chat] == [2, 2, 2]
    assert of_chat[0].logprob == of_chat[0].top_logprobs[0].logprob


def test_echo_scores_the_prompt(client, loaded):
    answer = complete(client, echo=True, logprobs=0, max_tokens=2)
    ids = loaded.prompt_ids(PROMPT)
    logits = loaded.logits(ids)[:, : loaded.tokenizer.vocab_size].log_softmax(-1)
    expected = [float(logits[place, token]) for place, token in enumerate(ids[1:])]
    found = answer.choices[0].logprobs.token_logprobs
    assert found[0] is None
    assert found[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert answer.choices[0].text.startswith(PROMPT)
    assert complete(client, echo=True).choices[0].text == PROMPT + complete(client).choices[0].text


def test_a_repeated_beginning_is_found_in_the_cache(client):
    prompt = "and the word was with us. " * 12
    complete(client, prompt=prompt)
    usage = complete(client, prompt=prompt).usage
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached >= 64
    assert cached % 16 == 0
    assert usage.model_extra["prompt_cache_hit_tokens"] == cached
    assert usage.model_extra["prompt_cache_miss_tokens"] == usage.prompt_tokens - cached


def test_drafts_are_told_in_the_usage(client):
    details = complete(client, max_tokens=40, extra_body={"ignore_eos": True}).usage.completion_tokens_details
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0


def test_an_answer_in_json_is_json(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "even": {"type": "boolean"}},
        "required": ["name", "even"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    for seed in range(3):
        answer = chat(client, response_format=wanted, max_tokens=200, temperature=1.0, seed=seed)
        found = json.loads(answer.choices[0].message.content)
        assert set(found) == {"name", "even"}
        assert isinstance(found["even"], bool)
        assert answer.choices[0].finish_reason == "stop"


def test_an_answer_follows_an_expression_or_a_choice(client):
    assert chat(client, extra_body={"guided_regex": "[ab]{5}"}).choices[0].message.content.strip("ab") == ""
    assert complete(client, extra_body={"guided_choice": ["yes", "no"]}).choices[0].text in ("yes", "no")


def test_a_demanded_tool_call_is_made(client):
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]},
        },
    }
    answer = chat(
        client, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=300, temperature=1.0, seed=1
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, answer.choices[0].finish_reason) == ("weather", "tool_calls")
    assert json.loads(call.function.arguments)["days"] in (1, 2)
    streamed = list(
        chat(
            client,
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=300,
            temperature=1.0,
            seed=1,
            stream=True,
        )
    )
    pieces = [call for piece in streamed for call in piece.choices[0].delta.tool_calls or []]
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert [piece.function.name for piece in pieces if piece.function.name] == ["weather"]


def test_thinking_is_told_apart(client, server):
    body = {
        "messages": [{"role": "user", "content": "hm"}],
        "thinking": {"type": "enabled"},
        "guided_regex": "ok",
        "max_tokens": 300,
        "logit_bias": {},
        "temperature": 1.0,
        "seed": 4,
    }
    message = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"]
    assert message["content"] in ("ok", "")  # what follows </think>, if it came to that
    assert "<think>" not in message["reasoning_content"]


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"temperature": 3}, "less than or equal to 2", "temperature"),
        ({"extra_body": {"temprature": 1}}, "no such parameter", "temprature"),
        ({"n": 17}, "at most 16", "n"),
        ({"prompt": "x" * 3000}, "tokens, and prompt and answer together may have 512", "prompt"),
        ({"prompt": [3, 10_000]}, "token 10000 is beyond the vocabulary", "prompt"),
        ({"prompt": {"text": "x"}}, "", "prompt"),
        ({"stop": [""]}, "at least 1 character", "stop.0"),
        ({"stop": 5}, "", "stop"),
        ({"extra_body": {"stop_token_ids": [400]}}, "400 is beyond", "stop_token_ids"),
        ({"extra_body": {"guided_regex": "("}}, "", "guided_regex"),
        ({"logit_bias": {"330000": 5}}, "330000", "logit_bias"),
        ({"suffix": "end"}, "", "suffix"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(client, options, message, param):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, **options)
    assert message in error.value.message
    assert (error.value.body["type"], error.value.body["param"]) == ("invalid_request_error", param)


def test_a_model_that_is_not_served_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="the one served is 'tiny'"):
        client.completions.create(model="gpt", prompt="x")


def test_embeddings_are_refused_clearly(client):
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="tiny", input="x")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/chat/completions", 405), ("GET", "/nowhere", 404), ("POST", "/health", 405)],
)
def test_errors_of_http_have_the_same_shape(server, method, path, status):
    answer = httpx.request(method, f"{server.url}{path}")
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_malformed_bodies_are_refused(server):
    for body in (b"", b"{", b"[]", b'{"prompt": 5}', b'{"messages": "hi"}', b"\xff\xfe"):
        for path in ("completions", "chat/completions"):
            answer = httpx.post(f"{server.url}/v1/{path}", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (body, answer.text)


def test_a_body_beyond_the_limit_is_turned_away(server):
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x" * 300_000})
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")

    def endless():
        for _ in range(100):
            yield b" " * 10_000

    assert httpx.post(f"{server.url}/v1/completions", content=endless()).status_code == 413


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": [{"role": "user"}, {"role": "nobody", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
    ],
)
def test_the_parameter_at_fault_is_named_as_the_client_wrote_it(server, options, param):
    body = {"messages": [{"role": "user", "content": "x"}], **options}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_each_of_several_answers_has_the_prompts_scores(client):
    answer = complete(client, n=2, echo=True, logprobs=0, max_tokens=2, temperature=1.0)
    lengths = {len(choice.logprobs.token_logprobs) for choice in answer.choices}
    assert lengths == {answer.usage.prompt_tokens + 2}


def test_too_many_answers_at_once_are_turned_away(server):
    """Of 40 allowed, 36 are under way, and an engine that is held stops none of them from being so."""
    (engine,) = server.engine_process()
    body = {"prompt": PROMPT, "max_tokens": 1, "stream": True}
    with httpx.Client(base_url=server.url, timeout=60) as client, ExitStack() as streams:
        os.kill(engine, signal.SIGSTOP)
        streams.callback(os.kill, engine, signal.SIGCONT)
        answers = [
            streams.enter_context(client.stream("POST", "/v1/completions", json=body | {"n": n}))
            for n in (12, 12, 12, 8, 4)
        ]
        refused = answers[3]
        refused.read()
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 200]
    assert "36 answers are under way, and 40 is the limit" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: server.metric("dsv3_cache_pages_in_use") == 0)


def test_a_reader_that_hangs_up_frees_its_pages(server):
    body = {"prompt": PROMPT, "max_tokens": 450, "ignore_eos": True, "stream": True, "temperature": 1.0}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
        next(answer.iter_lines())
    eventually(
        lambda: server.metric("dsv3_cache_pages_in_use") == 0 and server.metric("dsv3_num_requests_running") == 0
    )
    # And one that waits for a whole answer.
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{server.url}/v1/completions", json={**body, "stream": False, "n": 8}, timeout=0.05)
    eventually(
        lambda: server.metric("dsv3_cache_pages_in_use") == 0 and server.metric("dsv3_num_requests_running") == 0
    )


def test_the_async_client_streams_side_by_side(server):
    async def one(client, seed):
        stream = await client.completions.create(
            model="tiny", prompt=PROMPT, seed=seed, max_tokens=20, temperature=1.0, stream=True
        )
        return "".join([piece.choices[0].text async for piece in stream])

    async def many():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, seed % 3) for seed in range(9)))

    texts = asyncio.run(many())
    assert texts[:3] * 3 == texts


def test_the_page_comes_with_its_policy(server):
    answer = httpx.get(server.url)
    assert answer.status_code == 200
    assert "script-src 'sha256-" in answer.headers["content-security-policy"]
    assert "access-control-allow-origin" not in httpx.get(server.url, headers={"Origin": "http://evil.example"}).headers


def test_usage_comes_with_every_chunk_where_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    pieces = list(chat(client, stream=True, stream_options=options, extra_body={"ignore_eos": True}))
    counts = [piece.usage.completion_tokens for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_metrics_are_in_the_format_of_prometheus(server):
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)}
    assert {"dsv3_time_to_first_token_seconds", "dsv3_spec_decode_draft_tokens", "dsv3_cache_pages_in_use"} <= families
