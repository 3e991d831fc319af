"""What a pod does before it is told to stop: wait until no request runs, or until time is up.

drain.py SECONDS METRICS_PORT

Only the driver's pod can tell how many run. The others wait for the whole time: if one of them left
early, every rank would stop, and with it the requests that should be let finish.
"""

import re
import sys
import time
import urllib.error
import urllib.request

IN_FLIGHT = re.compile(r"^lockstep_requests_in_flight (\S+)$", re.MULTILINE)


def idle(port: int) -> bool:
    if port <= 0:
        return False
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            found = IN_FLIGHT.search(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return False
    return found is not None and float(found[1]) == 0


end = time.monotonic() + float(sys.argv[1])
# New requests come until every node has heard that the pod is leaving.
time.sleep(min(5.0, float(sys.argv[1])))
while time.monotonic() < end and not idle(int(sys.argv[2])):
    time.sleep(min(1.0, max(0.0, end - time.monotonic())))
