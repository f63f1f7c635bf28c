"""The API against its own OpenAPI document, by generated requests."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from .conftest import eventually

CHECKS = "not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/v1/embeddings"])
@pytest.mark.parametrize("examples", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_generated_requests_are_answered_as_the_document_says(server, path, examples):
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    method = "get" if path in ("/v1/models", "/health") else "post"
    operation = document[path][method]

    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy())
    def run(case):
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # any other name is not found, and the rest goes untested
            for name in ("max_tokens", "max_completion_tokens"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 8)
            case.body.setdefault("max_tokens", 4)
            case.body["stream"] = False
        answer = case.call()
        assert answer.status_code < 500, (answer.status_code, answer.text[:500], case.body)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    run()
    eventually(lambda: server.metric("dsv3_cache_pages_in_use") == 0)
