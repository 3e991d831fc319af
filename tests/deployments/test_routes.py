"""Which routes there are, whom they are open to, and what is said of our own faults."""

import pytest

from deployments import service
from deployments.messages import Submit
from tests.deployments.front import ENDPOINTS, body_for, check_error, running


@pytest.mark.parametrize(
    "path", ["/index.html", "/v1", "/v1/completions/", "/metrics", "/docs", "/openapi.json"]
)
def test_there_are_no_other_routes(front, path):
    check_error(front.http.get(path), 404, code="unknown_url")
    check_error(front.http.post(path, json={}), 404, code="unknown_url")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_our_own_fault_says_nothing(front, path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("/home/secret 0x7f00")

    monkeypatch.setattr(service, "check_model", broken)
    error = check_error(front.post(path), 500)
    assert error["message"] == "The server had an error while processing your request."
    assert "a request failed" in caplog.text


def test_a_key_opens_every_route_but_the_probes():
    digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # of "key"
    with running(api_keys=("plain-key", digest)) as front:
        for path in ("/livez", "/readyz", "/health"):
            assert front.http.get(path).status_code == 200
        for method, path in (("GET", "/v1/models"), ("POST", ENDPOINTS[0]), ("GET", "/metrics")):
            for header in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic key"}):
                response = front.http.request(method, path, headers=header)
                check_error(response, 401, code="invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        assert (front.client.counts.received, front.client.counts.rejected) == (9, 9)
        salts = set()
        for key in ("plain-key", "key"):
            headers = {"authorization": f"Bearer {key}"}
            body = body_for(ENDPOINTS[0], cache_salt="s")
            assert front.http.post(ENDPOINTS[0], json=body, headers=headers).status_code == 200
            salts.add(front.driver.of(Submit)[-1].salt)
        assert len(salts) == 2
        assert all(salt.endswith("/s") and "key" not in salt for salt in salts)
