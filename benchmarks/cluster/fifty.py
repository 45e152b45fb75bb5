"""Fifty Workspaces applied at once on four GPUs: all finish, none is trained twice, and the API server hardly notices.

The tuning pods, the GPUs that they wait for, the registry and the watcher are real. Flow runs are processes of this
machine (a `process` work pool, `--concurrent` at a time): fifty pods of the worker image do not fit on two cores. The
watcher and the flow runs speak to the API server through a counting proxy each.

    KUBECONFIG=… KAITO_FLOWS_TEST_TAG=… python -m benchmarks.cluster.fifty --workspaces 50 --concurrent 6 --postgresql
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import psutil

from benchmarks.cluster.counting import Asked, CountingProxy, table
from benchmarks.cluster.ground import (
    BIN,
    Ground,
    Object,
    Prefect,
    Recorder,
    chats_image,
    ground,
    prefect_server,
    running,
    say,
    surroundings,
    training_config,
    wait_for,
    workspace,
)

LIMIT_REQUESTS, LIMIT_BYTES, GPUS = 30.0, 200e6, 4
IDLE_SECONDS = 60
POOL = "processes"
ENDED = ("Succeeded", "Failed", "Stopped")


def main() -> int:
    """Apply them, wait, and print what was found; 1 when a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspaces", type=int, default=50)
    parser.add_argument("--concurrent", type=int, default=6, help="flow runs at a time")
    parser.add_argument("--steps", type=int, default=2, help="of each training")
    parser.add_argument("--minutes", type=float, default=60.0, help="the most that it may take")
    parser.add_argument("--postgresql", action="store_true", help="Prefect's database; else SQLite")
    given = parser.parse_args()
    with (
        ground() as here,
        prefect_server(here, postgresql=given.postgresql) as prefect,
        Crowd(here, prefect, given.concurrent) as crowd,
    ):
        say(surroundings(here))
        crowd.apply(given.workspaces, given.steps)
        crowd.wait(given.minutes)
        time.sleep(20)
        return crowd.tell()


class Crowd(contextlib.ExitStack):
    """The Workspaces, who works for them, and what is seen of it."""

    def __init__(self, here: Ground, prefect: Prefect, concurrent: int) -> None:
        super().__init__()
        self.here, self.prefect = here, prefect
        self.of_watcher = CountingProxy(here.cluster.connection.http)
        self.of_runs = CountingProxy(here.cluster.connection.http)
        self.of_watcher_in_prefect = CountingProxy(httpx.Client(base_url=prefect.url.removesuffix("/api")))
        self.seen = Recorder(here.cluster, "Workspace", "Job", "Pod")
        self.begun = 0.0
        self.watcher_bytes: list[int] = []
        self._start(concurrent)

    def _start(self, concurrent: int) -> None:
        for flow in ("tune", "serve"):
            flow_id = self.prefect.ask("flows/", name=f"{flow}-workspace")["id"]
            if flow == "tune":
                self.prefect.ask("work_pools/", name=POOL, type="process", base_job_template=_template())
            entrypoint = f"kaito_flows.flows.{flow}_workspace.{flow}_workspace"
            self.prefect.ask(
                "deployments/", name="kubernetes", flow_id=flow_id, entrypoint=entrypoint, work_pool_name=POOL
            )  # fmt: skip
        folder = self.here.folder
        common = {
            **{k: v for k, v in os.environ.items() if not k.startswith("KAITO_FLOWS_")},
            **self.here.settings(),
            "KAITO_FLOWS_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.prefect.url,
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
        }
        by_runs = self.of_runs.kubeconfig(folder / "runs.yaml", self.here.namespace)
        by_watcher = self.of_watcher.kubeconfig(folder / "watcher.yaml", self.here.namespace)
        worker = [str(BIN / "prefect"), "worker", "start", "--pool", POOL, "--limit", str(concurrent)]
        environment = {**common, "KUBECONFIG": str(by_runs), "PREFECT_HOME": str(folder / "prefect-worker")}
        environment["PREFECT_WORKER_QUERY_SECONDS"] = "2"
        self.enter_context(running(worker, environment, folder / "worker.log"))
        watcher = [str(BIN / "kaito-flows"), "watch", "--namespace", self.here.namespace]
        environment = {**common, "KUBECONFIG": str(by_watcher), "PREFECT_HOME": str(folder / "prefect-watcher")}
        environment["PREFECT_API_URL"] = f"{self.of_watcher_in_prefect.url}/api"
        process = self.enter_context(running(watcher, environment, folder / "watcher.log"))
        threading.Thread(target=self._weigh, args=(process.pid,), daemon=True).start()
        wait_for(lambda: self.of_watcher.asked or None, 60, "the watcher watches", every=0.2)

    def _weigh(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            while True:
                self.watcher_bytes.append(process.memory_info().rss)
                time.sleep(0.5)

    def apply(self, count: int, steps: int) -> None:
        """Apply that many Workspaces with one `kubectl apply`."""
        data, config = chats_image(self.here), training_config(self.here, max_steps=steps, save_steps=steps)
        alone = {"annotations": {"kaito-flows/serve": "false"}}
        documents = [workspace(self.here, f"crowd-{i:02}", data, config=config, metadata=alone) for i in range(count)]
        self.begun = time.time()
        self.here.installer.apply(documents)
        say(f"applied {count} Workspaces in {time.time() - self.begun:.1f} s")

    def wait(self, minutes: float) -> None:
        """Wait until all have ended."""
        deadline = time.time() + 60 * minutes
        told = 0.0
        while any(item.get("status", {}).get("state") not in ENDED for item in self._workspaces()):
            if time.time() > deadline:
                say(f"not all have ended after {minutes:.0f} minutes")
                return
            if time.time() - told > 60:
                told = time.time()
                states = Counter(item.get("status", {}).get("state", "-") for item in self._workspaces())
                say(f"  {(told - self.begun) / 60:4.1f} min: {', '.join(f'{n} {s}' for s, n in states.items())}")
            time.sleep(1)

    def _workspaces(self) -> list[Object]:
        return list(self.seen.there("Workspace").values())

    def tell(self) -> int:
        """Print what was found; return 1 when a promise is not kept."""
        found = self._workspaces()
        states = Counter(item.get("status", {}).get("state", "-") for item in found)
        jobs: dict[str, set[str]] = {}
        pods: dict[str, set[str]] = {}
        for _, _, item in list(self.seen.seen):
            labels = item["metadata"].get("labels", {})
            if labels.get("app.kubernetes.io/component") == "tuner" and item["kind"] in ("Job", "Pod"):
                kind = jobs if item["kind"] == "Job" else pods
                kind.setdefault(labels["kaito.sh/workspace"], set()).add(item["metadata"]["uid"])
        adapters = {item["metadata"]["name"]: self._adapters(item["metadata"]["name"]) for item in found}
        ends = self._ends()
        lives = sum(end - self.begun for end in ends.values()) / 60
        runs = [
            run
            for run in self._runs()
            if run["start_time"] and run["end_time"]
        ]  # fmt: skip
        busy = sum(_seconds(run["end_time"]) - _seconds(run["start_time"]) for run in runs) / 60
        last = max(ends.values(), default=time.time())
        by_runs = self.of_runs.since(self.begun)
        by_watcher = [one for one in self.of_watcher.since(self.begun) if one.time <= last]
        asked = len(by_runs) + len(by_watcher)
        idle_from = time.time()
        time.sleep(IDLE_SECONDS)
        idle = self.of_watcher.since(idle_from) + self.of_watcher_in_prefect.since(idle_from)
        facts = [
            (f"all of {len(found)} finish", dict(states) == {"Succeeded": len(found)}, dict(states)),
            (
                "none is trained twice: one Job, one pod, one adapter each",
                all(len(one.get(name, ())) == 1 for one in (jobs, pods, adapters) for name in adapters),
                {
                    "jobs": sum(map(len, jobs.values())),
                    "pods": sum(map(len, pods.values())),
                    "adapters": sum(map(len, adapters.values())),
                },
            ),
            (f"at most {GPUS} pods on {GPUS} GPUs", self._most_at_once() <= GPUS, self._most_at_once()),
            (
                f"API requests per workspace-minute (of life), below {LIMIT_REQUESTS:.0f}",
                asked / lives < LIMIT_REQUESTS,
                f"{asked / lives:.1f}",
            ),
            (
                "watcher's memory, below 200 MB",
                max(self.watcher_bytes) < LIMIT_BYTES,
                f"{max(self.watcher_bytes) / 1e6:.0f} MB at most, {self.watcher_bytes[-1] / 1e6:.0f} MB at the end",
            ),
            (
                f"requests of the idle watcher in {IDLE_SECONDS} s, besides its watch",
                not [one for one in idle if one.verb != "watch"],
                Counter(f"{one.verb} {one.resource}" for one in idle) or 0,
            ),
        ]
        say(f"\n{len(found)} Workspaces ended after {(last - self.begun) / 60:.1f} min")
        for what, kept, value in facts:
            say(f"  {'kept  ' if kept else 'BROKEN'}  {what:66} {value}")
        say(f"\n  {asked} requests, {asked / max(len(found), 1):.1f} for each Workspace")
        say(f"  {lives:.1f} minutes of Workspaces' lives, of them {busy:.1f} in flow runs")
        say(f"  {len(by_runs) / busy:.1f} requests in a minute of a flow run (no promise: it is the harsher measure)")
        self._tell_table("flow runs", by_runs)
        self._tell_table("watcher", by_watcher)
        self._tell_table("watcher, of Prefect", self.of_watcher_in_prefect.since(self.begun))
        for item in found:
            if item.get("status", {}).get("state") != "Succeeded":
                say(f"  {item['metadata']['name']}: {json.dumps(item.get('status', {}).get('conditions'))[:600]}")
        log = (self.here.folder / "prefect-server.log").read_text(errors="replace")
        say(f"  Prefect's log: {log.count('database is locked')} times 'database is locked'")
        return int(not all(kept for _, kept, _ in facts))

    def _tell_table(self, who: str, asked: list[Asked]) -> None:
        say(f"\n  asked by {who}: {len(asked)}")
        for name, count in table(asked)[:14]:
            say(f"    {count:6}  {name}")

    def _adapters(self, name: str) -> list[str]:
        """The tags of the adapters in a Workspace's repository: one for each identity that was trained."""
        return [tag for tag in self.here.tags(name) if tag.startswith("run-")]

    def _ends(self) -> dict[str, float]:
        """When each Workspace's end was seen first; for one that has not ended, now."""
        ends: dict[str, float] = {item["metadata"]["name"]: time.time() for item in self._workspaces()}
        done: set[str] = set()
        for moment, _, item in list(self.seen.seen):
            name = item["metadata"]["name"]
            if item["kind"] == "Workspace" and name not in done and item.get("status", {}).get("state") in ENDED:
                done.add(name)
                ends[name] = moment
        return ends

    def _runs(self) -> Iterator[dict[str, Any]]:
        offset = 0
        while page := self.prefect.ask("flow_runs/filter", limit=100, offset=offset, sort="START_TIME_ASC"):
            yield from page
            offset += len(page)

    def _most_at_once(self) -> int:
        """The most tuning pods that ran at the same time."""
        now: set[str] = set()
        most = 0
        for _, event, item in list(self.seen.seen):
            if (
                item["kind"] != "Pod"
                or item["metadata"].get("labels", {}).get("app.kubernetes.io/component") != "tuner"
            ):
                continue
            running_now = item.get("status", {}).get("phase") == "Running" and event != "DELETED"
            (now.add if running_now else now.discard)(item["metadata"]["uid"])
            most = max(most, len(now))
        return most


def _template() -> dict[str, Any]:
    """The work pool's job template: Prefect's own for processes."""
    from prefect.workers.process import ProcessWorker

    template: dict[str, Any] = ProcessWorker.get_default_base_job_template()
    return template


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    raise SystemExit(main())
