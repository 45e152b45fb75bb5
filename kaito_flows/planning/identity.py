"""The identity of a run: the same inputs give the same one, and an adapter that has it need not be trained again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kaito_flows.canonical import canonical_digest

__all__ = ["run_identity"]


def run_identity(
    model_id: str,
    revision: str,
    source: Mapping[str, Any],
    method: str,
    config: Mapping[str, Any],
    dataset_digest: str,
    tuner_version: str,
) -> str:
    """Return 64 hex digits over everything that shapes the adapter: model and where its weights come from, method,
    resolved training config, dataset (`sha256:...`), and the tuner's version."""
    return canonical_digest(
        {
            "model": {"id": model_id, "revision": revision, "source": dict(source)},
            "method": method,
            "config": dict(config),
            "dataset": dataset_digest,
            "tuner": tuner_version,
        }
    )
