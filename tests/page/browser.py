"""A real browser, headless, over its own DevTools protocol: no driver between it and the test.

with Browser.start() as browser:
    tab = browser.open("http://127.0.0.1:8000/", width=390, height=844)
    tab.wait_for("document.title === 'Lockstep'")
"""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


def find_browser():
    """The path of one that is installed, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def wait_until(look, timeout_s=60.0):
    """What `look` returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s")
        time.sleep(0.05)
    return found


class Browser:
    def __init__(self, port):
        self._url = f"http://127.0.0.1:{port}"
        self._tabs = ExitStack()
        self._last = ""

    @classmethod
    @contextmanager
    def start(cls):
        with tempfile.TemporaryDirectory(prefix="ls-", ignore_cleanup_errors=True) as folder:
            process = subprocess.Popen(
                [find_browser(), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                told = Path(folder, "DevToolsActivePort")
                wait_until(lambda: told.exists() and "\n" in told.read_text())
                browser = cls(told.read_text().split("\n")[0])
                with browser._tabs:
                    yield browser
            finally:
                process.terminate()
                process.wait(60)

    def open(self, url, **settings):
        """A fresh tab in front; the one before it is closed."""
        if self._last:
            httpx.get(f"{self._url}/json/close/{self._last}", timeout=60)
        target = httpx.put(f"{self._url}/json/new?about:blank", timeout=60).json()
        self._last = target["id"]
        # NOTE: Chromium sends no pings; a page that is busy is not away.
        address = target["webSocketDebuggerUrl"]
        line = connect(address, max_size=2**26, ping_interval=None, compression=None)
        tab = Tab(self._tabs.enter_context(line))
        tab.begin(url, **settings)
        return tab


class Tab:
    def __init__(self, line):
        self._socket = line
        self._numbers = itertools.count(1)
        self.complaints = []
        """What the console shows as an error, and exceptions nobody caught."""

    def begin(self, url, *, width=1280, height=800, dark=False, phone=False, motion=True):
        self.call("Runtime.enable")
        self.call("Log.enable")
        self.call("Page.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "no-preference" if motion else "reduce",
        }
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": name, "value": value} for name, value in features.items()],
        )
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def call(self, method, **parameters):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message):
        told = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(told["exceptionDetails"])
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.complaints.append(told["entry"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "assert"):
                self.complaints.append(told["args"])

    def value(self, expression):
        """Of an expression in the page; a promise is awaited."""
        told = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait_for(self, expression, timeout_s=60.0):
        return wait_until(lambda: self.value(expression), timeout_s)

    def text(self, selector):
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def type(self, text):
        """Into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key, code=0, text=""):
        kind = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **kind)
        self.call("Input.dispatchKeyEvent", type="keyUp", **kind)

    def screenshot(self):
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
