"""The live page through Ray Serve and HAProxy: its stream comes view by view, not in one piece."""

import json
import time

import httpx
import pytest

from tests.e2e.conftest import deployed

pytestmark = pytest.mark.timeout(180)


def test_views_come_through_the_proxy_one_by_one(cluster):
    with deployed(cluster, tp_size=2) as url, httpx.Client(base_url=url, timeout=20) as http:
        page = http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "'sha256-" in page.headers["content-security-policy"]
        arrivals, looks = [], []
        with http.stream("GET", "/api/engine") as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    arrivals.append(time.monotonic())
                    looks.append(json.loads(line.removeprefix("data: ")))
                if len(looks) == 8:
                    break
        assert all(look["state"]["ready"] for look in looks)
        assert [rank["rank"] for rank in looks[-1]["state"]["ranks"]] == [0, 1]
        assert any(look["samples"] for look in looks)
        assert 1.0 < arrivals[-1] - arrivals[0] < 10.0  # four a second
