"""How fast a death and a departure are noticed, through HTTP, Serve and the driver.

    python -m tests.bench.bench_faults

Kills: SIGKILL of one rank of tp 2 x dp 2 under twelve streams; milliseconds until `/readyz` says
503, seconds until it says 200 again, and whether all twelve texts are what they would have been.
Departures: a streaming client closes its socket; milliseconds until the driver's own /metrics show
no running request (the cancel has been received and acted on; a scrape takes about 3 ms of it).
"""

import asyncio
import os
import signal
import socket
import time

import httpx

from tests.bench.results import record
from tests.e2e.conftest import deployed, driver_handle, ray_and_serve, wait_ready
from tests.e2e.test_line import ask, ask_all

COMMAND = "python -m tests.bench.bench_faults"
NUM_KILLS, NUM_DEPARTURES = 20, 100


async def kill_once(url: str, asked: list[str], victim: int) -> tuple[float, float, list[str]]:
    limits = httpx.Limits(max_connections=40)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        jobs = [asyncio.create_task(ask(http, url, q, stream=True)) for q in asked]
        await asyncio.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        while (await http.get(f"{url}/readyz")).status_code == 200:
            pass
        noticed = time.monotonic() - killed
        while (await http.get(f"{url}/readyz")).status_code != 200:
            await asyncio.sleep(0.005)
        back = time.monotonic() - killed
        return noticed, back, await asyncio.gather(*jobs)


def bench_kills(url: str) -> None:
    asked = [f"Count from {n} to {n + 40}" for n in range(1, 13)]
    undisturbed = asyncio.run(ask_all(url, asked))
    noticed, back, wrong = [], [], 0
    for number in range(NUM_KILLS):
        if number % 4 == 0:
            time.sleep(0.5)
        victim = driver_handle().ranks.remote().result()[number % 4].pid
        first, second, texts = asyncio.run(kill_once(url, asked, victim))
        noticed.append(first * 1000)
        back.append(second)
        wrong += texts != undisturbed
        wait_ready(url)
    record("faults", "rank killed, /readyz is 503", "ms", noticed, COMMAND)
    record("faults", "rank killed, /readyz is 200 again", "s", back, COMMAND)
    record("faults", f"kills of {NUM_KILLS} after which a text differed", "count", [wrong], COMMAND)


def bench_departures(url: str) -> None:
    address = driver_handle().metrics_address.remote().result()
    host, port = url.removeprefix("http://").split(":")
    body = b'{"model":"bundled","prompt":"x","max_tokens":3000,"ignore_eos":true,"stream":true}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    times = []
    with httpx.Client(timeout=10) as http:
        for _ in range(NUM_DEPARTURES):
            with socket.create_connection((host, int(port)), timeout=10) as client:
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                client.recv(4096)
            left = time.monotonic()
            while "lockstep_requests_running 0.0" not in http.get(f"http://{address}/metrics").text:
                if time.monotonic() - left > 10:
                    raise SystemExit("the driver has not noticed for 10 s")
            times.append((time.monotonic() - left) * 1000)
    times.sort()
    record("faults", "client leaves, driver has cancelled", "ms", times, COMMAND)
    print(f"client leaves: 99th percentile {times[int(0.99 * len(times))]:.1f} ms")


def main() -> None:
    with (
        ray_and_serve() as url,
        deployed(
            url, tp_size=2, dp_size=2, max_num_seqs=32, max_restarts=1000, beat_ms=250
        ) as ready,
    ):
        bench_departures(ready)
        bench_kills(ready)


if __name__ == "__main__":
    main()
