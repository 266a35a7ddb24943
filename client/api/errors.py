"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}` with the status that fits."""

from __future__ import annotations

import math
from typing import Any

from fastapi.exceptions import RequestValidationError

from protocol.errors import PotluckError, UserError

RETRY_S = 2.0  # where an error that passes does not say when


class BadRequest(UserError):
    """A request asks for what cannot be.

    Args:
        param: the field that is to blame, as `messages.0.content`.
        reason: OpenAI's code for it, for programs.
        status: of the HTTP answer.
    """

    code = "bad-request"

    def __init__(
        self, message: str, *, param: str | None = None, reason: str | None = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.reason = reason
        self.status = status


class Busy(PotluckError):
    """As many answers as may wait are waiting."""

    code = "busy"
    default_retryable = True


def status_of(error: PotluckError) -> int:
    """The HTTP status that says the same."""
    match error:
        case BadRequest():
            return error.status
        case Busy():
            return 429
        case UserError():
            return 400
        case _:
            return 503 if error.retryable else 500


def headers_of(error: PotluckError) -> dict[str, str]:
    """When to try again, where that makes sense."""
    if not error.retryable:
        return {}
    return {"Retry-After": str(max(1, math.ceil(error.retry_after_s or RETRY_S)))}


def body_of(error: PotluckError) -> dict[str, Any]:
    """The error as OpenAI writes it."""
    match error:
        case BadRequest():
            return _body(error.message, "invalid_request_error", error.param, error.reason)
        case Busy():
            return _body(error.message, "rate_limit_error", None, "rate_limit_exceeded")
        case UserError():
            return _body(error.message, "invalid_request_error", None, error.code)
        case _:
            return _body(error.message, "server_error", None, error.code)


def internal_error() -> dict[str, Any]:
    """The body for what nobody foresaw. Its traceback is in the log, and not in the answer."""
    return _body("the server failed to answer this request; its log says why", "server_error", None, "internal_error")


def http_error(status: int, message: str) -> dict[str, Any]:
    """The body for what the web framework refuses: unknown paths, methods, and the like."""
    return _body(message, "invalid_request_error", None, "not_found" if status == 404 else None)


def from_validation(error: RequestValidationError) -> BadRequest:
    """The first field of a request that does not fit."""
    first = max(error.errors(), key=lambda each: len(each["loc"]))  # of several types, the one that fits best
    if first["type"] == "json_invalid":
        return BadRequest("the request's body is not valid JSON", reason="invalid_json")
    # A field that may be of several types is complained of once for each; their names are no part of its place.
    place = [str(part) for part in first["loc"][1:] if isinstance(part, int) or not _is_type(part)]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return BadRequest(f"unknown parameter: {param}", param=param, reason="unknown_parameter")
    if first["type"] == "missing":
        return BadRequest(f"missing parameter: {param}", param=param, reason="missing_required_parameter")
    said = str(first["msg"]).removeprefix("Value error, ")
    return BadRequest(f"{param or 'the body'}: {said[:1].lower()}{said[1:]}", param=param)


def _is_type(part: Any) -> bool:
    """Is it pydantic's name for one of several types, as `list[str]`, `constrained-str` or `TextPart`?"""
    plain = ("str", "int", "float", "bool", "none")
    return not isinstance(part, str) or "[" in part or "-" in part or part[:1].isupper() or part in plain


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
