"""What Kopf remembers of objects, in memory: by default it writes annotations, a request and a line of noise each.

Nothing is lost with it: after a restart every Workspace is looked at again, and its run is found by its key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from kaito_flows.flows.watching.slim_kopf import kopf
from kaito_flows.flows.watching.wish import PREFIX, essence

_TOUCHED = PREFIX + "touched"


class LastHandled(kopf.DiffBaseStorage):
    """What of each Workspace was acted upon last."""

    def __init__(self) -> None:
        super().__init__()
        self._by_uid: dict[str, Any] = {}

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> kopf.BodyEssence:
        """Only what matters: a label, or what the run writes into the status, wakes nobody."""
        return cast(kopf.BodyEssence, essence(body))

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        """What was acted upon, if anything was."""
        return self._by_uid.get(str(body.metadata.get("uid")))

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Remember what was acted upon."""
        self._by_uid[str(body.metadata.get("uid"))] = essence

    def forget(self, uid: str) -> None:
        """Forget an object that is gone."""
        self._by_uid.pop(uid, None)


class Progress(kopf.ProgressStorage):
    """How often a handler was tried, and when it is tried again."""

    def __init__(self) -> None:
        super().__init__()
        self._records: dict[tuple[str, str], Any] = {}

    def fetch(self, *, key: Any, body: kopf.Body) -> Any:
        """The record of a handler."""
        return self._records.get((str(body.metadata.get("uid")), key))

    def store(self, *, key: Any, record: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """Keep the record of a handler."""
        self._records[str(body.metadata.get("uid")), key] = record

    def purge(self, *, key: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        """Forget the record: the handler is done."""
        self._records.pop((str(body.metadata.get("uid")), key), None)

    def touch(self, *, body: kopf.Body, patch: kopf.Patch, value: str | None) -> None:
        """Change an annotation: the event that follows is what wakes Kopf for the next try."""
        if value is not None or _TOUCHED in body.metadata.annotations:
            patch.metadata.annotations[_TOUCHED] = value

    def clear(self, *, essence: Any) -> Any:
        """Nothing of it is in the essence."""
        return essence
