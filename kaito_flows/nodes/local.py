"""This machine as a node: it is always there, costs nothing, and need not be given back."""

from __future__ import annotations

import platform
import socket

from kaito_flows.nodes.base import NodeLease


class LocalNodes:
    """The provider whose one node is this machine."""

    def lease(self, workspace: str, instance_type: str) -> NodeLease:
        """Return this machine, whatever size the Workspace names: on this platform the size only speaks of the plan."""
        return NodeLease("local", workspace, (socket.gethostname(),), platform.machine(), 0.0)

    def release(self, lease: NodeLease) -> None:
        """Nothing is rented, so nothing is given back."""
