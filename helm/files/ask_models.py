"""The chart's own test: the service lists its model, and asks for a key where it should.

ask_models.py URL
"""

import json
import pathlib
import re
import sys
import urllib.error
import urllib.request

KEYS = pathlib.Path("/etc/lockstep/api-keys")


def ask(path: str, key: str = "") -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(sys.argv[1] + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


lines = KEYS.read_text().split() if KEYS.exists() else []
# What is stored as a digest cannot be sent as a key.
key = next((line for line in lines if not re.fullmatch("[0-9a-fA-F]{64}", line)), "")
status, body = ask("/readyz")
if status != 200:
    sys.exit(f"/readyz answered {status}: {body[:200]!r}")
if lines and ask("/v1/models")[0] != 401:
    sys.exit("/v1/models answered without a key")
if key or not lines:
    status, body = ask("/v1/models", key)
    if status != 200:
        sys.exit(f"/v1/models answered {status}: {body[:200]!r}")
    print("serves", *(model["id"] for model in json.loads(body)["data"]))
else:
    print("asks for a key; all keys are stored as digests, so none was tried")
