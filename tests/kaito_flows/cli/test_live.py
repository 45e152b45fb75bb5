"""What a run tells while it runs, and what it came to, on a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import pytest

from kaito_flows.cli import output
from kaito_flows.cli.live import Live

REASON = (
    "Standard_NC24ads_A100_v4 (spot) in zone 1 cannot be had: no-capacity: AllocationFailed: Allocation failed. We do "
    "not have sufficient capacity for the requested VM size in this zone."
)
FACTS: dict[str, Any] = {
    "workspace": "w",
    "flow_run_id": "00000000-0000-0000-0000-000000000000",
    "reused": False,
    "adapter": {"reference": "r.example/w:1", "digest": "sha256:" + "0" * 64},
    "metrics": {"evaluation": {}},
    "seconds": {"tune": 1.0},
}
COST = {"usd": 1.47, "gpu_hours": 0.4, "paid_seconds": 1200.0, "boot_seconds": 240.0, "training_share": 0.87}


def test_why_a_node_cannot_be_had_is_wrapped_on_a_terminal_and_one_line_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Live(quiet=False) as live:
        live.on_event("provision nodes", {"event": "stage", "name": REASON})
        assert capsys.readouterr().out == f"provision nodes  {REASON}\n"
        monkeypatch.setattr(output, "_width", lambda: 80)
        live.on_event("provision nodes", {"event": "stage", "name": REASON})
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("provision nodes  Standard_NC24ads_A100_v4 (spot)")
    assert rest
    assert all(line.startswith(" " * 17) for line in rest)
    assert max(map(len, (first, *rest))) <= 80


def test_what_the_nodes_cost_is_said_at_the_end_where_they_cost_something(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_width", lambda: 80)
    output.summary({**FACTS, "cost": COST})
    said = capsys.readouterr().out
    assert (
        "cost     1.47 USD, 0.40 GPU hours, 87% of the paid time training, 4m until the\n         nodes were ready\n"
    ) in said
    output.summary({**FACTS, "cost": {**COST, "usd": 0.0}})
    assert "cost" not in capsys.readouterr().out
