"""Bad input, everywhere: never a 5xx, and the service is as it was."""

import pytest

from deployments.messages import Submit
from tests.deployments.fakes import EOS
from tests.deployments.front import ENDPOINTS, check_error

NUMBERS = {
    "temperature": [-1, 2.0001, "1", True, [], 1e300],
    "top_p": [0, 1.1, "x"],
    "top_k": [-2, 2**31, 1.5],
    "n": [0, 9, 10**9, 1.0, True],
    "max_tokens": [0, -1, 512, 513, 10**12, "5"],
    "min_tokens": [-1, 17000],
    "seed": [2**64, 1.5, "x"],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1],
    "logit_bias": [{"abc": 1}, {"-1": 1}, {"260": 1}, {"1": 101}, {"1": "x"}, [1], {str(2**70): 1}],
    "stop": ["", ["a"] * 5, "x" * 257, [1], {}],
    "stop_token_ids": [[-1], [260], [2**31], "x", ["1"]],
    "stream": [1, "true"],
    "stream_options": [{"include_usage": True}, 5],
    "prompt_logprobs": [-1, 21, True],
    "cache_salt": ["", "\n", "x" * 129, 5],
    "model": [None, 5, "", "other", ...],
    "tools": [[{}]],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, "json_object", {}],
    "guided_json": [5, "", [1]],
    "guided_regex": ["", 5, "x" * (2**16 + 1)],
    "guided_choice": [[], [""], "yes", [1]],
    "structured_outputs": [{"regexp": "x"}, {"regex": "x", "choice": ["x"]}, "x"],
    "nonsense": [None],
}


PROMPTS = ["", [], [[]], [""], [-1], [260], [2**31], [2**70], ["a", 1], [[1], "a"], [None], 5, None]

PROMPTS += [["a"] * 65, {}, True, [1.5], "a" * 512, "a" * 513, [65] * 600, ["a", ""], ...]


MESSAGES = [
    [],
    None,
    5,
    "x",
    [5],
    [{}],
    [{"role": "user"}],
    [{"role": "robot", "content": "x"}],
    ...,
]

MESSAGES += [
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "tool", "content": "x"}],
    [{"role": "assistant", "tool_calls": [{}]}],
    [{"role": "user", "content": "x", "name": "n" * 1000}],
    [{"role": "user", "content": "x"}] * 3000,
    [{"role": "user", "content": "x" * 600}],
]


GOOD_PROMPTS = [" ", "\0", "\u200d\u202e\ufeff", "e" + "\u0301" * 100, "</s><s>", [EOS], [0], [259]]


def bad_bodies():
    for path in ENDPOINTS:
        for name, values in NUMBERS.items():
            yield from ((path, {name: value}) for value in values)
    yield from ((ENDPOINTS[0], {"prompt": prompt}) for prompt in PROMPTS)
    yield from ((ENDPOINTS[1], {"messages": messages}) for messages in MESSAGES)
    yield from ((ENDPOINTS[0], {"logprobs": value}) for value in (-1, 21, True, "1"))
    yield from ((ENDPOINTS[1], {"logprobs": value}) for value in (1, "yes"))


def test_bad_bodies_are_bad_requests(front):
    before = front.post(ENDPOINTS[0], seed=1).json()["choices"]
    front.driver.received.clear()
    for path, fields in bad_bodies():
        response = front.post(path, **fields)
        is_other = fields.get("model") in ("", "other")
        error = check_error(response, 404 if is_other else 400)
        assert error["param"] is not None, (fields, error)
        assert len(error["message"]) < 400
    assert front.driver.of(Submit) == []
    assert front.client.num_live == 0
    assert front.post(ENDPOINTS[0], seed=1).json()["choices"] == before


def test_odd_prompts_are_answered(front):
    for prompt in GOOD_PROMPTS:
        assert front.post(ENDPOINTS[0], prompt=prompt).status_code == 200
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
            assert front.post(ENDPOINTS[1], messages=messages).status_code == 200


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[" * 1_000_000,
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b'{"model": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b'{"tools": ' + b'{"a":' * 100_000,
        b'{"model": "m", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_rubbish_is_a_bad_request(front, path, data):
    headers = {"content-type": "application/json"}
    check_error(front.http.post(path, content=data, headers=headers), 400)
