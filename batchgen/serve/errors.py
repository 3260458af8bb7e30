"""What the API answers when it can't do what was asked: OpenAI's error body, with the HTTP status that its clients expect.

`ApiError` is the one exception that handlers raise on purpose; the app turns it into the body. The SDKs retry 408, 409,
429 and 5xx by themselves, so nothing that stays wrong may have one of these. No message holds prompt or generated text.
"""

from batchgen.errors import BatchgenError


class ApiError(BatchgenError):
    """An answer other than the one asked for. `kind` is OpenAI's `type`; `retry_after_s` goes with 429 and 503."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        fields = {name: getattr(self, name) for name in ("kind", "param", "code", "retry_after_s")}
        return _rebuild, (self.status, self.message, fields)

    def make_body(self) -> dict[str, dict[str, str | None]]:
        """`{"error": {...}}`, as OpenAI writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def _rebuild(status: int, message: str, fields: dict[str, str | None]) -> ApiError:
    return ApiError(status, message, **fields)  # type: ignore[arg-type]


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is at fault and stays so."""
    return ApiError(400, message, param=param, code=code)


def not_found(what: str, id_: str, param: str | None = None) -> ApiError:
    """404, the same for what is not there and for what is another tenant's. The id is the caller's own text: shortened."""
    return ApiError(404, f"No such {what}: '{id_[:80]}'", param=param)


def too_many(message: str, retry_after_s: int, code: str = "rate_limit_exceeded") -> ApiError:
    """429, with the seconds after which another try makes sense."""
    return ApiError(429, message, kind="rate_limit_error", code=code, retry_after_s=retry_after_s)
