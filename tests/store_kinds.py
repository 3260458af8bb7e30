"""The stores that the contract runs over: `@every def test(store)`. The fixtures are in `conftest.py`."""

from typing import Any

import pytest

S3_KINDS = [pytest.param(kind, marks=pytest.mark.s3) for kind in ("s3", "s3-refusing", "s3-ignoring")]
SURE = ["local", "memory", S3_KINDS[0]]
"""Those whose conditions hold when many write at once."""


def over(*kinds: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("root", kinds, indirect=True)


every = over("local", "memory", *S3_KINDS)
sure = over(*SURE)
s3_only = over(S3_KINDS[0])
