"""What a step costs the driver, with 256 requests in steady decode.

    python -m tests.bench.bench_driver

Two figures. `plan_step` alone: microseconds a request. And the engine thread's CPU time a step
(plan, encode, send, decode acks, agree, advance, tell the ingress), read from the thread's own
clock while a real `Engine` drives two real rank processes whose model computes nothing.
"""

import threading
import time

import zmq

from deployments.engine import Engine
from deployments.llm import LLM, SamplingParams
from deployments.messages import IngressBeat, Watch
from deployments.requests import Request
from deployments.scheduler import Scheduler
from tests.bench.results import record
from workers.protocol import encode

NUM_REQUESTS = 256
COMMAND = "python -m tests.bench.bench_driver"


def steady_scheduler() -> Scheduler:
    scheduler = Scheduler(
        num_pages=100_000, page_size=16, max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=8192
    )
    for number in range(NUM_REQUESTS):
        prompt = [number % 100 + 3] * (5 + number % 30)
        scheduler.add(
            Request(
                key=(b"bench", number),
                tokens=prompt,
                num_prompt=len(prompt),
                max_tokens=4000,
                arrival=number,
            )
        )
    return scheduler


def bench_plan_step() -> None:
    scheduler = steady_scheduler()
    tokens = [7] * NUM_REQUESTS
    plans, applies = [], []
    for step in range(1500):
        began = time.thread_time_ns()
        plan = scheduler.plan_step(step)
        planned = time.thread_time_ns()
        scheduler.apply(step, tokens[: len(plan.sampled)])
        applied = time.thread_time_ns()
        if step > 300:
            plans.append((planned - began) / NUM_REQUESTS / 1000)
            applies.append((applied - planned) / NUM_REQUESTS / 1000)
    record("driver", "plan_step, 256 decodes", "us/request", plans, COMMAND)
    record("driver", "apply, 256 decodes", "us/request", applies, COMMAND)


def look_at(engine: Engine, over: threading.Event) -> None:
    """What an ingress with an open live page does: ask for views, and read them."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(engine.info().ipc_address)
        while not over.wait(0.25):
            socket.send(encode(IngressBeat("viewer", opens=True)))
            socket.send(encode(Watch()))
            while socket.poll(0):
                socket.recv()


def bench_engine_thread(*, watched: bool = False) -> None:
    with LLM(
        tp_size=2,
        device="cpu",
        max_num_seqs=NUM_REQUESTS,
        runner="tests.bench.instant_runner:InstantRunner",
    ) as llm:
        over = threading.Event()
        viewer = threading.Thread(target=look_at, args=(llm.engine, over))
        if watched:
            viewer.start()
        clock = time.pthread_getcpuclockid(llm.engine.thread_ident)
        per_step = []
        for length in [100, *[1000] * 5]:
            steps, cpu = llm.engine.counters.num_steps, time.clock_gettime(clock)
            llm.generate(
                [[5, 6, 7]] * NUM_REQUESTS,
                SamplingParams(max_tokens=length, ignore_eos=True),
                detokenize=False,
            )
            steps = llm.engine.counters.num_steps - steps
            per_step.append((time.clock_gettime(clock) - cpu) / steps * 1e6)
        over.set()
        if watched:
            viewer.join()
    case = "engine thread, 256 requests, tp 2" + (", live page open" if watched else "")
    record("driver", case, "us CPU/step", per_step[1:], COMMAND)


if __name__ == "__main__":
    bench_plan_step()
    bench_engine_thread()
    bench_engine_thread(watched=True)
