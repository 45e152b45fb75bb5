"""Logs that are followed to their end, with no line lost and none told twice.

A log can be asked for from a second on, not from a line on; its lines carry the time at which each was written, in
nanoseconds, standard output and standard error not quite in order. So after a break it is asked for from a little
before the newest line, and what was told already is left out.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import httpx

from kaito_flows.cluster.connection import Backoff, Busy
from kaito_flows.cluster.refusals import MissingError, Request
from kaito_flows.cluster.resources import Object, resource
from kaito_flows.errors import AccessError, ClusterError, InputError

if TYPE_CHECKING:
    from kaito_flows.cluster.gateway import Cluster

_OVERLAP = timedelta(seconds=2)
_REMEMBERED = timedelta(seconds=5)
# A program may be silent for as long as it likes; but so is a node that is gone.
_SILENCE_SECONDS = 90.0
_GRACE_MARGIN = timedelta(seconds=10)
_LAST_LINES_SECONDS = 15.0
_STEADY_SECONDS = 30.0
_MAX_LINE_BYTES = 1 << 20
_POD = resource("Pod")
# The runtime keeps a longer line in pieces; old kubelets put the time before each of them.
_PIECE_BYTES = 16384
_TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d) ")


class LogLine(NamedTuple):
    """One line, and when it was written: RFC 3339, as the kubelet says it."""

    time: str
    text: str


class _Told:
    """Which lines were handed over already: by themselves, or by the time up to which somebody else has them."""

    def __init__(self, since: str) -> None:
        self._floor = _nanoseconds(since) if since else 0
        self._newest = self._floor
        self._recent: deque[tuple[int, int]] = deque()

    def params(self) -> dict[str, str]:
        """Return how to ask for what comes next, and a little of what came before."""
        if not self._newest:
            return {}
        moment = datetime.fromtimestamp(self._newest // 10**9, UTC) - _OVERLAP
        return {"sinceTime": moment.strftime("%Y-%m-%dT%H:%M:%SZ")}

    def repeated(self) -> Counter[int]:
        """Return which lines the next answer may repeat, and how often."""
        return Counter(key for _, key in self._recent)

    def new(self, line: LogLine, repeated: Counter[int]) -> bool:
        """Whether the line has not been handed over; it counts as handed over from now on."""
        key, written = hash(line), _nanoseconds(line.time)
        if repeated[key] > 0:
            repeated[key] -= 1
            return False
        if written <= self._floor:
            return False
        self._newest = max(self._newest, written)
        self._recent.append((written, key))
        oldest = self._newest - int(_REMEMBERED.total_seconds()) * 10**9
        while self._recent[0][0] < oldest:
            self._recent.popleft()
        return True


def follow(cluster: Cluster, pod: str, container: str, *, on_line: Callable[[LogLine], None], since: str) -> None:
    """Hand over each line; `Cluster.follow_logs` says how."""
    told = _Told(since)
    backoff = Backoff(cluster.connection.patience_seconds)
    while True:
        began, lines = time.monotonic(), _lines(cluster, pod, container, told, follow=True)
        failure: Exception | None = None
        while failure is None:
            # What `on_line` raises is the caller's: only the reading is tried again.
            try:
                line = next(lines, None)
            # A kubelet that has not heard of the pod yet says that there is none, too.
            except (httpx.TransportError, Busy, InputError, MissingError) as exc:
                failure = exc
                continue
            if line is None:
                break
            backoff.reset()
            on_line(line)
        _raise_what_stays_refused(failure, backoff)
        if time.monotonic() - began > _STEADY_SECONDS:
            backoff.reset()
        found = cluster.get("Pod", pod)
        if found is None or _is_overdue(found):
            return
        if has_ended(found, container):
            _hand_over_the_rest(cluster, pod, container, told, on_line)
            return
        if _has_started(found, container):
            backoff.wait(failure, str(failure or "the log ended before the container") or type(failure).__name__)
        elif not _wait_until_started(cluster, pod, container):
            return


def _raise_what_stays_refused(failure: Exception | None, backoff: Backoff) -> None:
    """Raise what another try does not mend: no right to it, or no such container; not that it has yet to start."""
    if isinstance(failure, AccessError):
        if not backoff.in_doubt:
            raise failure
    elif isinstance(failure, InputError) and any(
        text in failure.message for text in ("is not valid for pod", "must be specified")
    ):
        raise failure


def read(cluster: Cluster, pod: str, container: str, *, tail: int, previous: bool) -> str:
    """Return the last lines; `Cluster.read_logs` says which."""
    params = {"tailLines": str(tail), **({"previous": "true"} if previous else {})}
    if container:
        params["container"] = container
    request = Request("get", _POD, cluster.namespace, pod, "log")
    path = _POD.path(cluster.namespace, pod, "log")
    try:
        return cluster.connection.text(request, path, params=params, patience_seconds=_LAST_LINES_SECONDS)
    except (MissingError, InputError, ClusterError):
        # Not started, gone with its node, or on a node that does not answer: nobody can say what it wrote.
        return ""


def has_ended(pod: Object, container: str = "") -> bool:
    """Whether the container (the pod's first, if none is named) has ended for good."""
    if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return True
    name = container or pod["spec"]["containers"][0]["name"]
    terminated = _state(pod, name).get("terminated")
    if terminated is None:
        return False
    first = any(item["name"] == name for item in pod["spec"].get("initContainers", []))
    return pod["spec"].get("restartPolicy") == "Never" or (first and terminated.get("exitCode") == 0)


def _is_overdue(pod: Object) -> bool:
    """Whether the pod was told to end and should be gone by now: its node does not answer, and nobody can read it."""
    until = pod["metadata"].get("deletionTimestamp")
    return until is not None and datetime.now(UTC) > datetime.fromisoformat(until) + _GRACE_MARGIN


def _state(pod: Object, container: str) -> Object:
    status = pod.get("status", {})
    for item in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        if item["name"] == container:
            state: Object = item.get("state", {})
            return state
    return {}


def _has_started(pod: Object, container: str) -> bool:
    """Whether the container (the pod's first, if none is named) has written a log, or may have."""
    state = _state(pod, container or pod["spec"]["containers"][0]["name"])
    return not state.keys().isdisjoint(("running", "terminated"))


def _wait_until_started(cluster: Cluster, pod: str, container: str) -> bool:
    """Wait until the container writes a log, or never will; return whether the pod is still there."""
    for event, found in cluster.watch("Pod", name=pod, tell_absent=True):
        if event in ("DELETED", "ABSENT"):
            return False
        if has_ended(found, container) or _has_started(found, container):
            return True
    return False


def _hand_over_the_rest(
    cluster: Cluster, pod: str, container: str, told: _Told, on_line: Callable[[LogLine], None]
) -> None:
    """Read once more what was written between the last line that came and the end."""
    backoff = Backoff(_LAST_LINES_SECONDS)
    while True:
        try:
            for line in _lines(cluster, pod, container, told, follow=False):
                on_line(line)
            return
        except InputError:
            return
        except (httpx.TransportError, Busy, MissingError) as exc:
            if isinstance(exc, MissingError) and cluster.get("Pod", pod) is None:
                return
            with suppress(ClusterError):
                backoff.wait(exc, str(exc))
                continue
            return


def _lines(cluster: Cluster, pod: str, container: str, told: _Told, *, follow: bool) -> Iterator[LogLine]:
    """Ask once, and yield the lines that are new."""
    params = {"timestamps": "true", **told.params()}
    if follow:
        params["follow"] = "true"
    if container:
        params["container"] = container
    request = Request("get", _POD, cluster.namespace, pod, "log")
    path = _POD.path(cluster.namespace, pod, "log")
    repeated, rest = told.repeated(), b""
    with cluster.connection.stream(request, path, params=params, read_seconds=_SILENCE_SECONDS) as response:
        for chunk in response.iter_bytes():
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[:_MAX_LINE_BYTES]
            for raw in lines:
                line = _parse(raw)
                if line is not None and told.new(line, repeated):
                    yield line
        # A line without an end was cut by the break, unless nobody will write to it any more.
        last = None if follow else _parse(rest)
        if last is not None and told.new(last, repeated):
            yield last


def _parse(raw: bytes) -> LogLine | None:
    written = _TIME.match(raw)
    if written is None:
        return None
    text, pieces = raw[written.end() : _MAX_LINE_BYTES], []
    while len(text) > _PIECE_BYTES:
        pieces.append(text[:_PIECE_BYTES])
        text = text[_PIECE_BYTES:]
        again = _TIME.match(text)
        text = text[again.end() :] if again else text
    line = b"".join([*pieces, text]).decode("utf-8", errors="replace")
    return LogLine(written[0].decode().rstrip(), line)


def _nanoseconds(text: str) -> int:
    """Return the nanoseconds since 1970 of an RFC 3339 time, which may have nine decimals or none."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"no time zone: {text}")
    digits = re.match(r"\d*", text.partition(".")[2])
    fraction = digits[0] if digits else ""
    return int(moment.replace(microsecond=0).timestamp()) * 10**9 + int(fraction[:9].ljust(9, "0"))
