"""The live page in a real browser, over a real engine of two ranks and the bundled model.

LOCKSTEP_SCREENSHOTS=docs/screenshots python -m pytest tests/page   # takes those of the README
"""

import asyncio
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import uvicorn

from deployments.driver_client import DriverClient
from deployments.engine import Engine
from deployments.fleet import LocalFleet
from deployments.routes import build_api
from deployments.service import Service
from deployments.tokenizer import ChatTokenizer
from tests.page.browser import Browser, find_browser, wait_until
from workers import bundled
from workers.config import EngineConfig

pytestmark = [
    pytest.mark.skipif(
        find_browser() is None,
        reason="needs a Chromium: apt-get install chromium (.ci/run does, where it may)",
    ),
    pytest.mark.timeout(180),
]

ENTER = {"key": "Enter", "code": 13, "text": "\r"}
TAB = {"key": "Tab", "code": 9}
SUM_OF_PIXELS = """(() => {
  const canvas = document.getElementById("lanes");
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let at = 0; at < data.length; at += 7) sum = (sum * 31 + data[at]) % 1000003;
  return sum;
})()"""


class Front:
    """An ingress under uvicorn in a thread of this process; it can be stopped and come back."""

    def __init__(self, engine, *, port=0, api_keys=()):
        async def locate():
            return engine.info()

        client = DriverClient(locate, name="page", node_id=engine.node_id)
        tokenizer = ChatTokenizer.load(bundled.path())
        service = Service(client, tokenizer, model="bundled", api_keys=api_keys)
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        config = uvicorn.Config(
            build_api(service),
            lifespan="on",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        wait_until(lambda: self.server.started)
        wait_until(lambda: httpx.get(f"{self.url}readyz", timeout=60).status_code == 200)

    def _run(self):
        asyncio.run(self.server.serve(sockets=[self.listener]))

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(tp_size=2, dp_size=2, device="cpu", enable_dp_attention=True)
    engine = Engine(config, LocalFleet())
    engine.start()
    try:
        engine.wait_ready()
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def front(engine):
    front = Front(engine)
    yield front
    front.close()


@pytest.fixture(scope="module")
def browser():
    with Browser.start() as browser:
        yield browser


def ask(tab, question):
    """By keyboard alone."""
    tab.value("document.getElementById('question').focus()")
    tab.type(question)
    tab.press(**ENTER)


def last_answer(tab):
    return tab.text(".said.model-says:last-of-type, #talk > .said:nth-last-child(2)")


def load(url, over):
    """A few clients, so that there is something to see."""

    def one(number):
        while not over.is_set():
            body = {
                "model": "bundled",
                "messages": [{"role": "user", "content": f"Count from {number} to {number + 30}"}],
                "max_tokens": 40 + 17 * (number % 5),
                "temperature": 0.8,
                "ignore_eos": True,
            }
            httpx.post(f"{url}v1/chat/completions", json=body, timeout=100)
            over.wait(0.15 * (number % 4))

    return [lambda number=number: one(number) for number in range(1, 6)]


def test_the_playground_streams_an_answer_and_the_lanes_move(browser, front):
    tab = browser.open(front.url)
    tab.wait_for("document.getElementById('pill').innerText === 'ready'")
    before = int(tab.text("#step").replace(",", ""))
    still = tab.value(SUM_OF_PIXELS)
    ask(tab, "What is 128+305?")
    tab.wait_for("document.querySelector('#talk .cost')?.innerText.includes('tokens')")
    assert last_answer(tab).strip() == "433"
    assert tab.text("#talk .said.user") == "What is 128+305?"
    tab.wait_for(f"Number(document.getElementById('step').innerText.replace(',', '')) > {before}")
    tab.wait_for(f"{SUM_OF_PIXELS} !== {still}")
    assert tab.text("#replicas").count("rank ") == 2
    tab.wait_for("document.getElementById('ttft').innerText !== '–'")
    assert tab.complaints == []


def never_ends(tab):
    """What is asked next is answered until it is stopped."""
    tab.value("document.getElementById('max-tokens').value = 4000")
    tab.value("document.getElementById('temperature').value = 2")
    tab.value(
        "bodyFor = ((old) => (question) => ({ ...old(question), ignore_eos: true }))(bodyFor), 0"
    )


FRAMES_THAT_MOVE = f"""new Promise((done) => {{
  let view = held.state, seen = {SUM_OF_PIXELS}, count = 0;
  const look = () => {{
    const now = {SUM_OF_PIXELS};
    if (held.state === view && now !== seen) count += 1;
    view = held.state;
    seen = now;
    if (count === 8) done(count);
    else requestAnimationFrame(look);
  }};
  requestAnimationFrame(look);
}})"""
"""Frames that differ from the one before though no view came in between."""


def test_lanes_glide_from_view_to_view_while_tokens_come(browser, front):
    tab = browser.open(front.url)
    tab.wait_for("document.getElementById('pill').innerText === 'ready'")
    never_ends(tab)
    ask(tab, "Count from 3 to 40")
    tab.wait_for("document.querySelector('.said.streaming') !== null")
    tab.wait_for("held.domains.size > 0")
    assert tab.value(FRAMES_THAT_MOVE) == 8
    tab.value("document.getElementById('stop').click()")
    tab.wait_for("document.querySelector('#talk .cost')?.innerText === 'stopped'")
    assert tab.complaints == []


def test_stop_ends_the_answer(browser, front):
    tab = browser.open(front.url)
    tab.wait_for("document.getElementById('pill').innerText === 'ready'")
    never_ends(tab)
    ask(tab, "Count from 3 to 40")
    tab.wait_for("document.querySelector('.said.streaming span')?.innerText.length > 3")
    tab.value("document.getElementById('stop').click()")
    tab.wait_for("document.querySelector('#talk .cost')?.innerText === 'stopped'")
    tab.wait_for("document.getElementById('running').innerText === '0'")
    assert tab.value("document.activeElement.id") == "question"
    assert tab.complaints == []


def test_every_control_is_reached_by_tab_and_has_a_name(browser, front):
    tab = browser.open(front.url)
    tab.wait_for("document.getElementById('pill').innerText === 'ready'")
    order = []
    for _ in range(8):
        tab.press(**TAB)
        order.append(
            tab.value("document.activeElement.id || document.activeElement.className || 'summary'")
        )
    assert order[:3] == ["skip", "theme", "question"]
    assert order.index("send") < order.index("summary")
    unnamed = tab.value(
        """[...document.querySelectorAll("button, input, textarea, canvas, svg")]
           .filter((one) => !(one.ariaLabel || one.innerText?.trim() || one.labels?.length))
           .map((one) => one.id)"""
    )
    assert unnamed == []


def test_less_motion_when_asked_for(browser, front):
    tab = browser.open(front.url, motion=False)
    tab.wait_for("document.getElementById('pill').innerText === 'ready'")
    ask(tab, "What is 1+2?")
    tab.wait_for("held.domains.size > 0")
    assert tab.value("[...held.domains.values()].every((one) => !advance(one, 0.01))")


def test_a_key_is_asked_for_and_kept_in_memory_only(browser, engine):
    front = Front(engine, api_keys=("secret-key",))
    try:
        tab = browser.open(front.url)
        tab.wait_for("!document.getElementById('keybox').hidden")
        assert tab.text("#pill") == "needs a key"
        tab.value("document.getElementById('key').focus()")
        tab.type("secret-key")
        tab.press(**ENTER)
        tab.wait_for("document.getElementById('pill').innerText === 'ready'")
        ask(tab, "What is 2+2?")
        tab.wait_for("document.querySelector('#talk .cost')?.innerText.includes('tokens')")
        assert last_answer(tab).strip() == "4"
        assert (
            tab.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        )
        assert "secret-key" not in tab.value("document.documentElement.outerHTML")
        # The browser itself says that the first look was refused; nothing else is wrong.
        assert all("401" in one.get("text", "") for one in tab.complaints)
    finally:
        front.close()


def test_the_page_comes_back_with_the_service(browser, engine):
    front = Front(engine)
    tab = browser.open(front.url)
    tab.wait_for("document.getElementById('pill').innerText === 'ready'")
    front.close()
    tab.wait_for("document.getElementById('pill').innerText === 'away'")
    assert "does not answer" in tab.text("#banner")
    again = Front(engine, port=front.port)
    try:
        tab.wait_for("document.getElementById('pill').innerText === 'ready'")
        assert tab.value("document.getElementById('banner').hidden")
    finally:
        again.close()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("desktop", {"width": 1280, "height": 800}),
        ("desktop-dark", {"width": 1280, "height": 800, "dark": True}),
        ("phone", {"width": 390, "height": 844, "phone": True}),
    ],
)
def test_screenshots(browser, front, name, settings, tmp_path):
    tab = browser.open(front.url, **settings)
    tab.wait_for("document.getElementById('pill').innerText === 'ready'")
    over = threading.Event()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(5))
        stack.callback(over.set)
        for client in load(front.url, over):
            pool.submit(client)
        ask(tab, "What is 128+305?")
        tab.wait_for("document.querySelector('#talk .cost')?.innerText.includes('tokens')")
        tab.value("document.activeElement.blur(), scrollTo(0, 0)")
        time.sleep(float(os.environ.get("LOCKSTEP_SCREENSHOT_AFTER_S", "0.5")))
        picture = tab.screenshot()
    assert tab.value("document.documentElement.scrollWidth") <= settings["width"]
    assert 10_000 < len(picture) < 200_000
    folder = Path(os.environ.get("LOCKSTEP_SCREENSHOTS", tmp_path))
    (folder / f"{name}.png").write_bytes(picture)
    assert tab.complaints == []
