"""The API keys that open the service, as digests; and the file they may stand in."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from deployments.errors import Unauthorized


class Keys:
    """The API keys that open the service, kept as digests; none opens it to everybody."""

    def __init__(self, keys: Iterable[str]) -> None:
        """A key is given as it is or as the 64 hexadecimal digits of its SHA-256."""
        self._digests = [
            bytes.fromhex(key)
            if re.fullmatch(r"[0-9a-fA-F]{64}", key)
            else hashlib.sha256(key.encode()).digest()
            for key in keys
        ]

    def tenant(self, authorization: str) -> str:
        """A name for who holds the key, empty if none is needed; or `Unauthorized`.

        All keys are compared, each in constant time: how long it takes tells nothing.
        """
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized
        return digest.hex()[:16]


def read_keys(path: str) -> list[str]:
    """The keys in a file; a file that is named and not there refuses to start, open to all."""
    if not path:
        return []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(
            f"api_keys_file={path} cannot be read ({error.strerror}): mount the file or unset it"
        ) from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"api_keys_file={path} holds no key: put one on a line or unset it")
    return keys
