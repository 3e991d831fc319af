"""The whole service in one frozen tree, built once from flat settings.

`ServiceConfig.from_args` takes the same flat names wherever they come from: command-line flags,
`serve run deployments.app:build_app tp_size=2`, Serve's YAML `args:`, Helm values, `LLM(...)`.
A misspelt name is an error that says the nearest one; a value of the wrong type says which.

    >>> ServiceConfig.from_args({"tp_size": "2", "port": 8001}).engine.tp_size
    2
    >>> ServiceConfig.from_args({"tp_sise": 2})
    Traceback (most recent call last):
    ...
    ValueError: unknown setting `tp_sise`: did you mean `tp_size`?
"""

import ast
import difflib
import importlib.util
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from deployments.hosts import check_host
from workers.config import EngineConfig


class ServiceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What concerns the service around the engine. The docstring under a field is its help text."""

    served_model_name: str = ""
    """Name clients ask for; empty takes the model folder's name."""
    host: str = "127.0.0.1"
    """Address the HTTP port listens on; 0.0.0.0 for all interfaces."""
    port: int = 8000
    """Port of the HTTP endpoint."""
    metrics_port: int = 9464
    """Port of the driver's /metrics, on the same host address; 0 takes a free one, -1 none."""
    num_ingress: int = 1
    """Replicas of the HTTP front; they are stateless."""
    api_keys: tuple[str, ...] = ()
    """Keys clients must bring (`Authorization: Bearer ...`); none lets everybody in."""
    api_keys_file: str = ""
    """File with more of them, one a line (as it is, or its SHA-256); lines with # are comments."""
    allowed_hosts: tuple[str, ...] = ()
    """Names clients may ask under (`Host`), such as api.example.com or *.internal; none: any."""
    max_ongoing_requests: int = 4096
    """HTTP requests one ingress takes at once."""
    resume_wait_s: float = 60.0
    """How long a stream waits for the engine to come back before it fails."""
    cluster_wait_s: float = 30.0
    """How long to wait for the cluster to have room for all ranks."""
    drain_s: float = 60.0
    """How long requests may go on after the service was told to stop."""
    log_format: Literal["text", "json"] = "text"
    """json writes one object a line, and a line for each request; prompts are never logged."""
    otlp_endpoint: str = ""
    """URL of an OpenTelemetry collector (OTLP/HTTP) for traces (lockstep[otel]); empty for none."""

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            if not -1 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name}={getattr(self, name)} must be a port from 0 to 65535")
        for name in ("num_ingress", "max_ongoing_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("resume_wait_s", "cluster_wait_s", "drain_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or a number above it")
        for host in self.allowed_hosts:
            check_host(host)
        if self.otlp_endpoint:
            _check_otlp(self.otlp_endpoint)


def _check_otlp(endpoint: str) -> None:
    try:
        url = urlsplit(endpoint)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        is_url = False
    else:
        is_url = is_url and not (url.query or url.fragment or "@" in url.netloc)
    if not is_url or re.search(r"\s", endpoint):
        raise ValueError(
            f"otlp_endpoint={endpoint!r} is no URL of a collector: "
            "it must look like http://collector:4318"
        )
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ValueError(
            f"otlp_endpoint={endpoint} needs OpenTelemetry's exporter, which is not installed: "
            "pip install 'lockstep[otel]', or unset it"
        )


class ServiceConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    engine: EngineConfig = EngineConfig()
    service: ServiceSettings = ServiceSettings()

    @property
    def model_name(self) -> str:
        """What clients ask for: the name given, else that of the model's folder."""
        return self.service.served_model_name or Path(self.engine.model or "bundled").name

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "ServiceConfig":
        """Flat settings to the tree; values may be strings, as command lines give them."""
        known = {name: kind for kind in (EngineConfig, ServiceSettings) for name in fields(kind)}
        for name in args:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f": did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
                raise ValueError(f"unknown setting `{name}`{hint}")
        return cls(engine=_part(EngineConfig, args), service=_part(ServiceSettings, args))


def fields(kind: type[Struct]) -> tuple[str, ...]:
    return kind.__struct_fields__


def help_texts(kind: type[Struct]) -> dict[str, str]:
    """The docstring under each field, for `--help` and generated tables."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    texts: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[field.target.id] = str(below.value.value)
    return texts


Part = TypeVar("Part", EngineConfig, ServiceSettings)


def _part(kind: type[Part], args: Mapping[str, Any]) -> Part:
    """The settings of one part; one of the wrong type is named with its value."""
    settings = {name: args[name] for name in fields(kind) if name in args}
    types = get_type_hints(kind)
    for name, value in settings.items():
        try:
            settings[name] = msgspec.convert(value, types[name], strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"{name}={value!r} is not valid: {error}") from None
    return kind(**settings)
