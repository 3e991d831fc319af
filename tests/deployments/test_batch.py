"""A batch line by line: what is read, what is written, and what a killed run leaves to the next."""

import asyncio
import errno
import io
import json
import os
import random
import subprocess
import sys
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments import batch, batch_files, batch_lines, batch_objects
from deployments.batch import Batch, BatchOptions, Progress, questions, run_batch
from deployments.batch_backends import BackendFailed, NoAnswer, Reply
from deployments.batch_files import DiskFull, FileOutput, open_output
from deployments.batch_lines import (
    BatchError,
    Done,
    Question,
    encode_result,
    key,
    read_lines,
    read_question,
    result,
)
from tests.deployments.front import MODEL, running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id, url=TEXT, **fields):
    body = {"model": MODEL, "prompt": f"say {custom_id}"}
    asked = {"custom_id": custom_id, "method": "POST", "url": url, "body": body} | fields
    return json.dumps(asked).encode()


class Echo:
    """Answers with the prompt, after a while; `script` may say something else first."""

    def __init__(self, script=(), pause_s=0.0, fails_after=None):
        self.script = list(script)
        self.pause_s = pause_s
        self.fails_after = fails_after
        self.asked = []
        self.most_at_once = self.at_once = 0
        self.is_closed = False

    async def start(self):
        pass

    async def ask(self, path, body):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.pause_s * random.random())
        finally:
            self.at_once -= 1
        prompt = json.loads(body).get("prompt")
        self.asked.append(prompt)
        if self.script:
            said = self.script.pop(0)
            if isinstance(said, Exception):
                raise said
            return said
        usage = {"prompt_tokens": 2, "completion_tokens": 3}
        return Reply(200, "req_1", json.dumps({"text": prompt, "usage": usage}, indent=1).encode())

    async def watch(self):
        while self.fails_after is None or len(self.asked) < self.fails_after:
            await asyncio.sleep(0.001)
        raise BackendFailed("no hope")

    async def close(self):
        self.is_closed = True


def go(tmp_path, data, backend=None, *, errors=False, concurrency=4, give_up_s=60.0):
    """One run over `data`; gives the backend and the progress."""
    backend = backend or Echo()
    done = Done()
    output = open_output(str(tmp_path / "out.jsonl"), done)
    wrong = open_output(str(tmp_path / "errors.jsonl"), done) if errors else output
    progress = Progress(total=None, num_before=len(done))
    todo = questions(io.BytesIO(data), done)
    try:
        asyncio.run(Batch(backend, output, wrong, progress, concurrency, give_up_s).run(todo))
    finally:
        output.close()
        if errors:
            wrong.close()
        progress.close()
    return backend, progress


def results(tmp_path, name="out.jsonl"):
    text = (tmp_path / name).read_bytes()
    assert text.endswith(b"\n") or not text
    return [json.loads(one) for one in text.splitlines()]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Pauses that tests need not wait for."""
    monkeypatch.setattr(batch, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(batch, "DISK_PAUSE_S", 0.01)


# What is read.


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_lines_may_end_as_they_like_and_be_blank(tmp_path, end, last):
    data = end.join([line("a"), b"", line("b"), b"  ", line("c")]) + last
    go(tmp_path, data)
    assert sorted(one["custom_id"] for one in results(tmp_path)) == ["a", "b", "c"]


WRONG = {
    "invalid_json": b"{not json",
    "invalid_line": b'{"custom_id": 7, "url": "/v1/completions", "body": {}}',
    "invalid_method": line("m", method="GET"),
    "invalid_url": line("u", url="/v1/embeddings"),
    "invalid_body": line("b", body=[1]),
    "duplicate_custom_id": line("first"),
}


def test_each_line_that_cannot_be_asked_is_an_error_of_its_own(tmp_path):
    data = b"\n".join([line("first"), *WRONG.values(), line("last")])
    backend, progress = go(tmp_path, data)
    found = {one["id"]: one for one in results(tmp_path)}
    assert list(map(len, (found, backend.asked))) == [len(WRONG) + 2, 2]
    for number, code in enumerate(WRONG, 2):
        one = found[f"batch_req_{number}"]
        assert (one["response"], one["error"]["code"]) == (None, code)
        assert one["error"]["message"].endswith(".")
    assert (progress.num_answered, progress.num_errors) == (2, len(WRONG))


def test_errors_have_a_file_of_their_own_if_one_is_named(tmp_path):
    refused = Reply(400, "req_9", b'{"error": {"message": "no"}}')
    data = b"\n".join([line("x"), b"?", line("y")])
    go(tmp_path, data, Echo([refused]), errors=True, concurrency=1)
    assert [one["custom_id"] for one in results(tmp_path)] == ["y"]
    wrong = {one["id"]: one for one in results(tmp_path, "errors.jsonl")}
    assert wrong["batch_req_1"]["response"]["status_code"] == 400
    assert wrong["batch_req_1"]["response"]["body"]["error"]["message"] == "no"
    assert wrong["batch_req_1"]["error"]["code"] == "http_400"
    assert wrong["batch_req_2"]["custom_id"] is None


def test_streams_are_refused_and_long_lines_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 200)
    long = line("long", body={"prompt": "x" * 2000})
    streamed = line("s", body={"model": "m", "stream": True})
    lines = list(read_lines(io.BytesIO(b"\n".join([line("a"), long, streamed, line("b")]))))
    assert [(number, data is None) for number, data in lines] == [
        (1, False),
        (2, True),
        (3, False),
        (4, False),
    ]
    found = [read_question(number, data, set()) for number, data in lines]
    codes = [None if isinstance(one, Question) else one.error.code for one in found]
    assert codes == [None, "line_too_long", "invalid_body", None]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_question_or_an_error(data):
    for number, one in read_lines(io.BytesIO(data)):
        read_question(number, one, set())


# What is written.


def test_results_are_written_as_they_come_and_joined_by_custom_id(tmp_path):
    data = b"\n".join(line(f"q{n}") for n in range(100))
    backend, progress = go(tmp_path, data, Echo(pause_s=0.01), concurrency=7)
    found = results(tmp_path)
    assert backend.most_at_once == 7
    assert [one["custom_id"] for one in found] != [f"q{n}" for n in range(100)]
    for one in found:
        assert one["response"]["body"]["text"] == f"say {one['custom_id']}"
        assert one["id"] == f"batch_req_{int(one['custom_id'][1:]) + 1}"
        assert one["response"]["request_id"] == "req_1"
    assert "100 lines" in progress.summary()
    assert "200 prompt tokens, 300 output tokens" in progress.summary()


def test_an_answer_that_is_not_json_is_an_error(tmp_path):
    go(tmp_path, line("a"), Echo([Reply(200, "", b"<html>")]))
    (one,) = results(tmp_path)
    assert (one["response"]["status_code"], one["response"]["body"]) == (502, None)


def test_only_a_window_of_the_input_is_read_ahead(tmp_path):
    read = []

    class Source(io.BytesIO):
        def readline(self, size=-1):
            read.append(self.tell())
            return super().readline(size)

    class Slow(Echo):
        async def ask(self, path, body):
            num_ahead.append(len(read) - len(self.asked))
            return await super().ask(path, body)

    num_ahead = []
    source = Source(b"\n".join(line(f"q{n}") for n in range(500)))
    output = FileOutput(tmp_path / "out.jsonl", Done())
    progress = Progress(total=None, num_before=0)
    asyncio.run(Batch(Slow(), output, output, progress, 8, 60.0).run(questions(source, Done())))
    output.close()
    progress.close()
    assert max(num_ahead) <= 2 * 8 + 2


# Trying again.


def test_what_is_not_the_lines_fault_is_tried_again(tmp_path):
    busy = [
        Reply(429, "", b"", 1.0),
        Reply(503, "", b"", 5.0),
        NoAnswer("reset"),
        Reply(502, "", b""),
    ]
    backend, _ = go(tmp_path, line("a"), Echo(busy * 3))
    assert len(backend.asked) == 13
    assert results(tmp_path)[0]["response"]["status_code"] == 200


def test_a_fault_that_repeats_itself_is_an_error(tmp_path):
    backend, _ = go(tmp_path, line("a"), Echo([Reply(500, "", b"{}")] * 5))
    assert len(backend.asked) == batch.MAX_TRIES_500
    assert results(tmp_path)[0]["error"]["code"] == "http_500"


def test_without_any_answer_the_batch_gives_up(tmp_path):
    with pytest.raises(
        BackendFailed, match=r"nothing was answered for \d s: the service answers 503"
    ):
        go(tmp_path, line("a"), Echo([Reply(503, "", b"")] * 999), give_up_s=0.05)
    assert results(tmp_path) == []


STARTING = b'{"error": {"message": "The engine is not ready:\\n it is starting.", "code": 1}}'


@pytest.mark.parametrize(
    ("waits", "reason"),
    [
        (Reply(503, "", STARTING), "the service answers 503 (The engine is not ready:  it is st"),
        (Reply(503, "", b"<html>"), "the service answers 503; trying for "),
        (Reply(429, "", b'{"error": 7}'), "the service answers 429; trying for "),
        (NoAnswer("reset"), "no answer (reset); trying for "),
    ],
)
def test_why_it_waits_is_said_at_once_and_not_for_every_try(tmp_path, capsys, waits, reason):
    data = b"\n".join([line("a"), line("b"), line("c")])
    go(tmp_path, data, Echo([waits] * 12))
    told = capsys.readouterr().err
    assert told.count(f"lockstep: {reason}") == 1
    assert told.count("; trying for ") == told.count(" s more\n") == 1


def test_an_engine_without_hope_ends_the_batch_and_keeps_what_was_answered(tmp_path):
    data = b"\n".join(line(f"q{n}") for n in range(50))
    backend = Echo(fails_after=10, pause_s=0.01)
    with pytest.raises(BackendFailed, match="no hope"):
        go(tmp_path, data, backend)
    assert backend.is_closed
    kept = [one["custom_id"] for one in results(tmp_path)]
    assert len(kept) >= 8
    again, _ = go(tmp_path, data)
    assert len(again.asked) == 50 - len(kept)
    assert len({one["custom_id"] for one in results(tmp_path)}) == 50


# Going on.


@pytest.mark.row("C3")
def test_a_torn_last_line_is_cut_off_at_whatever_byte(tmp_path):
    data = b"\n".join([line("a"), line("b"), b"{bad", line("cé")])
    go(tmp_path, data, concurrency=1)
    whole = (tmp_path / "out.jsonl").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole) + 1):
        (tmp_path / "out.jsonl").write_bytes(whole[:cut])
        backend, _ = go(tmp_path, data, concurrency=1)
        is_whole = cut >= len(whole) - 1  # only its end is missing
        assert backend.asked == ([] if is_whole else ["say cé"])
        assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("errors", [False, True])
def test_whenever_it_stops_nothing_is_lost_or_done_twice(tmp_path, errors):
    wanted = [line(f"q{n}") for n in range(30)]
    for place, wrong in zip((3, 9, 20, 28), WRONG.values(), strict=False):
        wanted.insert(place, wrong)
    wanted.append(line("q5"))
    data, asked = b"\n".join(wanted), []
    for stop in (5, 7, 5, None):  # so that enough is left to fail on, whatever was in flight
        backend = Echo(fails_after=stop, pause_s=0.003)
        if stop is None:
            go(tmp_path, data, backend, errors=errors)
        else:
            with pytest.raises(BackendFailed):
                go(tmp_path, data, backend, errors=errors)
        asked += backend.asked
    found = results(tmp_path) + (results(tmp_path, "errors.jsonl") if errors else [])
    assert len({one["id"] for one in found}) == len(found) == len(wanted)
    assert len(asked) <= 30 + 3 * 4
    before = (tmp_path / "out.jsonl").read_bytes()
    backend, _ = go(tmp_path, data, errors=errors)
    assert backend.asked == []
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_file_that_is_no_result_is_not_written_to(tmp_path):
    (tmp_path / "out.jsonl").write_text('{"my": "notes"}\nmore\n')
    with pytest.raises(BatchError, match=r"line 1 of .*out.jsonl is not a batch's result"):
        go(tmp_path, line("a"))
    assert (tmp_path / "out.jsonl").read_text() == '{"my": "notes"}\nmore\n'


def test_two_batches_cannot_write_to_one_file(tmp_path):
    first = FileOutput(tmp_path / "out.jsonl", Done())
    with pytest.raises(BatchError, match="another batch is writing"):
        FileOutput(tmp_path / "out.jsonl", Done())
    first.close()
    FileOutput(tmp_path / "out.jsonl", Done()).close()


# Disks and stores.


def test_a_full_disk_is_waited_for(tmp_path, monkeypatch, capsys):
    real, num_full = FileOutput.append, []

    def full_at_first(self, data):
        if len(num_full) < 5:
            num_full.append(1)
            raise DiskFull(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(FileOutput, "append", full_at_first)
    go(tmp_path, b"\n".join([line("a"), line("b")]))
    assert len(results(tmp_path)) == 2
    assert "No space left on device: make room, the batch waits" in capsys.readouterr().err


LIMITED = """
import resource, sys
from pathlib import Path
from deployments.batch_files import DiskFull, FileOutput
from deployments.batch_lines import Done
output = FileOutput(Path(sys.argv[1]), Done())
resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
output.append(b"x" * 99 + b"\\n")
try:
    output.append(b"y" * 99 + b"\\n")
except DiskFull:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    output.append(b"z" * 99 + b"\\n")
output.close()
"""


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.jsonl"
    subprocess.run([sys.executable, "-c", LIMITED, path], check=True, timeout=280)
    assert path.read_bytes() == b"x" * 99 + b"\n" + b"z" * 99 + b"\n"


def test_urls_are_read(tmp_path):
    import fsspec

    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/in.jsonl", line("a") + b"\n" + line("b"))
    with batch_files.open_input("memory://in.jsonl") as source:
        assert source.readline() == line("a") + b"\n"
    assert batch_files.count_lines("memory://in.jsonl") is None


def answered(*names):
    """Lines of output."""
    asked = [Question(number, name, "/v1/completions", b"{}") for number, name in enumerate(names)]
    return [encode_result(result(one, 200, "r", b"{}")) for one in asked]


@pytest.fixture
def store():
    """An object store in memory, empty, and the URL of an output in it."""
    import fsspec

    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pipe("/bucket/out.jsonl.part-of-somebody", b"not ours")
    yield filesystem
    filesystem.store.clear()


URL = "memory://bucket/out.jsonl"


def named(filesystem):
    return sorted(
        path.removeprefix("/bucket/out.jsonl") for path in filesystem.ls("/bucket", False)
    )


def test_in_a_store_a_batch_leaves_parts_and_goes_on_from_them(store):
    first, second, third = answered("a", "b", "c")
    output = open_output(URL, Done())
    output.append(first)
    output.append(second)
    output.close()
    assert named(store) == [".part-000001", ".part-of-somebody"]
    done = Done()
    output = open_output(URL, done)
    assert done.answered == {key("a"), key("b")}
    output.append(third)
    output.finish()
    output.close()
    assert named(store) == ["", ".part-of-somebody"]
    assert store.cat("/bucket/out.jsonl") == first + second + third
    done = Done()
    open_output(URL, done).close()
    assert len(done) == 3


def test_a_part_goes_when_its_time_has_come(store, monkeypatch):
    monkeypatch.setattr(batch_objects, "PART_S", 0.05)
    output = open_output(URL, Done())
    output.append(answered("a")[0])
    deadline = time.monotonic() + 60
    while ".part-000001" not in named(store):
        assert time.monotonic() < deadline, "no part was put"
        time.sleep(0.01)
    output.close()


@pytest.mark.parametrize("broken", ["mv", "rm"])
def test_an_end_that_is_interrupted_is_done_over(store, monkeypatch, broken):
    lines = answered("a", "b")
    output = open_output(URL, Done())
    for line in lines:
        output.append(line)

    def fails(*args, **kwargs):
        raise RuntimeError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), broken, fails)
        with pytest.raises(OSError, match=r"memory://bucket/out.jsonl: the store is away"):
            output.finish()
    done = Done()
    output = open_output(URL, done)
    assert len(done) == 2
    output.finish()
    assert store.cat("/bucket/out.jsonl") == b"".join(lines)
    assert set(named(store)) - {".whole"} == {"", ".part-of-somebody"}


def test_a_part_that_was_torn_counts_as_far_as_its_lines_are_whole(store):
    first, second, third = answered("a", "b", "c")
    store.pipe("/bucket/out.jsonl.part-000001", first[:-1])
    store.pipe("/bucket/out.jsonl.part-000002", second + third[:9])
    done = Done()
    output = open_output(URL, done)
    assert done.answered == {key("a"), key("b")}
    output.append(third)
    output.finish()
    assert store.cat("/bucket/out.jsonl") == first + second + third


def test_a_store_that_takes_nothing_says_so(store, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such bucket")

    monkeypatch.setattr(type(store), "pipe_file", fails)
    output = open_output(URL, Done())
    output.append(answered("a")[0])
    with pytest.raises(OSError, match=r"memory://bucket/out.jsonl: no such bucket"):
        output.finish()


IMPATIENT = """
import sys
from deployments import batch_objects
from deployments.cli import main
batch_objects.PART_S = 0.05
sys.exit(main(["batch", *sys.argv[1:]]))
"""


def test_a_batch_that_is_killed_goes_on_from_its_parts(tmp_path):
    """`local://` is treated like any store: it is not known to be a disk."""
    num_lines, concurrency, out = 600, 8, tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(line(f"q{n}") for n in range(num_lines)))
    files = ("-i", tmp_path / "in.jsonl", "-o", f"local://{out}")
    with running() as front:
        front.driver.step_s = 0.01  # the whole would take 12 s
        command = [sys.executable, "-c", IMPATIENT, *files, "--url", front.url]
        command += ["--concurrency", str(concurrency)]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("out.jsonl.part-*"))) < 3:
            assert first.poll() is None, "the batch ended before it was killed"
            assert time.monotonic() < deadline, "no parts were put"
            time.sleep(0.01)
        first.kill()
        first.wait()
        parts = sorted(tmp_path.glob("out.jsonl.part-*"))
        kept = {one for part in parts for one in part.read_bytes().splitlines(True)[:-1]}
        assert kept
        assert not out.exists()
        front.driver.step_s = 0.001
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert " were done before" in told.stdout
    lines = out.read_bytes().splitlines(keepends=True)
    assert kept <= set(lines), "a line that was in a part was computed again"
    assert len(lines) == num_lines
    assert {one["custom_id"] for one in results(tmp_path)} == {f"q{n}" for n in range(num_lines)}
    assert list(tmp_path.glob("out.jsonl.*")) == []


def test_what_is_in_a_store_and_no_result_is_not_touched(store):
    store.pipe("/bucket/out.jsonl", b"my notes\nmore\n")
    with pytest.raises(BatchError, match=r"line 1 of memory://bucket/out.jsonl .* name another"):
        open_output(URL, Done())


# The command.


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["-i", "none.jsonl", "-o", "out"], "none.jsonl cannot be read: No such file"),
        (["-i", "in.jsonl", "-o", "in.jsonl"], "in.jsonl is named twice"),
        (["-i", "in.jsonl", "-o", "no/such/out"], "no/such/out cannot be written"),
        (["-i", "in.jsonl", "-o", "o", "--concurrency", "0"], "must be at least 1"),
        (["-i", "in.jsonl", "-o", "o", "--tp-sise", "2"], "did you mean `--tp-size`?"),
        (["-i", "in.jsonl", "-o", "o", "--url", "http://x", "--tp-size", "2"], "leave one out"),
        (["-i", "in.jsonl", "-o", "o", "--tp-size", "two"], "tp_size='two' is not valid"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(tmp_path, monkeypatch, capsys, flags, sentence):
    from deployments.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(line("a"))
    assert main(["batch", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_a_running_service_is_asked_over_http(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(
        b"\n".join([*(line(f"q{n}") for n in range(20)), line("bad", body={"model": MODEL})])
    )
    options = BatchOptions(
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out.jsonl"),
        url="http://127.0.0.1:9",
    )
    assert run_batch(options, {}) == 1
    assert "no service answers at http://127.0.0.1:9" in capsys.readouterr().out
    with running(api_keys=["secret"]) as front:
        front.driver.refusal = (429, "full", None, None)
        (tmp_path / "key").write_text("secret\n")
        options = BatchOptions(
            input=options.input,
            output=options.output,
            url=f"{front.url}/v1",
            api_key_file=str(tmp_path / "key"),
        )

        async def relent():
            await asyncio.sleep(0.3)
            front.driver.refusal = None

        began = time.monotonic()
        import threading

        threading.Thread(target=lambda: asyncio.run(relent())).start()
        assert run_batch(options, {}) == 0
        assert time.monotonic() - began > 0.3
    found = {one["custom_id"]: one for one in results(tmp_path)}
    assert len(found) == 21
    assert found["bad"]["response"]["status_code"] == 400
    assert found["q3"]["response"]["body"]["usage"]["completion_tokens"] == 16
    assert found["q3"]["response"]["request_id"].startswith("req_")
    assert "20 answered, 1 errors" in capsys.readouterr().out


def test_a_service_that_wants_a_key_says_so(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(line("a"))
    with running(api_keys=["secret"]) as front:
        options = BatchOptions(
            input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"), url=front.url
        )
        assert run_batch(options, {}) == 1
    assert "wants an API key: name its file with --api-key-file" in capsys.readouterr().out
