"""`lockstep chat`: talk to a running service from a terminal.

A client like any other: it speaks OpenAI's API over HTTP with the standard library alone.
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

MAX_HISTORY = 20
"""Messages sent along; a small model's context is short."""


def chat(url: str, model: str, words: Sequence[str]) -> int:
    """Answer `words`, or hold a conversation until the input ends; 1 if the service fails."""
    try:
        model = model or first_model(url)
        if words:
            print_answer(url, model, [{"role": "user", "content": " ".join(words)}])
            return 0
        converse(url, model)
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"lockstep: {explain(url, error)}", file=sys.stderr)
        return 1
    return 0


def converse(url: str, model: str) -> None:
    history: list[dict[str, str]] = []
    print(f"Talking to {model}. An empty line or Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        history = [*history, {"role": "user", "content": line}][-MAX_HISTORY:]
        history.append({"role": "assistant", "content": print_answer(url, model, history)})


def print_answer(url: str, model: str, messages: Sequence[dict[str, str]]) -> str:
    """Print the answer as it comes and return it."""
    text = ""
    for piece in stream(url, {"model": model, "messages": list(messages), "temperature": 0}):
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def stream(url: str, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of a chat completion; `ValueError` with the service's sentence on an error."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body | {"stream": True}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ValueError(event["error"]["message"])
            if event["choices"]:
                yield event["choices"][0]["delta"].get("content") or ""


def first_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        return str(json.load(response)["data"][0]["id"])


def explain(url: str, error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        try:
            return str(json.load(error)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return f"{url} answered {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"{url} cannot be reached ({error.reason}): is `lockstep serve` running there?"
    return str(error)
