"""Errors as the OpenAI API words them: a message, a type, the parameter at fault, a code."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dsv3.errors import Dsv3Error, EngineError
from dsv3.runtime.log import get_logger

log = get_logger(__name__)

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return error_body(self.status, str(self), param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error as the API has it."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_errors(app: FastAPI) -> None:
    """Let every error of the application reach the client in this form."""

    @app.exception_handler(ApiError)
    async def of_ours(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(EngineError)
    async def of_the_engine(_: Request, error: EngineError) -> JSONResponse:
        return JSONResponse(error_body(503, str(error)), status_code=503)

    @app.exception_handler(Dsv3Error)
    async def of_the_user(_: Request, error: Dsv3Error) -> JSONResponse:
        return JSONResponse(error_body(400, str(error)), status_code=400)

    @app.exception_handler(RequestValidationError)
    async def of_a_body(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of the alternatives that were tried, the one that was followed furthest is the one that was meant.
        fault = max(error.errors(), key=lambda found: len(_place(found, body=error.body)))
        place = ".".join(_place(fault, body=error.body))
        message = fault["msg"]
        if fault["type"] == "extra_forbidden":
            message = "there is no such parameter here, so it cannot be obeyed; leave it out"
        found = f"{place}: {message}" if place else f"the body is not what was expected: {message}"
        return JSONResponse(error_body(400, found, param=place or None, code=fault["type"]), status_code=400)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(
            error_body(error.status_code, message), status_code=error.status_code, headers=error.headers
        )

    @app.exception_handler(Exception)
    async def of_a_bug(_: Request, error: Exception) -> JSONResponse:
        log.error("an answer failed", exc_info=error)
        return JSONResponse(error_body(500, "the server failed; its log says why"), status_code=500)


def _place(fault: dict[str, Any], *, body: Any) -> list[str]:
    """Return where in the body an error is, in the body's own names.

    pydantic's place has names of alternatives in it too, which nobody has written.
    """
    parts = fault["loc"][1:]
    found = []
    for number, part in enumerate(parts):
        is_there = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if is_there:
            body = body[part]
        if is_there or (fault["type"] == "missing" and number == len(parts) - 1):
            found.append(str(part))
    return found
