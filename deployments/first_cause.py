"""Why an epoch was lost: what is noticed first is often only an effect.

A rank that fails says so, its process ends and its socket is gone: the driver may come upon these
three in any order. Its peers, who wait for it, fail too and complain of it, and they may be heard
first. So before an epoch's loss is judged, the driver listens a little longer, and then takes

1. the rank that a signal ended: nobody in the epoch did that (`was killed` overrules complaints);
2. the complaint of the rank that was noticed, in its own words, rather than the exit code or the
   closed socket that follows from it;
3. the end of the rank that was noticed, rather than its closed socket;
4. else what was noticed.

Where it is a complaint, and ranks of other nodes have said nothing more at all, their node is lost:
Ray takes far longer to see that.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from deployments.fleet import Death
from deployments.gang import Cause, GangFailed, complaint
from deployments.worker_link import WorkerLink
from workers.protocol import Failed

GRACE_S = 0.25
"""How long words and notices of deaths are waited for, unless the cause is certain before. A death
is seen at once, but its notice passes through a process that a busy machine may not let run."""
LOOK_S = 0.005

LOST_NODE_BEATS = 4
"""And for how many heartbeats a sign of each other node."""


def first_cause(
    noticed: GangFailed,
    *,
    deaths: Callable[[], list[Death]],
    link: WorkerLink,
    other_nodes: Mapping[str, Sequence[int]],
    beat_ms: int,
) -> GangFailed:
    """What to say of a loss. Waits for 0.25 s, and up to four heartbeats more for a silent node.

    `deaths` is the fleet's. `other_nodes` are the ranks of every node but the driver's, by
    address: what dies on the driver's own is seen.
    """
    if noticed.cause not in (Cause.FAILED, Cause.DIED, Cause.LINK):
        return noticed
    words: dict[int, str] = {}
    heard: set[int] = set()
    ended: list[Death] = []
    cause = noticed
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and not is_killing(cause):
        link.socket.poll(round(LOOK_S * 1000))
        for rank, message in link.receive():
            heard.add(rank)
            if isinstance(message, Failed):
                words.setdefault(rank, message.reason)
        ended += deaths()
        cause = judge(noticed, words, ended)
    if cause.cause is not Cause.FAILED or cause.rank is None:
        return cause
    return _lost_node(cause, link, other_nodes, heard | {cause.rank}, beat_ms)


def judge(noticed: GangFailed, words: Mapping[int, str], deaths: Sequence[Death]) -> GangFailed:
    """The rules above; `words` are the complaints by rank."""
    if is_killing(noticed):
        return noticed
    complained = set(words)
    if noticed.cause is Cause.FAILED and noticed.rank is not None:
        complained.add(noticed.rank)
    for death in deaths:
        if death.by_signal and death.rank not in complained:  # one that crashes has complained
            return GangFailed(death.sentence, death.rank, cause=Cause.DIED)
    if noticed.cause is Cause.FAILED or noticed.rank is None:
        return noticed
    if noticed.rank in words:
        return complaint(noticed.rank, words[noticed.rank])
    if noticed.cause is Cause.LINK:
        for death in deaths:
            if death.rank == noticed.rank:
                return GangFailed(death.sentence, death.rank, cause=Cause.DIED)
    return noticed


def is_killing(failure: GangFailed) -> bool:
    return failure.cause is Cause.DIED and Death(failure.rank or 0, str(failure)).by_signal


def _lost_node(
    failure: GangFailed,
    link: WorkerLink,
    other_nodes: Mapping[str, Sequence[int]],
    heard: set[int],
    beat_ms: int,
) -> GangFailed:
    unheard = dict(other_nodes)
    wait_s = LOST_NODE_BEATS * beat_ms / 1000
    deadline = time.monotonic() + wait_s
    while True:
        heard |= {rank for rank, _ in link.receive()}
        unheard = {ip: ranks for ip, ranks in unheard.items() if heard.isdisjoint(ranks)}
        left_s = deadline - time.monotonic()
        if not unheard or left_s <= 0:
            break
        link.socket.poll(round(left_s * 1000))
    for ip, ranks in unheard.items():
        return GangFailed(
            f"node {ip} is lost: its ranks {list(ranks)} have said nothing for {wait_s:.1f} s, "
            f"and {failure}",
            ranks[0],
            cause=Cause.SILENT,
        )
    return failure
