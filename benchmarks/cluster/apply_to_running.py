"""How long from `kubectl apply` of a Workspace until its tuning container runs, next to what that cannot be less than.

    a   kubectl apply of the bare tuning Job          ─► its container runs
    b   a run of an empty flow's deployment is made   ─► the flow's body starts      (Prefect's own dispatch)
    c   kubectl apply of the Workspace                ─► the tuning container runs

All three in turn, several times, in one run: c - (a + b) is to be 5 s at most. The worker is the base's own, in the
cluster; flow runs get pods. Images are on the node, and the dataset was prepared before: what is measured is a second
apply of the same data under another name (it is never trained: the Workspace is deleted once its container runs).

    KUBECONFIG=… KAITO_FLOWS_TEST_TAG=… python -m benchmarks.cluster.apply_to_running --rounds 5
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime
from typing import Any

from benchmarks.cluster.ground import (
    TAG,
    Ground,
    Object,
    Prefect,
    Recorder,
    chats_image,
    ground,
    median,
    prefect_server,
    rights,
    say,
    surroundings,
    training_config,
    wait_for,
    workspace,
)

LIMIT_SECONDS = 5.0
EMPTY_FLOW = '''
from prefect import flow

@flow(name="empty")
def empty():
    """Do nothing."""
'''
ENVIRONMENT = {
    "PREFECT_HOME": "/tmp/prefect",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "DO_NOT_TRACK": "1",
    "KAITO_FLOWS_HOME": "/tmp/kaito-flows",
    "PYTHONPATH": "/etc/empty-flow",
}


def main() -> int:
    """Measure, and print a table; 1 when the limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with ground() as here, prefect_server(here) as prefect:
        say(surroundings(here))
        measure = Measure(here, prefect)
        measure.deploy()
        say("a first Workspace prepares the dataset, and shows which Job is made")
        measure.apply_workspace("warm-up", keep=True)
        if not any(tag.startswith("dataset-") for tag in here.tags("adapters")):
            raise SystemExit("the first Workspace left no dataset behind")
        measure.dispatch_empty()
        found: dict[str, list[float]] = {"a": [], "b": [], "c": []}
        pieces: list[dict[str, float]] = []
        for number in range(rounds):
            found["a"].append(measure.apply_job(f"bare-{number}"))
            found["b"].append(measure.dispatch_empty())
            seconds, parts = measure.apply_workspace(f"round-{number}")
            found["c"].append(seconds)
            pieces.append(parts)
            a, b, c = (found[k][-1] for k in "abc")
            say(f"round {number + 1}: a {a:.2f} s, b {b:.2f} s, c {c:.2f} s; c - (a + b) {c - a - b:.2f} s")
    return _tell(found, pieces)


def _tell(found: dict[str, list[float]], pieces: list[dict[str, float]]) -> int:
    overs = [c - a - b for a, b, c in zip(*found.values(), strict=True)]
    over = median(found["c"]) - median(found["a"]) - median(found["b"])
    rows = {
        "a  kubectl apply of the bare Job, until its container runs": found["a"],
        "b  Prefect's dispatch of an empty flow": found["b"],
        "c  kubectl apply of the Workspace, until its container runs": found["c"],
        "c - (a + b) of each round": overs,
    }
    say(f"\nmedians of {len(pieces)} rounds (lowest to highest), s")
    for name, values in rows.items():
        say(f"  {name:64} {median(values):6.2f}  ({min(values):.2f} to {max(values):.2f})")
    verdict = "held" if over <= LIMIT_SECONDS else "MISSED"
    say(f"  {f'c - (a + b) of the medians, limit {LIMIT_SECONDS:.0f} s':64} {over:6.2f}  {verdict}")
    say("\nwhere c goes (medians), s")
    for name in pieces[0]:
        say(f"  {name:64} {median([p.get(name, 0.0) for p in pieces]):6.2f}")
    return int(over > LIMIT_SECONDS)


class Measure:
    """The three measurements, and what has to be there for them."""

    def __init__(self, here: Ground, prefect: Prefect) -> None:
        self.here, self.prefect = here, prefect
        self.seen = Recorder(here.cluster, "Workspace", "Job", "Pod")
        self.data = chats_image(here)
        self._tuned = 0
        self.job: Object = {}
        self.empty_id = ""

    def deploy(self) -> None:
        """Install the base's worker and watcher here, and the deployment of the empty flow."""
        namespace = self.here.namespace
        wanted = []
        for manifest in json.loads(json.dumps(rights(self.here)).replace("worker:dev", f"worker:{TAG}")):
            data = manifest.get("data", {})
            if "job-template.json" in data:
                data["job-template.json"] = _template(data["job-template.json"], namespace)
            elif "PREFECT_API_URL" in data:
                data |= {"PREFECT_API_URL": self.prefect.url, **self.here.settings()}
            if manifest["metadata"]["name"] == "kaito-flows-watcher":
                manifest["spec"]["template"]["spec"]["containers"][0]["args"] = ["--namespace", namespace]
            wanted.append(manifest)
        flow = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "empty-flow"}}
        self.here.installer.apply([*wanted, {**flow, "data": {"empty_flow.py": EMPTY_FLOW}}])

        def ready() -> bool | None:
            found = self.here.kubectl.get("deployments")["items"]
            return all(d["status"].get("readyReplicas") for d in found) or None

        wait_for(ready, 300, "worker and watcher are ready", every=0.5)
        flow_id = self.prefect.ask("flows/", name="empty")["id"]
        made = self.prefect.ask(
            "deployments/", name="empty", flow_id=flow_id, entrypoint="empty_flow.empty", work_pool_name="kubernetes",
            job_variables={"image": f"kaito-flows/worker:{TAG}", "env": ENVIRONMENT},
        )  # fmt: skip
        self.empty_id = made["id"]

    def apply_job(self, name: str) -> float:
        """Measure a."""
        job = json.loads(json.dumps(self.job))
        job["metadata"] = {"name": name}
        job["spec"]["template"]["metadata"] = {"labels": {"bare": name}}
        begun = time.time()
        self.here.kubectl("apply", "--filename", "-", stdin=job)
        moment, _ = self._running(lambda pod: pod["metadata"].get("labels", {}).get("bare") == name, begun)
        self.here.kubectl("delete", "job", name)
        self._clear()
        return moment - begun

    def dispatch_empty(self) -> float:
        """Measure b."""
        begun = time.time()
        run = self.prefect.ask(f"deployments/{self.empty_id}/create_flow_run")
        started = wait_for(lambda: self._started(run["id"]), 120, "the empty flow starts", every=0.2)
        wait_for(lambda: self._ended(run["id"]), 60, "the empty flow ends", every=0.2)
        self._clear()
        return started - begun

    def apply_workspace(self, name: str, *, keep: bool = False) -> tuple[float, dict[str, float]]:
        """Measure c; return where it went as well. `keep` remembers the Job."""
        # Another learning rate each time: what was tuned before is not tuned again.
        self._tuned += 1
        config = training_config(self.here, f"training-{self._tuned}", learning_rate=0.01 + 0.0001 * self._tuned)
        document = workspace(self.here, name, self.data, config=config)
        # One repository for all: that is where the dataset is found.
        document["tuning"]["output"]["image"] = f"{self.here.registry.host}/{self.here.namespace}/adapters:{name}"
        begun = time.time()
        self.here.kubectl("apply", "--filename", "-", stdin=document)
        moment, pod = self._running(
            lambda pod: pod["metadata"].get("labels", {}).get("kaito.sh/workspace") == name, begun
        )
        [run] = [
            run
            for run in self.prefect.ask("flow_runs/filter", limit=50)
            if f"workspace:{self.here.namespace}/{name}" in run["tags"]
        ]
        parts = self._parts(begun, moment, pod, run)
        if keep:
            self._keep(pod)
        self.here.kubectl("delete", "workspace", name, "--timeout=60s")
        self._clear()
        return moment - begun, parts

    def _keep(self, pod: Object) -> None:
        """Keep the Job and its ConfigMap, without what ties them to their Workspace."""
        job = self.here.kubectl.get("job", pod["metadata"]["labels"]["job-name"])
        spec = job["spec"]
        spec.pop("selector")
        self.job = {"apiVersion": "batch/v1", "kind": "Job", "spec": spec}
        [config] = [v for v in spec["template"]["spec"]["volumes"] if v["name"] == "config"]
        data = self.here.kubectl.get("configmap", config["configMap"]["name"])["data"]
        config["configMap"]["name"] = "bare"
        made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "bare"}, "data": data}
        self.here.kubectl("apply", "--filename", "-", stdin=made)

    def _running(self, is_it: Any, since: float) -> tuple[float, Object]:
        return wait_for(
            lambda: self.seen.first("Pod", lambda pod: is_it(pod) and _started(pod, "containerStatuses"), since),
            240,
            "the tuning container runs",
        )

    def _started(self, run: str) -> float | None:
        found = self.prefect.read(f"flow_runs/{run}")["start_time"]
        return None if found is None else _seconds(found)

    def _ended(self, run: str) -> bool | None:
        return self.prefect.read(f"flow_runs/{run}")["state_type"] == "COMPLETED" or None

    def _clear(self) -> None:
        """Nothing of one measurement is to run beside the next one."""
        selector = "app.kubernetes.io/component notin (worker,watcher)"
        self.here.kubectl("delete", "job", "--all", "--cascade=background", "--wait=false")
        self.here.kubectl("delete", "pod", "--selector", selector, "--grace-period=0", "--force", "--wait=true")

        def gone() -> bool | None:
            components = [
                pod["metadata"].get("labels", {}).get("app.kubernetes.io/component")
                for pod in self.here.kubectl.get("pods")["items"]
            ]
            return all(component in ("worker", "watcher") for component in components) or None

        wait_for(gone, 60, "the pods are gone", every=0.3)
        time.sleep(2)

    def _parts(self, begun: float, end: float, pod: Object, run: Object) -> dict[str, float]:
        """Where the time between two moments went: the steps in their order, and the tasks of the flow run."""
        uid, job = pod["metadata"]["uid"], pod["metadata"]["labels"]["job-name"]
        name = pod["metadata"]["labels"]["kaito.sh/workspace"]

        def of_run(found: Object) -> bool:
            return bool(found["metadata"].get("labels", {}).get("prefect.io/flow-run-id") == run["id"])

        def own(found: Object) -> bool:
            return bool(found["metadata"]["uid"] == uid)

        steps: list[tuple[str, tuple[float, Object] | float | None]] = [
            (
                "kubectl, until the Workspace is seen",
                self.seen.first("Workspace", lambda w: w["metadata"]["name"] == name, begun),
            ),
            ("watcher, until the run is made", _seconds(run["created"])),
            ("Prefect's worker, until the run's Job is made", self.seen.first("Job", of_run, begun)),
            (
                "the run's pod, until its container runs",
                self.seen.first("Pod", lambda p: of_run(p) and _started(p, "containerStatuses"), begun),
            ),
            ("Python, Prefect, the flow's imports, until the flow starts", _seconds(run["start_time"])),
            (
                "the flow, until the tuning Job is made",
                self.seen.first("Job", lambda j: j["metadata"]["name"] == job, begun),
            ),
            ("its pod is made", self.seen.first("Pod", own, begun)),
            (
                "scheduling, volumes, until the container `weights` runs",
                self.seen.first("Pod", lambda p: own(p) and _started(p, "initContainerStatuses"), begun),
            ),
            ("the container `weights`, until the tuning container runs", end),
        ]
        parts, before = {}, begun
        for step, found in steps:
            moment = found if isinstance(found, float) else found[0] if found else before
            parts[step] = moment - before
            before = moment
        for task in self.prefect.ask("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}}):
            if task["start_time"] and task["end_time"]:
                kind = task["name"].partition(f"-{name}")[0]
                parts[f"    in the flow: {kind}"] = _seconds(task["end_time"]) - _seconds(task["start_time"])
        return parts


def _template(text: str, namespace: str) -> str:
    """The base's job template for this namespace, with the empty flow's file in every pod."""
    template = json.loads(text)
    template["variables"]["properties"]["namespace"]["default"] = namespace
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    pod["volumes"].append({"name": "empty-flow", "configMap": {"name": "empty-flow"}})
    pod["containers"][0]["volumeMounts"].append({"name": "empty-flow", "mountPath": "/etc/empty-flow"})
    return json.dumps(template)


def _started(pod: Object, statuses: str) -> bool:
    found = pod.get("status", {}).get(statuses) or [{}]
    return not {"running", "terminated"}.isdisjoint(found[0].get("state", {}))


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


if __name__ == "__main__":
    raise SystemExit(main())
