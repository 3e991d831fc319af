"""What a client wrote about the shape of its answer, in whichever field, as one `Grammar`.

Nothing is compiled here: whether a schema or an expression is a good one the driver finds out, and
says with the name of the field.

    >>> from deployments.schemas import parse_completion
    >>> body = b'{"model": "m", "prompt": "?", "guided_choice": ["yes", "no"]}'
    >>> grammar_of(parse_completion(body))
    Grammar(kind='regex', text='yes|no', field='guided_choice')
"""

from typing import Any, Literal

import msgspec

from deployments.errors import RequestError
from deployments.messages import MAX_GRAMMAR_CHARS, Grammar
from deployments.schemas import GenerationRequest, ResponseFormat, StructuredOutputs

ANY_OBJECT = '{"type":"object"}'
META_CHARACTERS = frozenset(r"\.+*?()|[]{}^$#&-~")


def grammar_of(request: GenerationRequest) -> Grammar | None:
    """What the answer must look like; None if anything will do."""
    asked = [
        *_of_response_format(request.response_format),
        *_of_structured_outputs(request.structured_outputs),
        *_json("guided_json", request.guided_json),
        *_text("regex", "guided_regex", request.guided_regex),
        *_choice("guided_choice", request.guided_choice),
        *_text("lark", "guided_grammar", request.guided_grammar),
    ]
    if len(asked) > 1:
        first, second = asked[0].field, asked[1].field
        raise RequestError(
            f"'{first}' and '{second}' both say what the answer looks like: send one of them.",
            param=second,
        )
    for grammar in asked:
        if len(grammar.text) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"'{grammar.field}' has {len(grammar.text)} characters and the limit is "
                f"{MAX_GRAMMAR_CHARS}.",
                param=grammar.field,
            )
    return asked[0] if asked else None


def _of_response_format(asked: ResponseFormat | None) -> list[Grammar]:
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [Grammar("json", ANY_OBJECT, "response_format")]
    if asked.json_schema is None:
        raise RequestError(
            "'response_format.json_schema' is required with the type 'json_schema'.",
            param="response_format.json_schema",
            code="missing_parameter",
        )
    return _json("response_format.json_schema.schema", asked.json_schema.schema)


def _of_structured_outputs(asked: StructuredOutputs | None) -> list[Grammar]:
    if asked is None:
        return []
    any_object = [Grammar("json", ANY_OBJECT, "structured_outputs.json_object")]
    return [
        *_json("structured_outputs.json", asked.json),
        *_text("regex", "structured_outputs.regex", asked.regex),
        *_choice("structured_outputs.choice", asked.choice),
        *_text("lark", "structured_outputs.grammar", asked.grammar),
        *(any_object if asked.json_object else []),
    ]


def _json(field: str, schema: dict[str, Any] | str | None) -> list[Grammar]:
    if schema is None:
        return []
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return [Grammar("json", text, field)]


def _choice(field: str, choices: list[str] | None) -> list[Grammar]:
    if choices is None:
        return []
    return [Grammar("regex", "|".join(map(_literal, choices)), field)]


def _text(kind: Literal["regex", "lark"], field: str, text: str | None) -> list[Grammar]:
    return [] if text is None else [Grammar(kind, text, field)]


def _literal(text: str) -> str:
    """A regular expression for just this text."""
    return "".join(f"\\{letter}" if letter in META_CHARACTERS else letter for letter in text)
