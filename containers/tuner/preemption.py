"""SIGTERM: what is begun is put in order, and then the program ends."""

from __future__ import annotations

import signal
from types import FrameType

from kaito_flows.errors import PreemptedError

__all__ = ["Preemption"]


class Preemption:
    """Remembers that SIGTERM came. Whoever works asks now and then, at places where it can stop."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Take SIGTERM from now on."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def check(self) -> None:
        """Raise if SIGTERM came before there was anything to save.

        Raises:
            PreemptedError: it did.
        """
        if self.requested:
            raise PreemptedError("stopped by SIGTERM before the first step", hint="start the same job again")
