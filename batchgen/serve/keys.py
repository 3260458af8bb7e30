"""API keys: which tenant a key is of. Only their SHA-256 is ever written down; the keys are random, so that is enough.

One line a key, `TENANT sha256:HEX`, in a file or in the environment variable BATCHGEN_API_KEYS; several keys of one tenant
are how they are changed. `python -m batchgen.serve.keys TENANT >> FILE` makes one and shows it; the file gets its line.
"""

import hashlib
import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from batchgen.errors import SpecError
from batchgen.serve.spec import TENANT
from batchgen.storage import read_text

ENV = "BATCHGEN_API_KEYS"
_LINE = re.compile(r"(\S+)\s+sha256:([0-9a-f]{64})")
#: Whose everything is where keys are off.
LOCAL_TENANT = "local"


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Tenants by the digest of their keys."""

    tenants: Mapping[str, str]

    def find_tenant(self, key: str) -> str | None:
        """By the digest: how long a look-up takes tells nothing of a key."""
        return self.tenants.get(hash_key(key))


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def make_key(tenant: str) -> tuple[str, str]:
    """(a new key, its line)."""
    key = f"sk-bg-{secrets.token_urlsafe(32)}"
    return key, f"{tenant} sha256:{hash_key(key)}"


def parse_keys(text: str, source: str) -> KeyRing:
    """Raises SpecError, which repeats no line: somebody may have put a key there."""
    tenants: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not (bare := line.partition("#")[0].strip()):
            continue
        found = _LINE.fullmatch(bare)
        if found is None or not TENANT.fullmatch(found[1]):
            raise SpecError(
                f"{source} line {number}: write TENANT sha256:HEX, as python -m batchgen.serve.keys makes it"
            )
        tenants[found[2]] = found[1]
    if not tenants:
        raise SpecError(f"{source}: has no key; make one with python -m batchgen.serve.keys TENANT")
    return KeyRing(tenants)


def load_keys(url: str | None) -> KeyRing:
    """From the file, else from the environment. Raises SpecError, InputError."""
    if url is not None:
        return parse_keys(read_text(url), url)
    if ENV not in os.environ:
        raise SpecError(f"no API keys: name a file of them, or set {ENV}; without keys only loopback may be served")
    return parse_keys(os.environ[ENV], ENV)


def check_bind(host: str, keys: KeyRing | None) -> None:
    """Raises SpecError where an endpoint without keys would be seen by other machines."""
    if keys is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise SpecError(f"host {host}: without API keys only 127.0.0.1 may be served; give keys")


def main() -> None:
    if len(sys.argv) != 2 or not TENANT.fullmatch(sys.argv[1]):
        raise SystemExit("usage: python -m batchgen.serve.keys TENANT   (a-z, 0-9, - and _)")
    key, line = make_key(sys.argv[1])
    print(f"key (shown once): {key}", file=sys.stderr)
    print(line)


if __name__ == "__main__":
    main()
