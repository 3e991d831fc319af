"""The ways clients say what their answer looks like, and the one way the driver hears it."""

import json
import string

import msgspec
import pytest

from deployments.errors import RequestError
from deployments.grammar import GrammarRefused, State, Vocabulary, compile_grammar
from deployments.messages import Grammar
from deployments.response_format import grammar_of
from deployments.schemas import parse_chat, parse_completion

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{},"a":{}}}'


def asked(**fields):
    return grammar_of(
        parse_completion(json.dumps({"model": "m", "prompt": "x", **fields}).encode())
    )


def refusal(**fields):
    with pytest.raises(RequestError) as caught:
        asked(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "guided_regex": None}, None),
        ({"structured_outputs": {}}, None),
        ({"guided_json": SCHEMA}, Grammar("json", SCHEMA_TEXT, "guided_json")),
        ({"guided_json": SCHEMA_TEXT}, Grammar("json", SCHEMA_TEXT, "guided_json")),
        ({"guided_regex": "a+"}, Grammar("regex", "a+", "guided_regex")),
        ({"guided_choice": ["a", "b|c"]}, Grammar("regex", r"a|b\|c", "guided_choice")),
        ({"guided_grammar": "start: A"}, Grammar("lark", "start: A", "guided_grammar")),
        (
            {"structured_outputs": {"choice": ["a"]}},
            Grammar("regex", "a", "structured_outputs.choice"),
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            Grammar("json", SCHEMA_TEXT, "structured_outputs.json"),
        ),
        (
            {"response_format": {"type": "json_object"}},
            Grammar("json", '{"type":"object"}', "response_format"),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            Grammar("json", SCHEMA_TEXT, "response_format.json_schema.schema"),
        ),
    ],
)
def test_every_way_to_ask_becomes_one_grammar(fields, grammar):
    assert asked(**fields) == grammar


def test_a_chat_asks_in_the_same_fields():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "guided_regex": "a"}
    assert grammar_of(parse_chat(json.dumps(body).encode())) == Grammar(
        "regex", "a", "guided_regex"
    )


def test_two_grammars_at_once_are_refused():
    error = refusal(guided_regex="a", response_format={"type": "json_object"})
    assert error.message == (
        "'response_format' and 'guided_regex' both say what the answer looks like: "
        "send one of them."
    )
    assert error.param == "guided_regex"
    assert refusal(structured_outputs={"regex": "a", "json": "{}"}).status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"regexp": "x"}}, "structured_outputs.regexp"),
        ({"guided_json": {"enum": ["x" * 2**16]}}, "guided_json"),
        ({"guided_choice": ["x" * 2**15] * 3}, "guided_choice"),
    ],
)
def test_what_is_wrong_is_named(fields, param):
    error = refusal(**fields)
    assert (error.status, error.param) == (400, param)
    assert param in error.message


TEXTS = [*string.printable, "a b", "\u00e9\u65e5", "x\ny", "(a|b)*", "\\d+", "{}[]", "</s>"]


def test_choices_are_taken_to_the_letter():
    vocabulary = Vocabulary.of_bytes()
    for text in TEXTS:
        grammar = asked(guided_choice=[text])
        assert grammar is not None
        matcher = compile_grammar(grammar, vocabulary)
        states = [matcher.accept(byte) for byte in text.encode()]
        assert states[:-1] == [State.OPEN] * (len(states) - 1)
        assert states[-1] is State.COMPLETE


def test_a_grammar_goes_over_the_wire():
    grammar = Grammar("json", SCHEMA_TEXT, "guided_json")
    data = msgspec.msgpack.encode(grammar)
    assert msgspec.msgpack.decode(data, type=Grammar) == grammar


def test_only_the_empty_text_is_no_answer():
    with pytest.raises(GrammarRefused, match="only the empty text"):
        compile_grammar(Grammar("regex", ""), Vocabulary.of_bytes())
