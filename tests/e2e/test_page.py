"""The live page through Ray Serve and HAProxy: its stream comes view by view, not in one piece."""

import json

import httpx

from tests.e2e.conftest import LIMIT_S, deployed


def test_views_come_through_the_proxy_one_by_one(cluster):
    with deployed(cluster, tp_size=2) as url, httpx.Client(base_url=url, timeout=LIMIT_S) as http:
        page = http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "'sha256-" in page.headers["content-security-policy"]
        with http.stream("GET", "/api/engine") as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            looks = (json.loads(line.removeprefix("data: ")) for line in lines)
            looks = (look for look in looks if look["state"])  # a late driver has none to show
            first = next(looks)
            assert first["state"]["ready"]
            assert [rank["rank"] for rank in first["state"]["ranks"]] == [0, 1]
            # What is asked after the first view has come can be seen only by those that follow.
            asked = {"model": "bundled", "prompt": "a", "max_tokens": 1}
            http.post("/v1/completions", json=asked).raise_for_status()
            num_steps = first["state"]["num_steps"]
            assert any(look["state"]["num_steps"] > num_steps for look in looks)
            assert any(look["samples"] for look in looks)
