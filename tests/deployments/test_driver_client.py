"""The line to the driver, against a driver that dies, stammers and falls silent."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from deployments.driver_client import DriverClient
from deployments.errors import (
    EngineStopping,
    EngineUnavailable,
    GenerationFailed,
    Overloaded,
    RequestError,
    ServiceError,
)
from deployments.generations import Event, GenerateSpec
from deployments.messages import (
    Cancel,
    DriverBeat,
    Finish,
    Grammar,
    IngressBeat,
    RequestFailed,
    Submit,
    Tokens,
)
from tests.deployments.fakes import FakeDriver, counting, saying
from workers.protocol import Sampling, pack, unpack


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="ls-") as short:  # a Unix socket's name is short
        yield Path(short)


@pytest.fixture
def driver(folder):
    driver = FakeDriver(folder)
    driver.start()
    yield driver
    driver.stop()


@asynccontextmanager
async def connected(
    driver: FakeDriver, *, node_id: str = "node", resume_wait_s: float = 60.0, wait: bool = True
) -> AsyncIterator[DriverClient]:
    client = DriverClient(
        driver.locate, name="ingress", node_id=node_id, resume_wait_s=resume_wait_s
    )
    await client.start()
    try:
        if wait:
            await until(lambda: client.ready)
        yield client
    finally:
        await client.close()


async def until(condition, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def spec(max_tokens: int = 20, *, prompt: str = "hello", nonce: int = 0) -> GenerateSpec:
    return GenerateSpec(
        prompt=pack(prompt.encode()),
        max_tokens=max_tokens,
        stop_token_ids=(256,),
        sampling=Sampling(seed=7, nonce=nonce),
    )


@dataclass
class Heard:
    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events]

    @property
    def indexes(self) -> list[int]:
        return [event.index for event in self.events]


async def listen(client: DriverClient, *specs: GenerateSpec, into: Heard | None = None) -> Heard:
    heard = into or Heard()
    async with client.generate(specs or (spec(),)) as generations:
        async for events in generations:
            heard.events += events
    return heard


def counted(num_tokens: int) -> list[int]:
    return [counting([], index, Sampling()) for index in range(num_tokens)]


@pytest.mark.parametrize("node_id", ["node", "another"], ids=["ipc", "tcp with curve"])
def test_tokens_come_in_order_and_end(driver, node_id):
    async def main():
        async with connected(driver, node_id=node_id) as client:
            return await listen(client, spec(20)), client.num_live

    heard, num_live = asyncio.run(main())
    assert heard.tokens == counted(20)
    assert heard.indexes == list(range(20))
    assert [e.finish_reason for e in heard.events] == [None] * 19 + ["length"]
    assert num_live == 0


def test_generations_of_one_request_share_an_iterator(driver):
    async def main():
        async with connected(driver) as client:
            return await listen(client, spec(5, nonce=0), spec(7, nonce=1), spec(3, nonce=2))

    heard = asyncio.run(main())
    by_choice = [[e.token for e in heard.events if e.choice == choice] for choice in range(3)]
    assert by_choice == [counted(5), counted(7), counted(3)]


def test_several_tokens_of_one_message_all_count(folder):
    driver = FakeDriver(folder, tokens_per_step=4)
    driver.start()

    async def main():
        async with connected(driver) as client:
            return await listen(client, spec(10))

    try:
        heard = asyncio.run(main())
    finally:
        driver.stop()
    assert heard.tokens == counted(10)
    assert heard.events[-1].finish_reason == "length"


def test_many_requests_at_once(driver):
    async def main():
        async with connected(driver) as client:
            return await asyncio.gather(*(listen(client, spec(30)) for _ in range(100)))

    assert all(heard.tokens == counted(30) for heard in asyncio.run(main()))


def test_a_restart_loses_and_doubles_nothing(driver):
    async def main():
        async with connected(driver) as client:
            heard = Heard()
            driver.most_tokens = 5
            listening = asyncio.create_task(listen(client, spec(60), into=heard))
            for then in (20, 40, None):
                await until(lambda: len(heard.events) == driver.most_tokens)
                await asyncio.to_thread(driver.restart)
                driver.most_tokens = then
            return await listening

    heard = asyncio.run(main())
    assert heard.tokens == counted(60)
    assert heard.indexes == list(range(60))
    submits = driver.of(Submit)
    assert [submit.epoch for submit in submits] == [1, 2, 3, 4]
    assert {(s.sampling.seed, s.sampling.nonce, s.num_prompt) for s in submits} == {(7, 0, 5)}
    sent = [unpack(submit.tokens).tolist() for submit in submits]
    assert all(tokens[:5] == list(b"hello") for tokens in sent)
    assert all(tokens[5:] == counted(len(tokens) - 5) for tokens in sent)
    assert [len(tokens) for tokens in sent] == sorted(len(tokens) for tokens in sent)


def test_tokens_of_an_old_epoch_are_dropped(driver):
    driver.step_s = 60  # nothing of its own

    async def main():
        async with connected(driver) as client:
            heard = Heard()
            listening = asyncio.create_task(listen(client, spec(2), into=heard))
            await until(lambda: driver.num_running == 1)
            request = driver.of(Submit)[0].request
            driver.say(Tokens(1, [request], [0], [65], []))
            await until(lambda: heard.events)
            await asyncio.to_thread(driver.restart)
            await until(lambda: len(driver.of(Submit)) == 2)
            driver.say(Tokens(1, [request], [1], [99], [(request, "length")]))
            driver.say(Tokens(2, [request], [0], [98], []))  # has it already
            driver.say(Tokens(2, [request], [1], [66], [(request, "length")]))
            return await listening, client.num_dropped

    heard, num_dropped = asyncio.run(main())
    assert heard.tokens == [65, 66]
    assert num_dropped == 2


def test_a_lost_token_is_asked_for_again(driver):
    driver.step_s = 60

    async def main():
        async with connected(driver) as client:
            heard = Heard()
            listening = asyncio.create_task(listen(client, spec(10), into=heard))
            await until(lambda: driver.num_running == 1)
            request = driver.of(Submit)[0].request
            driver.say(Tokens(1, [request], [0], [48], []))
            driver.say(Tokens(1, [request], [2], [49], []))
            await until(lambda: len(driver.of(Submit)) == 2)
            driver.step_s = 0.001
            return await listening

    heard = asyncio.run(main())
    assert heard.tokens == counted(10)
    first, second = driver.of(Submit)
    assert driver.of(Cancel) == [Cancel(first.request)]
    assert second.request != first.request
    assert unpack(second.tokens).tolist() == [*b"hello", 48]


def test_a_lost_ending_is_asked_for_again(driver):
    driver.step_s = 60

    async def main():
        async with connected(driver) as client:
            listening = asyncio.create_task(listen(client, spec(4)))
            await until(lambda: driver.num_running == 1)
            request = driver.of(Submit)[0].request
            driver.say(Tokens(1, [], [], [], [(request, "length")]))
            await until(lambda: len(driver.of(Submit)) == 2)
            driver.step_s = 0.001
            return await listening

    assert asyncio.run(main()).tokens == counted(4)


def test_not_ready_is_known_at_once_and_streams_wait(driver):
    async def main():
        async with connected(driver) as client:
            heard = Heard()
            driver.most_tokens = 20
            listening = asyncio.create_task(listen(client, spec(200), into=heard))
            await until(lambda: len(heard.events) > 3)
            driver.ready = False
            await until(lambda: not client.ready)  # by a beat: they go on
            late = asyncio.create_task(listen(client, spec(5)))
            await asyncio.sleep(0.05)
            waited = not late.done() and not listening.done()
            driver.most_tokens = None
            await asyncio.to_thread(driver.restart)
            return waited, await listening, await late

    waited, heard, late = asyncio.run(main())
    assert waited
    assert heard.tokens == counted(200)
    assert late.tokens == counted(5)


def test_waiting_has_an_end(driver):
    driver.most_tokens = 10

    async def main():
        async with connected(driver, resume_wait_s=0.2) as client:
            heard = Heard()
            listening = asyncio.create_task(listen(client, spec(500), into=heard))
            await until(lambda: len(heard.events) > 3)
            driver.ready = False
            late = asyncio.create_task(listen(client, spec(5)))
            return await asyncio.gather(listening, late, return_exceptions=True), client.num_live

    ends, num_live = asyncio.run(main())
    assert [type(end) for end in ends] == [EngineUnavailable, EngineUnavailable]
    assert num_live == 0


def test_before_the_engine_was_ever_ready_requests_are_refused(driver):
    driver.ready = False

    async def main():
        async with connected(driver, wait=False) as client:
            await until(lambda: client.info is not None)
            await asyncio.sleep(0.05)
            with pytest.raises(EngineUnavailable):
                client.generate([spec()])
            return client.ready

    assert asyncio.run(main()) is False


def test_a_silent_driver_is_looked_for_and_found(folder):
    driver = FakeDriver(folder, beat_ms=40)
    driver.start()
    driver.most_tokens = 20

    async def main():
        async with connected(driver) as client:
            heard = Heard()
            listening = asyncio.create_task(listen(client, spec(40), into=heard))
            await until(lambda: len(heard.events) > 3)
            located = driver.num_located
            driver.beating = False
            await until(lambda: driver.num_located > located)
            ready = client.ready
            driver.beating, driver.most_tokens = True, None
            return ready, await listening

    try:
        ready, heard = asyncio.run(main())
    finally:
        driver.stop()
    assert not ready
    assert heard.tokens == counted(40)


def test_a_driver_elsewhere_is_found(driver, folder):
    driver.most_tokens = 20
    (folder / "two").mkdir()
    second = FakeDriver(folder / "two")

    async def main():
        async with connected(driver) as client:
            heard = Heard()
            listening = asyncio.create_task(listen(client, spec(40), into=heard))
            await until(lambda: len(heard.events) > 3)
            driver.locate = second.locate
            client._locate = second.locate
            await asyncio.to_thread(driver.stop)
            second.start()
            return await listening

    try:
        heard = asyncio.run(main())
    finally:
        second.stop()
    assert heard.tokens == counted(40)
    assert len(second.of(Submit)) == 1


def test_a_driver_that_is_not_there_yet_is_asked_for_again(driver):
    fails = [OSError("no actor"), RuntimeError("starting")]

    async def locate():
        if fails:
            raise fails.pop()
        return driver.info

    async def main():
        client = DriverClient(locate, name="ingress", node_id="node")
        await client.start()
        await until(lambda: client.ready)
        heard = await listen(client)
        await client.close()
        return heard

    assert asyncio.run(main()).tokens == counted(20)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RequestError), (429, Overloaded), (503, EngineUnavailable), (500, ServiceError)],
)
def test_a_refusal_keeps_its_status(driver, status, kind):
    driver.refusal = (status, "because", "prompt", "some_code")

    async def main():
        async with connected(driver) as client:
            with pytest.raises(kind) as caught:
                await listen(client)
            return caught.value, client.num_live

    error, num_live = asyncio.run(main())
    assert (type(error), error.status, num_live) == (kind, status, 0)
    if status == 400:
        assert (error.message, error.param, error.code) == ("because", "prompt", "some_code")


def test_a_stream_that_has_begun_waits_for_room(driver):
    driver.most_tokens = 20

    async def main():
        async with connected(driver) as client:
            heard = Heard()
            listening = asyncio.create_task(listen(client, spec(30), into=heard))
            await until(lambda: len(heard.events) > 3)
            driver.refusal = (429, "full", None, None)
            driver.most_tokens = None
            await asyncio.to_thread(driver.restart)
            await until(lambda: len(driver.of(Submit)) >= 2)
            driver.refusal = None
            return await listening

    assert asyncio.run(main()).tokens == counted(30)


def test_one_refused_generation_ends_its_siblings(driver):
    driver.step_s = 60

    async def main():
        async with connected(driver) as client:
            listening = asyncio.create_task(listen(client, spec(), spec()))
            await until(lambda: driver.num_running == 2)
            request = driver.of(Submit)[1].request
            driver.say(Tokens(1, [], [], [], [(request, "error")]))
            with pytest.raises(ServiceError):
                await listening
            await until(lambda: driver.num_running <= 1)
            return client.num_live

    assert asyncio.run(main()) == 0
    assert driver.of(Cancel) == [Cancel(driver.of(Submit)[0].request)]


def test_leaving_cancels_once(driver):
    driver.most_tokens = 20

    async def main():
        async with connected(driver) as client:
            async with client.generate([spec(400)]) as generations:
                await anext(generations)
                generations.cancel()
                generations.cancel()
            await until(lambda: driver.num_running == 0)
            async for _ in generations:
                pass  # what had come before is still there; then it ends
            return generations.cancelled, client.num_live

    assert asyncio.run(main()) == (True, 0)
    assert len(driver.of(Cancel)) == 1


def test_finish_tells_the_driver_where_and_ends_that_choice(driver):
    driver.most_tokens = 20

    async def main():
        async with connected(driver) as client:
            heard = Heard()
            async with client.generate([spec(400), spec(6)]) as generations:
                async for events in generations:
                    heard.events += events
                    generations.finish(0, 3)
            return heard, generations.cancelled

    heard, cancelled = asyncio.run(main())
    assert [e.token for e in heard.events if e.choice == 1] == counted(6)
    assert driver.of(Finish) == [Finish(driver.of(Submit)[0].request, 3)]
    assert driver.of(Cancel) == []
    assert not cancelled


def test_cached_tokens_and_prompt_logprobs_are_kept(folder):
    driver = FakeDriver(folder, saying("hi"))
    driver.start()
    asked = GenerateSpec(
        prompt=pack(b"abcd"),
        max_tokens=5,
        stop_token_ids=(256,),
        sampling=Sampling(num_logprobs=1, num_prompt_logprobs=1),
    )

    async def main():
        async with connected(driver) as client, client.generate([asked]) as generations:
            events = [event async for batch in generations for event in batch]
            return events, generations.num_cached, generations.prompt_logprobs[0]

    try:
        events, num_cached, prompt_logprobs = asyncio.run(main())
    finally:
        driver.stop()
    assert [(e.token, e.finish_reason) for e in events] == [(104, None), (105, None), (256, "stop")]
    assert [e.logprobs.token for e in events] == [104, 105, 256]
    assert num_cached == [2]
    assert {place: found.token for place, found in prompt_logprobs.items()} == dict(
        enumerate(b"abcd")
    )


def test_beats_carry_the_counters(driver):
    async def main():
        async with connected(driver) as client:
            client.counts.received, client.counts.rejected = 5, 2
            await until(lambda: any(b.received == 5 for b in driver.of(IngressBeat)))
        assert driver.of(IngressBeat)[-1].rejected == 2

    asyncio.run(main())


def test_a_busy_loop_does_not_mistake_itself_for_a_dead_driver(folder):
    driver = FakeDriver(folder, beat_ms=100)
    driver.start()

    async def main():
        async with connected(driver) as client:
            located, beats = driver.num_located, driver.num_beats
            while driver.num_beats < beats + 10:
                time.sleep(0.01)  # in the loop, which runs nothing else
            await asyncio.sleep(0.05)
            return client.ready, driver.num_located - located

    try:
        assert asyncio.run(main()) == (True, 0)
    finally:
        driver.stop()


def test_rubbish_is_counted_and_dropped(driver):
    async def main():
        async with connected(driver) as client:
            listening = asyncio.create_task(listen(client, spec(30)))
            driver.say([1, 2])
            driver.say(Tokens(1, [1, 2], [0], [0], []))
            driver.say(DriverBeat(1, True))
            heard = await listening
            return heard, client.num_dropped

    heard, num_dropped = asyncio.run(main())
    assert heard.tokens == counted(30)
    assert num_dropped == 2


def test_closing_fails_what_is_unfinished(driver):
    driver.step_s = 60

    async def main():
        client = DriverClient(driver.locate, name="ingress", node_id="node")
        await client.start()
        await until(lambda: client.ready)
        listening = asyncio.create_task(listen(client))
        await until(lambda: driver.num_running == 1)
        await client.close()
        with pytest.raises(EngineUnavailable):
            await listening
        with pytest.raises(EngineUnavailable):
            client.generate([spec()])

    asyncio.run(main())


@pytest.mark.parametrize("code", ["numerical_error", "grammar_error"])
def test_a_generation_that_fails_is_not_tried_again(driver, code):
    driver.step_s = 60

    async def main():
        async with connected(driver) as client:
            listening = asyncio.create_task(listen(client, spec()))
            await until(lambda: driver.num_running == 1)
            driver.say(RequestFailed(driver.of(Submit)[0].request, code))
            with pytest.raises(GenerationFailed) as caught:
                await listening
            await asyncio.to_thread(driver.restart)
            await until(lambda: client.ready)
            return caught.value, len(driver.of(Submit)), client.num_live

    error, num_submits, num_live = asyncio.run(main())
    assert (error.status, error.code, error.type) == (500, code, "server_error")
    assert (num_submits, num_live) == (1, 0)


def test_a_grammar_is_sent_along_and_again(driver):
    grammar = Grammar("regex", "[0-9]+", "guided_regex")

    async def main():
        async with connected(driver) as client:
            driver.most_tokens = 10
            heard = Heard()
            one = msgspec.structs.replace(spec(20), grammar=grammar)
            listening = asyncio.create_task(listen(client, one, into=heard))
            await until(lambda: len(heard.events) > 3)
            driver.most_tokens = None
            await asyncio.to_thread(driver.restart)
            await listening

    asyncio.run(main())
    assert [submit.grammar for submit in driver.of(Submit)] == [grammar, grammar]


def test_a_client_that_the_driver_has_given_up_asks_again_on_another_line(driver):
    driver.step_s = 0.005

    async def main():
        async with connected(driver) as client:
            heard = Heard()
            listening = asyncio.create_task(listen(client, spec(40), into=heard))
            await until(lambda: len(heard.events) > 3)
            driver.forget_ingresses()
            return await listening

    heard = asyncio.run(main())
    assert heard.tokens == counted(40)
    assert heard.indexes == list(range(40))
    assert [beat.opens for beat in driver.of(IngressBeat)].count(True) == 2
    assert driver.num_located == 1


def test_a_draining_driver_ends_what_runs_and_gets_nothing_new(driver):
    driver.step_s = 0.01

    async def main():
        async with connected(driver) as client:
            heard = Heard()
            listening = asyncio.create_task(listen(client, spec(40), into=heard))
            await until(lambda: len(heard.events) > 3)
            driver.draining = True
            await until(lambda: not client.ready)
            with pytest.raises(EngineStopping) as refused:
                client.generate([spec()])
            await listening
            driver.draining = False
            await until(lambda: client.ready)
            return refused.value, heard, await listen(client, spec(5))

    refused, heard, after = asyncio.run(main())
    assert (refused.status, refused.retry_after_s) == (503, 5)
    assert heard.tokens == counted(40)
    assert after.tokens == counted(5)
    assert len(driver.of(Submit)) == 2


def test_what_a_driver_has_not_ended_when_it_goes_fails_at_once(driver):
    driver.step_s = 60

    async def main():
        async with connected(driver) as client:
            listening = asyncio.create_task(listen(client, spec(40)))
            await until(lambda: driver.num_running)
            driver.say(DriverBeat(1, False, draining=True, over=True))
            with pytest.raises(EngineStopping):
                await listening
            return client.counts.failed, client.num_live

    assert asyncio.run(main()) == (1, 0)


def test_a_silence_that_this_process_slept_through_is_not_the_drivers(driver):
    """Both were held up, as on a machine that has no time for them."""

    async def main():
        async with connected(driver) as client:
            located = driver.num_located
            driver.beating = False
            await asyncio.sleep(0.1)
            time.sleep(0.5)  # twelve beats
            driver.beating = True
            await until(lambda: client.ready)
            return driver.num_located - located

    assert asyncio.run(main()) == 0
