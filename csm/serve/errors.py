"""Errors in the shape of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from csm.errors import CheckpointError, CSMError, QueueFullError, VoiceFileError

log = logging.getLogger("csm.serve")

REASONS = {
    400: "a field is missing or wrong",
    401: "no or a wrong API key",
    403: "another host or origin",
    404: "not found",
    408: "the body did not arrive in time",
    409: "the session is in use",
    413: "the body is too large",
    429: "the queue is full",
    500: "the server failed; its log has the reason",
    503: "the server is not ready",
    504: "no audio in time",
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its HTTP status. ``param`` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ErrorFields(BaseModel):
    """What went wrong. ``param`` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorFields


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors of a route for ``/openapi.json``: these, and those that every route can give."""
    given = sorted({400, 403, 500, *statuses})
    return {status: {"model": ErrorBody, "description": REASONS[status]} for status in given}


class AsciiJSON(Response):
    """JSON in ASCII: a field name of a request, quoted in an error, may hold what UTF-8 cannot encode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content).encode()


def response_of(error: ApiError) -> AsciiJSON:
    """The response for this error."""
    return AsciiJSON(error.body, error.status, error.headers)


def queue_full(num_waiting: int) -> ApiError:
    """429: too many requests are waiting."""
    message = f"{num_waiting} requests are waiting, which is the limit; try again later"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def api_error(error: BaseException) -> ApiError:
    """The API's error for an exception. What the user did not cause is logged, and its message is not sent."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, CSMError) and not isinstance(error, CheckpointError | VoiceFileError):
        return ApiError(400, str(error))
    log.error("request failed", exc_info=error)
    if isinstance(error, VoiceFileError):
        message = "a voice's file cannot be read or written; the server's log has the reason"
        return ApiError(500, message, code="voice_file_failed")
    return ApiError(500, "generation failed; the server's log has the reason", code="generation_failed")


def _validation_error(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    param, code = ".".join(path)[:200] or None, None
    message = f"{param or 'body'}: {first['msg']}"
    if first["type"] == "extra_forbidden":
        message, code = f"unknown field {param!r}", "unknown_parameter"
    return ApiError(400, message, param, code)


def add_handlers(app: FastAPI) -> None:
    """Let all errors of the app have OpenAI's shape."""

    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return response_of(_validation_error(error))

    async def http(_: Request, error: HTTPException) -> Response:
        return response_of(ApiError(error.status_code, str(error.detail), headers=error.headers))

    async def known(_: Request, error: Exception) -> Response:
        return response_of(api_error(error))

    async def unexpected(_: Request, error: Exception) -> Response:
        """uvicorn logs the exception."""
        return response_of(ApiError(500, "the server failed; its log has the reason", code="internal_error"))

    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]
    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(CSMError, known)
    app.add_exception_handler(Exception, unexpected)
