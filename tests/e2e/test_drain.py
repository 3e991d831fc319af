"""An application that Serve deletes: what it has begun is ended first."""

import httpx
from ray import serve

from tests.e2e.conftest import APP, LIMIT_S, deployed

LONG = {"model": "bundled", "prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}


def test_what_runs_when_the_application_is_deleted_is_answered_to_the_end(cluster):
    with (
        deployed(cluster, drain_s=LIMIT_S) as url,
        httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=LIMIT_S) as answer,
    ):
        events = (line for line in answer.iter_lines() if line)
        first = next(events)
        serve.delete(APP, _blocking=False)
        *more, last = events
    assert last == "data: [DONE]"
    assert '"finish_reason":"length"' in more[-1]
    assert first.startswith("data: {")
