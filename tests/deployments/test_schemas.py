import json

import pytest

from deployments import schemas
from deployments.errors import RequestError
from deployments.schemas import parse_chat, parse_completion


def completion(**fields):
    return parse_completion(json.dumps({"model": "m", "prompt": "x", **fields}).encode())


def chat(**fields):
    messages = [{"role": "user", "content": "x"}]
    return parse_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode())


def refusal(parse, **fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    return caught.value


BOTH = pytest.mark.parametrize("parse", [completion, chat])


@BOTH
@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 8], [0, 9, 10**9, -1]),
        ("temperature", [0, -0.0, 1e-9, 2, 1], [-1, 2.0001]),
        ("top_p", [1e-9, 1], [0, 1.1]),
        ("top_k", [-1, 0, 10**6], [-2, 2**31]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("repetition_penalty", [0.1, 100], [0, 100.1]),
        ("seed", [-(2**63), 2**63 - 1, 2**53 + 1], [2**63, 2**64, -(2**63) - 1]),
        ("max_tokens", [1, 2**31 - 1], [0, -1, 10**12]),
        ("min_tokens", [0, 5], [-1]),
        ("stop", ["x" * 256, ["a"] * 4, []], ["", "x" * 257, ["a"] * 5, [""]]),
        ("stop_token_ids", [[0], [], [1] * 128], [[-1], [2**31], [1] * 129]),
        ("logit_bias", [{}, {"5": 100}, {"5": -100}], [{"5": 101}, {"abc": 1}, {"1.0": 1}]),
        ("prompt_logprobs", [0, 20], [-1, 21]),
        ("cache_salt", ["a", "x" * 128], ["", "x" * 129, "é", "a\n"]),
        ("user", ["someone"], ["", "x" * 129, "a\u2028"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_are_kept_and_name_the_field(parse, name, good, bad):
    for value in [None, *good]:
        assert getattr(parse(**{name: value}), name) == value or name == "logit_bias"
    for value in bad:
        error = refusal(parse, **{name: value})
        assert error.status == 400
        assert str(error.param).startswith(name)


@BOTH
@pytest.mark.parametrize("name", ["n", "seed", "max_tokens", "top_k", "min_tokens"])
@pytest.mark.parametrize("value", [True, "1", 1.5, 1.0, [], {}])
def test_an_integer_is_an_integer(parse, name, value):
    error = refusal(parse, **{name: value})
    assert (error.param, error.code) == (name, "invalid_value")
    assert "must be an integer or null, not" in error.message


@BOTH
@pytest.mark.parametrize("name", ["stream", "ignore_eos"])
@pytest.mark.parametrize("value", [1, "true", 0.0])
def test_a_flag_is_true_or_false(parse, name, value):
    assert refusal(parse, **{name: value}).param == name


def test_endpoints_have_their_own_logprobs():
    assert completion(logprobs=20).logprobs == 20
    assert refusal(completion, logprobs=21).param == "logprobs"
    assert refusal(completion, logprobs=True).param == "logprobs"
    assert chat(logprobs=True, top_logprobs=20).top_logprobs == 20
    assert refusal(chat, logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refusal(chat, top_logprobs=2).param == "top_logprobs"
    assert refusal(chat, logprobs=5).param == "logprobs"


def test_an_unknown_field_is_named_with_the_nearest():
    error = refusal(chat, max_token=5)
    assert error.message == "Unknown field 'max_token': did you mean 'max_tokens'?"
    assert (error.param, error.code) == ("max_token", "unknown_parameter")
    assert refusal(completion, qwertyuiop=5).message == "Unknown field 'qwertyuiop': leave it out."
    error = refusal(chat, messages=[{"role": "user", "contents": "x"}])
    assert error.message == "Unknown field 'messages[0].contents': did you mean 'content'?"
    assert error.param == "messages[0].contents"


def test_a_long_or_odd_name_is_not_quoted():
    for name in ("x" * 5000, "\x1b[31m", "a\nb`"):
        assert "'?'" in refusal(chat, **{name: 1}).message


def test_what_is_missing_is_named():
    with pytest.raises(RequestError) as caught:
        parse_chat(b'{"messages": [{"role": "user", "content": "x"}]}')
    assert (caught.value.param, caught.value.code) == ("model", "missing_parameter")
    error = refusal(chat, messages=[{"content": "x"}])
    assert error.param == "messages[0].role"


@pytest.mark.parametrize(
    ("name", "asking"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("audio", {"voice": "x"}),
        ("modalities", ["audio"]),
        ("store", True),
        ("chat_template", "{{ 1 }}"),
        ("reasoning_effort", "high"),
        ("functions", [{}]),
        ("prediction", {}),
        ("metadata", {"a": "b"}),
    ],
)
def test_what_is_not_offered_is_refused_unless_neutral(name, asking):
    error = refusal(chat, **{name: asking})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    for neutral in schemas.NEUTRAL[name]:
        chat(**{name: neutral})


def test_completions_have_fields_that_are_not_offered_too():
    assert refusal(completion, prompt_embeds="gASV").code == "unsupported_parameter"
    assert refusal(completion, suffix="x").code == "unsupported_parameter"
    assert refusal(completion, best_of=3).code == "unsupported_parameter"
    completion(best_of=2, n=2)
    completion(best_of=1, suffix="")


def test_fields_that_belong_together():
    assert refusal(chat, stream_options={"include_usage": True}).param == "stream_options"
    assert refusal(chat, stream=True, prompt_logprobs=1).param == "prompt_logprobs"
    assert refusal(chat, max_tokens=5, max_completion_tokens=6).param == "max_tokens"
    assert refusal(completion, max_tokens=0).param == "max_tokens"
    chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    chat(max_tokens=5, max_completion_tokens=5)
    completion(max_tokens=0, echo=True)


def test_messages_are_bounded():
    message = {"role": "user", "content": "x"}
    chat(messages=[message] * 2048)
    for messages in ([], [message] * 2049, None, "x", [{**message, "role": "USER"}], [1]):
        assert str(refusal(chat, messages=messages).param).startswith("messages")
    assert refusal(chat, messages=[{**message, "name": "x" * 129}]).param == "messages[0].name"


NOT_JSON = [
    b"",
    b"{",
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": "\\ud800"}',
    b'{"a": "\xff"}',
    b"\xef\xbb\xbf{}",
    '{"a": 1}'.encode("utf-16"),
    b"{} x",
    b"{} // no",
    b"[" * 1_000_000,
    b'{"tools":' + b"[" * 100_000,
    b'{"tools":' + b'{"a":' * 100_000,
]
NOT_A_BODY = [
    b"null",
    b"[]",
    b'"x"',
    b"1",
    b"{}",
    b'{"model": 1}',
    b'{"seed": ' + b"1" * 5000 + b"}",
]


@pytest.mark.parametrize("parse", [parse_completion, parse_chat])
@pytest.mark.parametrize("data", NOT_JSON + NOT_A_BODY, ids=lambda data: repr(data[:16]))
def test_rubbish_is_a_bad_request(parse, data):
    with pytest.raises(RequestError) as caught:
        parse(data)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1" * 5000])
def test_numbers_json_does_not_have_are_refused(number):
    with pytest.raises(RequestError):
        parse_completion(f'{{"model": "m", "prompt": "x", "temperature": {number}}}'.encode())


def test_the_last_of_equal_keys_counts_and_nul_is_a_character():
    request = parse_completion(b'{"model": "a", "model": "b", "prompt": "\\u0000"}')
    assert (request.model, request.prompt) == ("b", "\0")
