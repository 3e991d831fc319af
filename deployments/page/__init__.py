"""The live page: one HTML file, whole in itself, and the policy under which a browser runs it.

The page loads nothing and talks to nobody but the service that it came from. Its own style and
script are allowed by their hashes, so a line slipped into it from elsewhere would not run.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Page(NamedTuple):
    html: bytes
    policy: bytes
    """Content-Security-Policy."""


@cache
def load() -> Page:
    html = (Path(__file__).parent / "index.html").read_bytes()
    rules = (
        "default-src 'none'",
        f"script-src {_hashes(html, b'script')}",
        f"style-src {_hashes(html, b'style')}",
        "connect-src 'self'",
        "img-src data:",  # its icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return Page(html, "; ".join(rules).encode())


def _hashes(html: bytes, tag: bytes) -> str:
    """What stands between the tags, byte for byte, as browsers hash it."""
    inside = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in inside]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
