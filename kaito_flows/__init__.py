"""KAITO workspaces as Prefect flows: the library behind the flows, which knows no Prefect."""

__version__ = "0.1.0"
