"""The one error that a caller may catch."""


class RequestError(RuntimeError):
    """The error of one request."""
