"""Which names the service may be asked under: the `Host` header against the operator's list.

A page of another site can make a browser send requests here under the site's own name, once that
name points to this machine (DNS rebinding); a list of names turns them away. It is off without a
list, and is no stand-in for API keys.

    >>> hosts = Hosts(["api.example.com", "*.internal", "::1"])
    >>> [hosts.allow(one) for one in ("API.example.com:8000", "a.b.internal", "[::1]:80")]
    [True, True, True]
    >>> [hosts.allow(one) for one in ("", "example.com", "internal", "api.example.com.evil.org")]
    [False, False, False, False]
"""

import ipaddress
import re
from collections.abc import Iterable

LABELS = re.compile(r"(\*\.)?([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?")


def check_host(pattern: str) -> None:
    """A ValueError if `pattern` is no name, no `*.` and name, and no address."""
    if LABELS.fullmatch(pattern.lower()) or _is_address(pattern):
        return
    raise ValueError(
        f"allowed_hosts={pattern!r} is no host: give a name or an address without scheme and port, "
        "or *.example.com for all names below example.com"
    )


class Hosts:
    """The names in the list; none allows all."""

    def __init__(self, patterns: Iterable[str]) -> None:
        known = [pattern.lower() for pattern in patterns]
        self._names = frozenset(one for one in known if not one.startswith("*."))
        self._endings = tuple(one.removeprefix("*") for one in known if one.startswith("*."))

    def allow(self, header: str) -> bool:
        """Whether a request with this `Host` header, empty if it had none, may go on."""
        if not self._names and not self._endings:
            return True
        name = _without_port(header.strip().lower())
        return name in self._names or (name.endswith(self._endings) and not name.startswith("."))


def _without_port(host: str) -> str:
    found = re.fullmatch(r"\[([0-9a-f:.]+)\](:\d+)?|([^:\[\]]*?)\.?(:\d+)?", host)
    return "" if found is None else found[1] or found[3] or ""


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
