"""How much of the time of a rented node goes into training, and how soon training starts.

    node 4 min ─► image 1 min beside weights 3 min ─┐
    dataset 5 min ──────────────────────────────────┴─► training 20 min ─► release ─► publish

The latencies are simulated, from published figures; the pipeline is the product's, on a Prefect server of its own. A
simulated minute lasts `--scale` seconds, so that what the pipeline itself takes weighs more here than it would.

    python -m benchmarks.nodes.pipeline                    # 90 s
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

LIMITS = {"start": 1.1, "idle": 0.15, "release": 10.0, "calls": 12}
HOURS = {6: 12, 24: 12, 72: None}
"""Leases whose requests are counted, by their length; with the limit, where one is promised."""


def main() -> int:
    """Measure, and print a table; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=3.0, help="seconds that a simulated minute lasts")
    parser.add_argument("--no-warm-up", action="store_true", help="pods get all they need when they start")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "KAITO_FLOWS_HOME": f"{folder}/home",
            "KAITO_FLOWS_PLATFORM": "kubernetes",
            "KAITO_FLOWS_NODES": "aks",
            "PREFECT_HOME": f"{folder}/prefect",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        return measure(Path(folder), given.scale, warm=not given.no_warm_up)


def measure(folder: Path, scale: float, *, warm: bool) -> int:
    """Run the flow once on simulated nodes."""
    from prefect.testing.utilities import prefect_test_harness

    from benchmarks.nodes.simulation import Clock, Minutes, SimulatedCloud, SimulatedPlatform
    from kaito_flows.dataset import prepare_dataset
    from kaito_flows.flows import tune_workspace as flow_module
    from kaito_flows.nodes import renting
    from kaito_flows.settings import Settings
    from kaito_flows.tasks import prepare_dataset as prepare_module

    minutes, settings = Minutes(scale=scale), Settings()
    workspace = write_workspace(folder)

    def slow_prepare(*args: Any) -> Any:
        minutes.pass_by(minutes.dataset)
        clock.mark("dataset there")
        return prepare_dataset(*args)

    with prefect_test_harness(server_startup_timeout=120):
        clock = Clock(minutes)
        cloud = SimulatedCloud(minutes, clock)
        nodes = renting.RentedNodes(cloud, cloud, settings)  # type: ignore[arg-type]  # of the cluster, it lists nodes
        platform = SimulatedPlatform(settings, minutes, clock, warm=warm)
        with (
            mock.patch.object(flow_module, "open_nodes", lambda settings: nodes),
            mock.patch.object(flow_module, "open_platform", lambda *_: platform),
            mock.patch.object(prepare_module, "prepare_dataset", slow_prepare),
            mock.patch.object(renting, "_NODE_SECONDS", renting._NODE_SECONDS * scale / 60),
        ):
            facts = flow_module.tune_workspace(workspace, serve=False)
        clock.mark("run over")
    missed = report(minutes, clock, cloud.calls, facts, scale)
    return max(missed, report_leases(folder))


def report(minutes: Any, clock: Any, calls: list[str], facts: dict[str, Any], scale: float) -> int:
    """Print what happened when, and what is promised; return 1 when that is missed."""
    say = sys.stdout.write
    say(f"{time.strftime('%Y-%m-%d %H:%M')}, a simulated minute lasts {scale:g} s\n\n| minute | |\n|---:|---|\n")
    for what, at in sorted(clock.at.items(), key=lambda item: item[1]):
        say(f"| {at:.2f} | {what} |\n")
    at = clock.at
    held = at["release asked for"] - at["node ready"]
    measured = {
        "start": at["first step"] / minutes.chain,
        "idle": 1 - minutes.training / held,
        "release": (at["release asked for"] - at["trained"]) * scale,
        "calls": len(calls),
    }
    says = {
        "start": f"first step at {at['first step']:.2f} min: times the longest chain ({minutes.chain:g} min)",
        "idle": "share of the time from Ready to release that was not training",
        "release": "real seconds from the end of training until release was asked for",
        "calls": f"calls to the cloud ({', '.join(calls)})",
    }
    say("\n| measured | limit | |\n|---:|---:|---|\n")
    for key, value in measured.items():
        say(f"| {value:.3g} | {LIMITS[key]:g} | {says[key]} |\n")
    say(f"\none stage after the other, the first step would come at {minutes.sequential:g} min; the run's own count: ")
    say(f"{facts['cost']}\n")
    return int(any(value > LIMITS[key] for key, value in measured.items()))


def report_leases(folder: Path) -> int:
    """Print what longer leases ask of Azure; return 1 when it is more than is promised."""
    from benchmarks.nodes.leases import count_requests

    sys.stdout.write("\n| hours leased | requests to ARM | limit | |\n|---:|---:|---:|---|\n")
    missed = 0
    for hours, limit in HOURS.items():
        place = folder / f"azure-{hours}"
        place.mkdir()
        found = count_requests(place, hours)
        told = ", ".join(f"{count} {method}" for method, count in sorted(found.items()))
        sys.stdout.write(f"| {hours} | {found.total()} | {limit or ''} | {told} |\n")
        missed |= int(limit is not None and found.total() > limit)
    return missed


def write_workspace(folder: Path) -> Any:
    """A small Workspace with real data, for a size that costs money."""
    from kaito_flows.workspace import WorkspaceV1beta1

    rows = [
        f'{{"messages": [{{"role": "user", "content": "{i}"}}, {{"role": "assistant", "content": "{i}!"}}]}}'
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("\n".join(rows))
    return WorkspaceV1beta1.model_validate(
        {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": {"name": "simulated"},
            "resource": {
                "instanceType": "Standard_NC24ads_A100_v4",
                "labelSelector": {"matchLabels": {"app": "simulated"}},
            },
            "tuning": {
                "preset": {"name": "tiny-phi-3"},
                "method": "qlora",
                "input": {"urls": [f"file:{folder}/chats.jsonl"]},
                "output": {"image": "localhost/simulated:latest"},
            },
        }
    )


if __name__ == "__main__":
    raise SystemExit(main())
