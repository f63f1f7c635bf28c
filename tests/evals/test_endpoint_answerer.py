"""A server is asked as the API says; what it does not give is told."""

import json
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dsv3.errors import ConfigError, DataError, EngineError
from dsv3.evals import endpoint
from dsv3.evals.answerer import Answerer
from dsv3.evals.endpoint import Endpoint
from dsv3.evals.endpoint_answerer import NO_ECHO, NO_FIRST, EndpointAnswerer
from dsv3.evals.running import CannotAnswerError

BEGIN = "<s>"


@pytest.fixture(autouse=True)
def direct_and_impatient(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_SECONDS", 0.001)


@contextmanager
def asking(answer, **settings):
    """Serve `answer(path, body) -> (status, JSON)` and yield an answerer of it, and what was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body))
            status, found = answer(self.path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        with closing(Endpoint(f"http://127.0.0.1:{server.server_port}/v1", retries=1)) as address:
            yield EndpointAnswerer(address, model="m", **settings), asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def letters(path, body, *, begin=BEGIN):
    """A model whose tokens are single characters: vowels have -1, others -2, and a vowel is always the likeliest."""
    prompt = body["prompt"]
    tokens = [*([begin] if begin else []), *prompt]
    answer = {"choices": [{"text": "xyz|stop"}], "usage": {"prompt_tokens": len(tokens)}}
    if body.get("echo"):
        scores = [None, *(-1.0 if token in "aeiou" else -2.0 for token in tokens[1:])]
        answer["choices"][0]["logprobs"] = {
            "tokens": [*tokens, "x"],
            "token_logprobs": [*scores, -9.0],
            "top_logprobs": [*(None if score is None else {"a": -1.0, "?": score} for score in scores), {"x": -9.0}],
        }
    return 200, answer


def test_continuations_are_scored_by_their_own_tokens():
    with asking(letters) as (answerer, asked):
        assert isinstance(answerer, Answerer)
        found = answerer.continuations([("ba", "ab"), ("ba", "e"), ("ba ", "a"), ("", "ab")])
    assert [(one.logprob, one.num_tokens, one.is_greedy) for one in found] == [
        (-3.0, 2, False),
        (-1.0, 1, True),
        (-3.0, 2, False),  # the space at the end of the context is scored
        (-3.0, 2, False),
    ]
    assert sorted(body["prompt"] for _, body in asked if not body.get("echo")) == ["ba"]  # each context once


def test_whole_texts_are_scored_where_a_token_begins_them():
    with asking(letters) as (answerer, _):
        assert answerer.rolling(["aba", "b"]) == [-4.0, -2.0]
    with (
        asking(lambda path, body: letters(path, body, begin="")) as (answerer, _),
        pytest.raises(CannotAnswerError, match=NO_FIRST),
    ):
        answerer.rolling(["aba"])


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 3}}),
        (200, {"choices": [{"text": "x", "logprobs": None}], "usage": {"prompt_tokens": 3}}),
        (
            200,
            {
                "choices": [{"text": "x", "logprobs": {"tokens": ["x"], "token_logprobs": [-1.0], "top_logprobs": []}}],
                "usage": {"prompt_tokens": 3},
            },
        ),
        (400, {"error": "echo is not supported"}),
    ],
)
def test_a_server_without_probabilities_of_prompts_is_told(answer):
    def served(path, body):
        return answer if body.get("echo") else letters(path, body)

    with asking(served) as (answerer, _), pytest.raises(CannotAnswerError) as error:
        answerer.continuations([("ab", "c")])
    assert NO_ECHO in str(error.value)


def test_answers_are_cut_at_stops_that_the_server_does_not_take():
    with asking(letters) as (answerer, asked):
        answers = answerer.generate(["ab", "cd"], stops=[("|",), ("1", "2", "3", "4", "z")], max_tokens=[5, 6])
    assert answers == ["xyz", "xy"]
    assert {body["prompt"]: (body["stop"], body["max_tokens"], body["temperature"]) for _, body in asked} == {
        "ab": (["|"], 5, 0),
        "cd": (["1", "2", "3", "4"], 6, 0),
    }
    assert {(path, body["model"]) for path, body in asked} == {("/v1/completions", "m")}


def test_chat_models_are_asked_by_conversations():
    def chat(path, body):
        assert path == "/v1/chat/completions"
        [message] = body["messages"]
        return 200, {"choices": [{"message": {"content": message["role"] + message["content"]}}]}

    with asking(chat, chat=True) as (answerer, asked):
        assert answerer.generate(["hi"], stops=[()], max_tokens=[5]) == ["userhi"]
    assert "stop" not in asked[0][1]


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, DataError), (413, DataError), (401, ConfigError), (404, ConfigError), (500, EngineError)],
)
def test_what_is_refused_is_the_items_and_what_fails_the_servers(status, error):
    def served(path, body):
        return (status, {"error": "no"}) if body["prompt"] == "bad" else letters(path, body)

    with asking(served) as (answerer, _), pytest.raises(error, match=str(status)):
        answerer.generate(["good", "bad", "ugly"], stops=[(), (), ()], max_tokens=[1, 1, 1])
