"""This machine as a node: it is always there, costs nothing, and need not be given back."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping, Sequence
from threading import Event

from kaito_flows.nodes.base import Holder, NodeLease, NodeRequest, Tell
from kaito_flows.planning.machine import this_machine


class LocalNodes:
    """The provider whose one node is this machine."""

    def check(self, request: NodeRequest) -> Mapping[str, str]:
        """Nothing is rented, so nothing speaks against it."""
        return {}

    def lease(self, request: NodeRequest, tell: Tell, stop: Event | None = None) -> NodeLease:
        """Return this machine, whatever size the Workspace names: on this platform the size only speaks of the plan."""
        gpus = 1 if this_machine().gpu_model else 0
        return NodeLease("local", request.workspace, (socket.gethostname(),), platform.machine(), 0.0, gpus=gpus)

    def alive(self, lease: NodeLease) -> bool:
        """It is: this runs on it."""
        return True

    def renew(self, lease: NodeLease, *, followed: bool = False) -> NodeLease:
        """It needs no extension."""
        return lease

    def release(self, holder: Holder, *, keep: bool = False) -> None:
        """Nothing is rented, so nothing is given back."""

    def hand_over(self, holder: Holder, nodes: Sequence[str]) -> None:
        """Nothing is rented, so nothing changes hands."""
