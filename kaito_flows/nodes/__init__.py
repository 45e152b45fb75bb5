"""Nodes: leased before a run, and given back on every way out."""

from kaito_flows.nodes.base import NodeLease, NodeProvider, NodeRequest
from kaito_flows.nodes.local import LocalNodes
from kaito_flows.nodes.opening import open_nodes

__all__ = ["LocalNodes", "NodeLease", "NodeProvider", "NodeRequest", "open_nodes"]
