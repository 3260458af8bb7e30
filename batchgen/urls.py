"""Which URLs hold a secret. A spec is written down in the output folder and goes to every worker: none may enter it.

A '?' is also a wildcard, so of a local path it says nothing, and of a store's URL only beside a parameter that is named
like a credential. Over HTTP it begins a query string, which is what makes a link a signed one, whatever it is named.
"""

import re

_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
_HTTP_QUERY = re.compile(r"\bhttps?://[^?]*\?", re.IGNORECASE)
_NAME = r"[^=&/]*(?:signature|credential|token|secret|passw|pwd|access.?key|api.?key|accessid)[^=&/]*"
_CREDENTIAL = re.compile(rf"://.*\?(?:.*&)?(?:sig|key|{_NAME})=", re.IGNORECASE)


def has_password(url: str) -> bool:
    """`scheme://user:password@host`"""
    return bool(_PASSWORD.search(url))


def check_url(url: str) -> str:
    """The URL (or local path). Raises ValueError, which doesn't repeat it, when there may be a secret in it, or a zero
    byte, which no file system takes."""
    if "\0" in url:
        raise ValueError("has a zero byte in it; write the path itself")
    if has_password(url):
        raise ValueError("has a password in it, which a spec may not hold; leave credentials to the environment")
    if _HTTP_QUERY.search(url) or _CREDENTIAL.search(url):
        raise ValueError(
            "has a query string, as signed URLs do, and a spec may hold no secret; leave credentials to the environment"
        )
    return url
