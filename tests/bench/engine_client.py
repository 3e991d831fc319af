"""Straight to an engine's socket, as an ingress speaks to it, with a clock at every token."""

import time
from collections.abc import Sequence
from itertools import pairwise

import zmq

from deployments.messages import (
    DriverBeat,
    EngineInfo,
    IngressBeat,
    Refused,
    RequestFailed,
    Submit,
    Tokens,
    decode_to_ingress,
)
from workers.protocol import Sampling, encode, pack

TIMEOUT_S = 60.0


class EngineClient:
    """One request at a time; answers are greedy and of full length."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(info.ipc_address)
        self._num_requests = 0

    def close(self) -> None:
        self._context.destroy(linger=0)

    def ask(self, prompt: Sequence[int], max_tokens: int) -> list[float]:
        """Seconds from sending the request to each of its tokens."""
        while self._socket.poll(0):  # beats of idle times
            self._socket.recv()
        self._send(IngressBeat(opens=True))
        number, self._num_requests = self._num_requests, self._num_requests + 1
        began = time.perf_counter()
        self._send(
            Submit(
                epoch=self._info.epoch,
                request=number,
                tokens=pack(list(prompt)),
                num_prompt=len(prompt),
                max_tokens=max_tokens,
                stop_token_ids=(),
                sampling=Sampling(temperature=0.0),
            )
        )
        times: list[float] = []
        while time.perf_counter() - began < TIMEOUT_S:
            if not self._socket.poll(self._info.beat_ms):
                self._send(IngressBeat())
                continue
            message = decode_to_ingress(self._socket.recv())
            now = time.perf_counter() - began
            if isinstance(message, Tokens) and number in message.requests:
                times += [now] * message.requests.count(number)
                if message.finished:
                    break
            elif isinstance(message, Refused | RequestFailed):
                raise RuntimeError(f"the engine did not answer: {message}")
            elif isinstance(message, DriverBeat):
                self._send(IngressBeat())
        if len(times) != max_tokens:
            raise RuntimeError(f"{len(times)} of {max_tokens} tokens came within {TIMEOUT_S:g} s")
        return times

    def gaps(self, prompt: Sequence[int], num_tokens: int) -> list[float]:
        """Seconds from each token to the next; their mean is the time per output token."""
        return [after - before for before, after in pairwise(self.ask(prompt, num_tokens))]

    def _send(self, message: Submit | IngressBeat) -> None:
        self._socket.send(encode(message))
