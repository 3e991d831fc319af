"""The live page without a browser: what is remembered, what is sent, who may see it."""

import asyncio
import base64
import hashlib
import json
import re

import pytest

from deployments import page, routes
from deployments.counters import Counters
from deployments.counting import TTFT_BOUNDS, RequestCounts
from deployments.domain import StepDone
from deployments.exchange import encode_json
from deployments.messages import (
    Distribution,
    EngineState,
    EngineView,
    IngressBeat,
    Sample,
    Submit,
    Watch,
    decode_from_ingress,
    decode_to_ingress,
)
from deployments.requests import Request
from deployments.scheduler import Scheduler
from deployments.viewpoint import MAX_SAMPLES, MAX_STEPS, WATCH_S, Viewpoint
from deployments.watching import EngineWatch
from tests.deployments.front import check_error, running, wait_for
from tests.headers import header_of
from workers.config import EngineConfig
from workers.protocol import Ack, Hello, Mode, Padding, encode

CONFIG = EngineConfig(tp_size=4, dp_size=2, enable_dp_attention=True, device="cpu")


def viewpoint(config=CONFIG):
    return Viewpoint(config, Counters.of(config.layout))


def scheduler():
    return Scheduler(num_pages=9, page_size=16, max_num_seqs=4, max_num_batched_tokens=64)


def step(number, *, rows=(3, 0), padded=(4, 4), seconds=(0.1, 0.2, 0.3, 0.4)):
    header = header_of(
        rows, padded_rows=padded, step=number, mode=Mode.DECODE, padding=Padding.MAX_LEN
    )
    acks = {
        rank: Ack(1, rank, number, b"", b"", b"", took, logprobs=())
        for rank, took in enumerate(seconds)
    }
    return StepDone(number, [], [], acks, 0, header, 0, 0.0)


def state_of(view, schedulers=(), hellos=(), *, epoch=1, reason=""):
    return view.state(schedulers, hellos, epoch=epoch, reason=reason, num_preemptions=2)


def sample(number):
    return Sample(number, 1.0, 10, 20, 30, 1, 0.1, 0.2, 3, 4)


def engine_state(**fields):
    told = state_of(viewpoint(), reason="starting")
    return EngineState(**{name: getattr(told, name) for name in told.__struct_fields__} | fields)


# What the driver remembers.


def test_a_second_becomes_a_sample():
    view = viewpoint()
    counts = RequestCounts()
    view.sample(10.0, [scheduler()], {b"a": counts.ttft.distribution()})
    view._counters.num_steps, view._counters.num_output_tokens = 5, 50
    for seconds in (0.03, 0.05):
        counts.ttft.observe(seconds)
    view.sample(10.9, [scheduler()], {b"a": counts.ttft.distribution()})
    assert not view._samples
    view.sample(11.5, [scheduler()], {b"a": counts.ttft.distribution()})
    (one,) = view._samples
    assert (one.number, one.seconds, one.num_steps, one.num_output_tokens) == (0, 1.5, 5, 50)
    assert one.num_first_tokens == 2
    assert one.mean_ttft_s == pytest.approx(0.04)
    assert 0.04 <= one.p95_ttft_s <= 0.05
    view.sample(12.5, [], {b"a": counts.ttft.distribution()})
    assert (view._samples[-1].num_steps, view._samples[-1].num_first_tokens) == (0, 0)


def test_an_ingress_that_leaves_or_comes_takes_nothing_away():
    view = viewpoint()
    seen = Distribution((1, *[0] * len(TTFT_BOUNDS)), 0.001)
    view.sample(0.0, [], {b"a": seen})
    view.sample(1.0, [], {b"b": seen})
    view.sample(2.0, [], {})
    view.sample(3.0, [], {b"c": Distribution((1, 2), 1.0)})  # with other buckets: left out
    assert [one.num_first_tokens for one in view._samples] == [1, 0, 0]


def test_only_minutes_are_kept():
    view = viewpoint()
    for second in range(MAX_SAMPLES + 20):
        view.sample(float(second), [], {})
    assert len(view._samples) == MAX_SAMPLES
    assert view._samples[-1].number == MAX_SAMPLES + 18


def test_watchers_are_told_what_they_lack_and_forgotten():
    view = viewpoint()
    for second in range(5):
        view.sample(float(second), [], {})
    view.watch(b"new", -1, 5.0)
    view.watch(b"old", 2, 5.0)
    assert view.is_watched
    assert view.watchers(5.1) == 2
    told = {who: [one.number for one in samples] for who, samples in view.due()}
    assert told == {b"new": [0, 1, 2, 3], b"old": [3]}
    assert [samples for _, samples in view.due()] == [(), ()]
    assert view.watchers(5.1 + WATCH_S) == 0
    assert not view.is_watched


def test_a_view_tells_of_each_step_once_and_of_each_rank():
    view = viewpoint()
    view.watch(b"a", -1, 0.0)
    state_of(view)
    view.on_step(step(7))
    view.on_step(step(8, rows=(0, 9), padded=(12, 12)))
    busy, idle = scheduler(), scheduler()
    busy.add(Request(key=(b"a", 1), tokens=[1, 2], num_prompt=2, max_tokens=3, arrival=0))
    hellos = [Hello(1, 1, rank, "10.0.0.1", 1, "cpu") for rank in range(4)]
    told = state_of(view, [busy, idle], hellos)
    assert [(s.number, s.num_rows, s.padded_rows, s.seconds) for s in told.steps] == [
        (7, (3, 0), (4, 4), 0.4),
        (8, (0, 9), (12, 12), 0.4),
    ]
    assert [(rank.step, rank.seconds) for rank in told.ranks] == [
        (8, 0.1),
        (8, 0.2),
        (8, 0.3),
        (8, 0.4),
    ]
    assert [replica.ranks for replica in told.replicas] == [(0, 1), (2, 3)]
    assert [replica.num_waiting for replica in told.replicas] == [1, 0]
    assert told.replicas[0].num_pages == 9
    assert told.ready
    assert state_of(view).steps == ()
    for number in range(MAX_STEPS + 5):
        view.on_step(step(number))
    assert len(state_of(view).steps) == MAX_STEPS


def test_a_new_epoch_has_new_ranks():
    view = viewpoint()
    view.watch(b"a", -1, 0.0)
    state_of(view)
    view.on_step(step(7))
    view._counters.last_failure = "x" * 9000 + "\nTraceback"
    told = state_of(view, epoch=2, reason="rank 1 died")
    assert {rank.step for rank in told.ranks} == {-1}
    assert (told.ready, told.reason, told.last_failure) == (False, "rank 1 died", "x" * 300 + "…")
    assert [replica.num_pages for replica in told.replicas] == [0, 0]


def test_messages_survive_the_wire():
    view = EngineView(engine_state(collectives=(("tp", "all_reduce", "symmetric", "", 5),)))
    assert decode_to_ingress(encode(view)) == view
    assert decode_from_ingress(encode(Watch(5))) == Watch(5)
    assert len(encode(EngineView(engine_state(), tuple(map(sample, range(MAX_SAMPLES)))))) < 20_000


def test_a_view_has_no_place_for_what_people_say():
    """Texts in it are devices, reasons, and names of collectives; all else is numbers."""
    texts = re.findall(r'"(\w+)": *"', json.dumps(json.loads(encode_json(engine_state()))))
    assert set(texts) <= {"reason", "last_failure", "device"}


# What an ingress passes on.


def test_samples_are_kept_for_the_next_page():
    watch = EngineWatch()
    watch.on_view(EngineView(engine_state(), (sample(0), sample(1))))
    watch.on_view(EngineView(engine_state(), (sample(1), sample(2))))
    assert [one.number for one in watch.samples_after(-1)] == [0, 1, 2]
    assert [one.number for one in watch.samples_after(1)] == [2]
    assert [one.number for one in watch.samples_after(99)] == [0, 1, 2]  # another driver's number
    watch.forget()
    assert watch.samples_after(-1) == ()


def test_every_stream_gets_the_next_view():
    async def main():
        watch = EngineWatch()
        streams = [asyncio.create_task(watch.next(5.0)) for _ in range(3)]
        await asyncio.sleep(0)
        streams[0].cancel()
        watch.on_view(EngineView(engine_state(epoch=4)))
        epochs = [(await one).epoch for one in streams[1:]]
        return epochs, await watch.next(0.01)

    assert asyncio.run(main()) == ([4, 4], None)


# Routes.


@pytest.fixture(scope="module")
def front():
    with running() as front:
        yield front


def looks(front, query="", num=1, **headers):
    """The first events of a stream, while the driver tells what it knows."""
    found = []
    front.driver.received.clear()
    with front.http.stream("GET", f"/api/engine{query}", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        wait_for(lambda: front.driver.of(Watch))
        front.driver.say(EngineView(engine_state(), (sample(0), sample(1))))
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                if len(found) == num:
                    return found
                front.driver.say(EngineView(engine_state(), (sample(1), sample(2))))
    return found


def test_the_page_is_whole_and_its_policy_names_what_runs(front):
    response = front.http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(
        rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; ")
    )
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(
        r"""(src|href)=["']?(https?:)?//|@import|url\(|\son\w+="|\sstyle=""", response.text
    )
    assert front.http.head("/").headers["content-length"] == str(len(page.load().html))
    assert front.http.head("/").content == b""
    check_error(front.http.post("/", json={}), 405)


def test_other_routes_run_nothing(front):
    for path in ("/livez", "/v1/models", "/nowhere"):
        assert front.http.get(path).headers["content-security-policy"] == "default-src 'none'"


def test_a_stream_of_looks(front):
    first, second = looks(front, num=2)
    assert first["model"] == "some/model"
    assert first["state"]["replicas"][1]["ranks"] == [2, 3]
    assert [one[0] for one in first["samples"]] == [0, 1]
    assert [one[0] for one in second["samples"]] == [2]
    assert [one[0] for one in looks(front, "?after=1")[0]["samples"]] == [2]
    assert len(looks(front, "?after=x%00")[0]["samples"]) == 3
    assert front.driver.of(Submit) == []


def test_nobody_looks_nobody_asks(front):
    looks(front)

    def has_left():
        front.driver.say(EngineView(engine_state()))  # a stream looks up when a view comes
        return front.client.watch.num_streams == 0

    wait_for(has_left)
    front.driver.received.clear()
    wait_for(lambda: len(front.driver.of(IngressBeat)) > 1)  # what was on its way is here
    front.driver.received.clear()
    wait_for(lambda: len(front.driver.of(IngressBeat)) > 2)
    assert front.driver.of(Watch) == []


def test_a_stream_ends_by_itself_and_says_when_the_driver_is_away(front, monkeypatch):
    monkeypatch.setattr(routes, "LOOK_S", 0.2)
    monkeypatch.setattr(routes, "AWAY_S", 0.1)
    text = front.http.get("/api/engine").text
    assert text.endswith("\n\n")
    first = json.loads(text.split("\n\n")[0].removeprefix("data: "))
    assert first["state"] is None
    assert front.http.head("/api/engine").content == b""
    check_error(front.http.post("/api/engine", json={}), 405)


def test_the_page_is_open_and_what_it_shows_is_not():
    with running(api_keys=("secret",)) as front:
        assert front.http.get("/").status_code == 200
        check_error(front.http.get("/api/engine"), 401, code="invalid_api_key")
        check_error(front.http.get("/api/engine?key=secret"), 401)
        assert looks(front, authorization="Bearer secret")[0]["model"] == "some/model"
