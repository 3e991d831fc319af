"""Log lines that a machine can read: one JSON object a line, and never a word of a prompt.

`log_format=json` gives every line of ours `ts`, `level`, `logger` and `event`, and of `request_id`,
`epoch`, `step` and `rank` those that are known; requests then get a line each. A message of ours
holds numbers, names and our own sentences. An exception may quote what it choked on, so while a
request is answered only its type and the places that it passed are written.

    log.error("epoch %d is over", epoch, extra={"epoch": epoch, "rank": 3})
"""

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any

KNOWN = ("request_id", "epoch", "step", "rank", "path", "status", "seconds")
"""What a line may carry beside its event."""

ROOT = "lockstep"
REQUESTS = "lockstep.requests"
"""Writes a line for each request, if anything does."""


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {name: vars(record)[name] for name in KNOWN if name in vars(record)}
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = _told(record.exc_info[1], whole="request_id" not in line)
        return json.dumps(line, ensure_ascii=False, default=str)


def _told(error: BaseException, *, whole: bool) -> str:
    """What happened and where; `whole` with the error's own words."""
    if whole:
        return "".join(traceback.format_exception(error)).rstrip()
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    return f"{type(error).__name__} at {' > '.join(places)}"


def configure_logs(log_format: str) -> None:
    """Our loggers' level and form in this process; what others log is left as it is."""
    ours = logging.getLogger(ROOT)
    ours.setLevel(logging.INFO)
    is_json = log_format == "json"
    logging.getLogger(REQUESTS).setLevel(logging.INFO if is_json else logging.WARNING)
    if is_json:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        ours.handlers = [handler]
        ours.propagate = False
