"""This machine as a node: it is always there, costs nothing, and need not be given back."""

from __future__ import annotations

import platform
import socket

from kaito_flows.nodes.base import NodeLease, NodeRequest


class LocalNodes:
    """The provider whose one node is this machine."""

    def lease(self, request: NodeRequest) -> NodeLease:
        """Return this machine, whatever size the Workspace names: on this platform the size only speaks of the plan."""
        return NodeLease("local", request.workspace, (socket.gethostname(),), platform.machine(), 0.0)

    def alive(self, lease: NodeLease) -> bool:
        """It is: this runs on it."""
        return True

    def release(self, lease: NodeLease) -> None:
        """Nothing is rented, so nothing is given back."""
