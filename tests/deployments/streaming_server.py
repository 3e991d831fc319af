"""A small HTTP server that streams completions with known delays, for the client's tests."""

import asyncio
import contextlib
import json
import threading
from dataclasses import dataclass, field

SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class StreamingServer:
    """`fault` is what it does wrong: status_500, no_done, error_event, hang, cut, no_usage."""

    first_s: float = 0.0
    gap_s: float = 0.0
    fault: str = ""
    seen: list[dict] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    num_now: int = 0
    most_at_once: int = 0
    url: str = ""

    async def handle(self, reader, writer):
        with (
            contextlib.closing(writer),
            contextlib.suppress(ConnectionError, asyncio.IncompleteReadError),
        ):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(
                    line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line
                )
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                self.keys.append(fields.get("authorization", ""))
                if not await self.answer(head.split()[1], body, writer):
                    break

    async def answer(self, path, body, writer):
        """Whether the connection may be used again."""
        if path == "/v1/models":
            self.whole(writer, 200, {"data": [{"id": "found"}]})
            return True
        told = json.loads(body)
        self.seen.append(told)
        if self.fault == "status_500":
            self.whole(writer, 500, {"error": {"message": "broken on purpose"}})
            return True
        self.num_now += 1
        self.most_at_once = max(self.most_at_once, self.num_now)
        try:
            return await self.stream(told, writer, is_chat="chat" in path)
        finally:
            self.num_now -= 1

    async def stream(self, told, writer, *, is_chat):
        writer.write(SSE)
        if is_chat:  # what comes before the first token
            self.event(writer, {"choices": [{"delta": {"role": "assistant"}}]})
            await writer.drain()
        await asyncio.sleep(self.first_s)
        num = told["max_tokens"]
        for number in range(num):
            if number:
                await asyncio.sleep(self.gap_s)
            if self.fault == "error_event":
                self.event(writer, {"error": {"message": "the engine is gone"}})
                break
            if self.fault == "cut" and number == 1:
                return False
            if self.fault == "hang":
                await asyncio.sleep(60)
            end = "length" if number == num - 1 else None
            said = {"delta": {"content": "a"}} if is_chat else {"text": "a"}
            self.event(writer, {"choices": [said | {"finish_reason": end}]})
            await writer.drain()
        if self.fault != "no_usage":
            prompt = told.get("prompt", "")
            usage = {"prompt_tokens": len(prompt), "completion_tokens": num}
            self.event(writer, {"choices": [], "usage": usage})
        if self.fault not in ("no_done", "error_event"):
            self.piece(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def event(self, writer, told):
        self.piece(writer, b"data: " + json.dumps(told).encode() + b"\n\n")

    def piece(self, writer, data):
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def whole(self, writer, status, told):
        data = json.dumps(told).encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)


@contextlib.contextmanager
def streaming_server(**settings):
    """One that serves from a thread of its own, on a free port."""
    server = StreamingServer(**settings)
    up, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve():
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        up.set()
        await stop.wait()
        listening.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.01)  # closed connections are let go in the loop's next turns

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    up.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
