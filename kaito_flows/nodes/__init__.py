"""Nodes: leased before a run, and given back on every way out."""

from kaito_flows.nodes.base import NodeLease, NodeProvider
from kaito_flows.nodes.local import LocalNodes

__all__ = ["LocalNodes", "NodeLease", "NodeProvider"]
