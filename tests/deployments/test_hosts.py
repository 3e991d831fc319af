"""The Host header: which names the service answers under."""

import socket

import pytest

from deployments.config import ServiceConfig
from deployments.hosts import Hosts, check_host
from deployments.messages import Submit
from tests.deployments.front import ENDPOINTS, body_for, check_error, running

LIST = ("api.example.com", "*.internal", "10.0.0.7", "::1")


@pytest.mark.parametrize(
    "header",
    [
        *("api.example.com", "API.Example.COM", "api.example.com.", "api.example.com:8000"),
        *("a.internal", "a.b.internal:1", "10.0.0.7:80", "[::1]", "[::1]:8000", " a.internal "),
    ],
)
def test_what_is_in_the_list_may_go_on(header):
    assert Hosts(LIST).allow(header)


@pytest.mark.parametrize(
    "header",
    [
        *("", "example.com", "internal", ".internal", "api.example.com.evil.org", "evilinternal"),
        *("api.example.com@evil.org", "evil.org:api.example.com", "api.example.com:80:80", "::1"),
        *("[::1", "10.0.0.70", "api.example.com,evil.org", "api.example.com/", "*.internal:x"),
    ],
)
def test_all_else_is_turned_away(header):
    assert not Hosts(LIST).allow(header)
    assert Hosts(()).allow(header)


@pytest.mark.parametrize("host", ["localhost", "a_b.c-d", "*.example.com", "127.0.0.1", "fe80::1"])
def test_hosts_of_a_list(host):
    check_host(host)
    assert ServiceConfig.from_args({"allowed_hosts": [host]}).service.allowed_hosts == (host,)


@pytest.mark.parametrize(
    "host", ["", "*", "http://a", "a:80", "[::1]", "a b", "*.*.a", "a.*", "-a", "a..b", "a/b"]
)
def test_what_is_no_host_is_refused_with_what_to_write(host):
    with pytest.raises(ValueError, match="is no host: give a name or an address without scheme"):
        ServiceConfig.from_args({"allowed_hosts": [host]})


def test_a_request_under_another_name_is_turned_away():
    with running(allowed_hosts=("api.example.com",)) as front:
        counts = front.client.counts
        before = counts.received, counts.rejected
        mine, other = {"host": "api.example.com:8000"}, {"host": "evil.example.org"}
        for path in ("/livez", "/readyz", "/health"):
            assert front.http.get(path, headers=other).status_code == 200
        for path in ("/", "/v1/models", "/api/engine", "/nowhere"):
            check_error(front.http.get(path, headers=other), 421, code="misdirected_request")
        for path in ENDPOINTS:
            body = body_for(path, max_tokens=2)
            check_error(front.http.post(path, json=body, headers=other), 421)
            assert front.http.post(path, json=body, headers=mine).status_code == 200
        assert len(front.driver.of(Submit)) == 2
        assert (counts.received - before[0], counts.rejected - before[1]) == (8, 6)


def test_two_names_must_both_be_ours():
    """What a server between may have let through; ours may refuse it by itself."""
    with running(allowed_hosts=("api.example.com",)) as front:
        address = front.url.removeprefix("http://").split(":")
        for hosts in (b"host: evil.org\r\nhost: api.example.com\r\n", b""):
            with socket.create_connection(address) as connection:
                connection.sendall(b"GET /v1/models HTTP/1.0\r\n" + hosts + b"\r\n")
                assert connection.recv(1000).split()[1] in (b"400", b"421")
