"""A driver without an engine, and a tokenizer of 256 bytes: what ingress tests need of the rest."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deployments.messages import (
    Cancel,
    DriverBeat,
    EngineInfo,
    Finish,
    Forgotten,
    Refused,
    Submit,
    ToIngress,
    Tokens,
    decode_from_ingress,
)
from deployments.tokenizer import ChatTemplate, ChatTokenizer
from workers.protocol import Sampling, TokenLogprobs, encode, unpack

EOS = 256
START = 257
VOCAB_SIZE = 260

TEMPLATE = """{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"""


def byte_tokenizer() -> Tokenizer:
    """The id of a byte is its value; 256 ends a text and 257 begins a message."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed}
    letters |= {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>"), AddedToken("<s>")])
    return tokenizer


def chat_tokenizer() -> ChatTokenizer:
    return ChatTokenizer(byte_tokenizer(), ChatTemplate(TEMPLATE, {"eos_token": "</s>"}))


Reply = Callable[[Sequence[int], int, Sampling], int]
"""The output token at a place, for a prompt."""


def saying(text: str) -> Reply:
    """Always this text, then the end."""
    tokens = [*text.encode(), EOS]
    return lambda prompt, index, sampling: tokens[min(index, len(tokens) - 1)]


def counting(prompt: Sequence[int], index: int, sampling: Sampling) -> int:
    """'0 1 2 3 ...', one digit or space a token, and never an end."""
    text = " ".join(map(str, range(index // 2 + 2)))
    return text.encode()[index]


@dataclass
class Running:
    submit: Submit
    prompt: list[int]
    index: int
    """Place of the next output token."""
    told_prompt: bool = False


class FakeDriver(threading.Thread):
    """Speaks `deployments.messages`, a token a request a step. Its fields may be set any time."""

    def __init__(
        self,
        folder: Path,
        reply: Reply = counting,
        *,
        beat_ms: int = 200,  # a driver that is not heard for 1.6 s is gone
        step_s: float = 0.001,
        tokens_per_step: int = 1,
        max_model_len: int = 512,
    ) -> None:
        super().__init__(daemon=True)
        self.reply = reply
        self.step_s = step_s
        self.tokens_per_step = tokens_per_step
        self.most_tokens: int | None = None
        """No request goes on beyond so many output tokens, until this is changed."""
        self.queue_s = 0.0
        self.ready = True
        self.beating = True
        self.draining = False
        self.epoch = 1
        self.refusal: tuple[int, str, str | None, str | None] | None = None
        self.received: list[object] = []
        self.stopped = threading.Event()
        self.to_send: deque[ToIngress] = deque()
        self._running: dict[tuple[bytes, int], Running] = {}
        self._identities: set[bytes] = set()
        self._forget = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(f"ipc://{folder}/d")
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.curve_publickey = server_public
        self._socket.curve_secretkey = server_secret
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.num_located = self.num_beats = 0
        self.info = EngineInfo(
            epoch=1,
            node_id="node",
            ipc_address=f"ipc://{folder}/d",
            tcp_address=f"tcp://127.0.0.1:{port}",
            server_key=server_public.decode(),
            client_public_key=client_public.decode(),
            client_secret_key=client_secret.decode(),
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            stop_token_ids=(EOS,),
            beat_ms=beat_ms,
        )

    async def locate(self) -> EngineInfo:
        self.num_located += 1
        return self.info

    def restart(self, down_s: float = 0.02) -> None:
        """All ranks die; what they worked on is forgotten, and a new epoch begins."""
        self.ready = False
        time.sleep(down_s)
        self._forget = True
        self.epoch += 1
        self.ready = True

    def forget_ingresses(self) -> None:
        """As the driver does with one that was silent: what it asked for is cancelled, and at its
        next word it is told so."""
        self._forget = True
        self.say(Forgotten())

    def say(self, message: ToIngress) -> None:
        """Send to every ingress, whatever it is."""
        self.to_send.append(message)

    def of(self, kind: type) -> list:
        return [message for message in self.received if isinstance(message, kind)]

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_held(self) -> bool:
        """There are requests, and all have come as far as `most_tokens`."""
        return bool(self._running) and all(map(self._is_held, list(self._running.values())))

    def _is_held(self, running: Running) -> bool:
        return self.most_tokens is not None and running.index >= self.most_tokens

    def stop(self) -> None:
        self.stopped.set()
        self.join()

    def run(self) -> None:
        told, last_beat, last_step = None, 0.0, 0.0
        while not self.stopped.is_set():
            if self._socket.poll(1):
                self._receive()
            if self._forget:
                self._forget = False
                self._running.clear()
            while self.to_send:
                self._broadcast(self.to_send.popleft())
            now = time.monotonic()
            state = (self.epoch, self.ready, self.draining, len(self._identities))
            if self.beating and (state != told or now - last_beat > self.info.beat_ms / 1000):
                self._broadcast(DriverBeat(self.epoch, self.ready, draining=self.draining))
                told, last_beat = state, now
                self.num_beats += 1
            if self.ready and now - last_step > self.step_s:
                last_step = now
                self._step()
        self._socket.close()
        self._context.term()

    def _broadcast(self, message: ToIngress) -> None:
        for identity in self._identities:
            self._socket.send_multipart((identity, encode(message)))

    def _receive(self) -> None:
        while True:
            try:
                identity, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._identities.add(identity)
            message = decode_from_ingress(data)
            self.received.append(message)
            match message:
                case Submit():
                    self._submit(identity, message)
                case Cancel(request) | Finish(request):
                    self._running.pop((identity, request), None)

    def _submit(self, identity: bytes, submit: Submit) -> None:
        if submit.epoch != self.epoch:
            return
        if self.refusal is not None:
            refused = Refused(submit.request, *self.refusal)
            self._socket.send_multipart((identity, encode(refused)))
            return
        tokens = unpack(submit.tokens).tolist()
        prompt = tokens[: submit.num_prompt]
        index = len(tokens) - submit.num_prompt
        self._running[identity, submit.request] = Running(submit, prompt, index)

    def _step(self) -> None:
        messages: dict[bytes, Tokens] = {}
        for (identity, request), running in list(self._running.items()):
            if self._is_held(running):
                continue
            message = messages.setdefault(identity, Tokens(self.epoch, [], [], [], []))
            for _ in range(self.tokens_per_step):
                if self._generate(message, request, running):
                    del self._running[identity, request]
                    break
        for identity, message in messages.items():
            self._socket.send_multipart((identity, encode(message)))

    def _generate(self, message: Tokens, request: int, running: Running) -> bool:
        submit, sampling = running.submit, running.submit.sampling
        token = self.reply(running.prompt, running.index, sampling)
        if not running.told_prompt:
            running.told_prompt = True
            message.begun.append((request, len(running.prompt) // 2, self.queue_s))
            if sampling.num_prompt_logprobs >= 0:
                found = tuple(logprobs(t, sampling.num_prompt_logprobs) for t in running.prompt)
                message.prompt_logprobs.append((request, 0, found))
        message.requests.append(request)
        message.indexes.append(running.index)
        message.tokens.append(token)
        if sampling.num_logprobs >= 0:
            found = logprobs(token, sampling.num_logprobs)
            message.logprobs.append((request, running.index, found))
        running.index += 1
        if token in submit.stop_token_ids and running.index > sampling.min_tokens:
            message.finished.append((request, "stop"))
            return True
        if running.index == submit.max_tokens:
            message.finished.append((request, "length"))
            return True
        return False


def logprobs(token: int, num_top: int) -> TokenLogprobs:
    """The token is the likeliest, its neighbours follow."""
    top = tuple((token + k) % 256 for k in range(num_top))
    return TokenLogprobs(token, -0.5, 1, top, tuple(-0.5 - k for k in range(num_top)))
