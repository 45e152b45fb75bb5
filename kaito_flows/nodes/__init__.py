"""Nodes: leased before a run, and given back on every way out."""

from kaito_flows.nodes.base import Holder, NodeLease, NodeProvider, NodeRequest, Offer
from kaito_flows.nodes.local import LocalNodes
from kaito_flows.nodes.opening import open_nodes

__all__ = ["Holder", "LocalNodes", "NodeLease", "NodeProvider", "NodeRequest", "Offer", "open_nodes"]
