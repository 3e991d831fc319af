"""Writes what follows from other files: the tables of README.md, and the engine's settings in
values.schema.json.

    python helm/readme.py           write both
    python helm/readme.py --check   exit 1 and say what is stale

A setting's type and text come from `deployments.config` and `workers.config`; bounds stand in the
schema and are kept. A value's text is the comment above it in values.yaml, its type the schema's.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import yaml

HELM = Path(__file__).resolve().parent
sys.path.insert(0, str(HELM.parent))

from deployments.config import ServiceSettings, fields, help_texts  # noqa: E402
from workers.config import EngineConfig  # noqa: E402

SCHEMA, VALUES, README = HELM / "values.schema.json", HELM / "values.yaml", HELM / "README.md"
BEGIN, END = "<!-- tables: written by readme.py -->", "<!-- end of tables -->"
SECRET = ("api_keys", "api_keys_file")
"""Settings that have no value: the chart takes keys from a Secret, see auth.*."""


def settings_schema(known: dict[str, Any]) -> dict[str, Any]:
    """The schema of `engine`, with the bounds it has now."""
    properties: dict[str, Any] = {}
    for kind in (EngineConfig, ServiceSettings):
        types, texts = get_type_hints(kind), help_texts(kind)
        for name in fields(kind):
            if name not in SECRET:
                kept = {
                    key: value
                    for key, value in known.get(name, {}).items()
                    if key in ("minimum", "maximum", "exclusiveMinimum", "pattern", "const")
                }
                properties[name] = _shape(types[name]) | kept | {"description": texts[name]}
    return properties


def _shape(kind: Any) -> dict[str, Any]:
    """JSON schema of a type; what may be None or has a default may be left out or null."""
    shape = msgspec.json.schema(kind)
    choices = shape.pop("anyOf", [shape])
    types = [choice["type"] for choice in choices if choice.get("type") not in (None, "null")]
    enum = next((choice["enum"] for choice in choices if "enum" in choice), None)
    if enum:
        return {"enum": [*enum, None]}
    return {"type": [*types, "null"]}


def value_rows() -> Iterator[tuple[str, str, Any]]:
    """Path, comment and default of every value: lines of values.yaml, and what YAML makes of it."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    tree = yaml.safe_load(VALUES.read_text())
    for line in VALUES.read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.removeprefix("#").strip())
            continue
        key = re.match(r"( *)([\w-]+):", line)
        if not key:
            comment = []
            continue
        path = [(depth, name) for depth, name in path if depth < len(key[1])]
        path.append((len(key[1]), key[2]))
        names = [name for _, name in path]
        value: Any = tree
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        inline = line[key.end() :].strip()
        if inline or isinstance(value, list):
            yield ".".join(names), " ".join(comment), value
        elif comment and names[-1] != "engine":
            yield ".".join(names), " ".join(comment), None
        comment = []


def schema_of(schema: dict[str, Any], path: str) -> dict[str, Any]:
    node = schema
    for name in path.split("."):
        node = node.get("properties", {}).get(name, {})
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


def _kind(node: dict[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(str(each) for each in node["enum"] if each is not None)
    kinds = node.get("type", "object")
    return kinds if isinstance(kinds, str) else ", ".join(k for k in kinds if k != "null")


def tables(schema: dict[str, Any]) -> str:
    lines = ["| value | type | default | |", "| --- | --- | --- | --- |"]
    for path, text, default in value_rows():
        if path.startswith("engine."):
            continue
        shown = "" if default is None and "null" not in text else f"`{json.dumps(default)}`"
        lines.append(f"| `{path}` | {_kind(schema_of(schema, path))} | {shown} | {text} |")
    given = {path: default for path, _, default in value_rows()}
    comments = {path: text for path, text, _ in value_rows()}
    defaults = {**_defaults(EngineConfig), **_defaults(ServiceSettings)}
    lines += [
        "",
        "### The engine's settings",
        "",
        "The same names as on the command line and in Serve's YAML.",
        "",
        "| value | type | default | |",
        "| --- | --- | --- | --- |",
    ]
    for name, node in schema["properties"]["engine"]["properties"].items():
        path = f"engine.{name}"
        default = json.dumps(given.get(path, defaults[name]))
        text = comments.get(path) or node["description"]
        lines.append(f"| `{path}` | {_kind(node)} | `{default}` | {text} |")
    return "\n".join(line.rstrip() for line in lines)


def _defaults(kind: Any) -> dict[str, Any]:
    made = kind()
    return {name: getattr(made, name) for name in fields(kind)}


def written() -> dict[Path, str]:
    """What the generated files should hold."""
    schema = json.loads(SCHEMA.read_text())
    engine = schema["properties"]["engine"]
    engine["properties"] = settings_schema(engine.get("properties", {}))
    readme = README.read_text()
    head, rest = readme.split(BEGIN)
    tail = rest.split(END)[1]
    return {
        SCHEMA: json.dumps(schema, indent=2) + "\n",
        README: f"{head}{BEGIN}\n\n{tables(schema)}\n\n{END}{tail}",
    }


def main() -> int:
    stale = [path for path, text in written().items() if path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.name} is stale: run `python helm/readme.py`")
        return int(bool(stale))
    for path, text in written().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
