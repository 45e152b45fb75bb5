"""The watcher on a real cluster and a real Prefect server: each generation has its run, once, whatever is killed."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

pytestmark = pytest.mark.cluster

# What the watcher runs as, with a platform that writes down what it is asked to delete, and counts its own requests.
PROGRAM = """
import sys
import aiohttp
from kaito_flows.flows import delete_workspace, watch_workspaces

record, requests, liveness, *namespaces = sys.argv[1:]

class Recorder:
    def __init__(self, namespace):
        self.namespace = namespace

    def delete(self, name):
        with open(record, "a") as file:
            file.write(f"{self.namespace}/{name}\\n")
        return [name]

delete_workspace.platform_in = Recorder
ask = aiohttp.ClientSession._request

async def counted(self, method, url, **options):
    with open(requests, "a") as file:
        file.write(f"{method} {url}\\n")
    return await ask(self, method, url, **options)

aiohttp.ClientSession._request = counted
watch_workspaces.watch(namespaces, liveness=liveness or None)
"""
WORKSPACE: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "w"},
    "resource": {"instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {"matchLabels": {"app": "w"}}},
    "tuning": {
        "preset": {"name": "phi-3-mini-128k-instruct"},
        "method": "qlora",
        "input": {"urls": ["https://example.com/data.parquet"]},
        "output": {"image": "registry.example.com/phi-3:0.0.1", "imagePushSecret": "push"},
    },
}
RIGHTS = [
    {"apiGroups": ["kaito.sh"], "resources": ["workspaces"], "verbs": ["get", "list", "watch", "patch"]},
    {"apiGroups": ["kaito.sh"], "resources": ["workspaces/status"], "verbs": ["patch"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def named(name: str, **tuning: Any) -> dict[str, Any]:
    made = copy.deepcopy(WORKSPACE)
    made["metadata"]["name"] = name
    made["tuning"].update(tuning)
    return made


def eventually(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until that is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not after {seconds} s: {what()}"
        time.sleep(0.1)
    return found


class Watcher:
    """The watcher as a process of its own, of one namespace."""

    def __init__(self, folder: Path, namespace: str, api: str) -> None:
        self.namespace, self.api, self.folder = namespace, api, folder
        self.kubeconfig = os.environ["KUBECONFIG"]
        self.liveness = ""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            environment = {**os.environ, "PREFECT_API_URL": self.api, "KUBECONFIG": self.kubeconfig}
            arguments = [str(self.folder / "deleted"), str(self.folder / "requests"), self.liveness, self.namespace]
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments], env=environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def deleted(self) -> list[str]:
        """What the platform was asked to delete."""
        path = self.folder / "deleted"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requests(self) -> list[str]:
        """The requests to the Kubernetes API."""
        path = self.folder / "requests"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def memory(self) -> float:
        """MB that are resident."""
        assert self.process is not None
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6


class Gate:
    """A port that leads to Prefect's while it is open: to the watcher, a server that goes away and comes back."""

    def __init__(self, port: int) -> None:
        self.to, self.port = port, free_port()
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.listener: socket.socket | None = None
        self.pairs: list[socket.socket] = []

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def close(self) -> None:
        for end in [*filter(None, [self.listener]), *self.pairs]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.pairs.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", self.to))
                self.pairs += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def watcher(tmp_path: Path, kubectl: Any, server: Any) -> Iterator[Watcher]:
    watcher = Watcher(tmp_path, kubectl.namespace, server.api)
    try:
        yield watcher
    finally:
        watcher.kill()


def condition(kubectl: Any, name: str) -> dict[str, Any]:
    """The condition WorkspaceSucceeded."""
    conditions = kubectl.get("workspace", name).get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == "WorkspaceSucceeded"), {})


def settle(watcher: Watcher, seconds: float = 3.0) -> None:
    """Wait for what should not happen; the watcher must live through it."""
    time.sleep(seconds)
    assert watcher.process is not None
    assert watcher.process.poll() is None, watcher.log


def test_an_applied_workspace_has_one_run_whatever_else_is_changed_of_it(
    kubectl: Any, server: Any, watcher: Watcher
) -> None:
    watcher.start()
    kubectl("apply", "-f", "-", stdin=WORKSPACE)
    [run] = eventually(lambda: server.runs(kubectl.namespace), 30)
    found = kubectl.get("workspace", "w")
    uid = found["metadata"]["uid"]
    assert run["idempotency_key"] == f"{uid}:1:"
    assert sorted(run["tags"]) == ["kaito", f"workspace:{kubectl.namespace}/w"]
    assert run["parameters"]["workspace"]["metadata"]["uid"] == uid
    assert "status" not in run["parameters"]["workspace"]
    assert run["state_type"] == "SCHEDULED"
    assert found["metadata"]["finalizers"] == ["kaito-flows/finalizer"]
    assert eventually(lambda: condition(kubectl, "w"))["reason"] == "workspacePending"
    assert kubectl.get("workspace", "w")["status"]["run"]["flowRunId"] == run["id"]
    events = eventually(lambda: kubectl.get("events")["items"])
    assert [(e["reason"], e["involvedObject"]["name"]) for e in events] == [("RunCreated", "w")]

    kubectl("apply", "-f", "-", stdin=WORKSPACE)
    kubectl("label", "workspace", "w", "team=a")
    kubectl("annotate", "workspace", "w", "note=b")
    settle(watcher)
    assert [r["id"] for r in server.runs(kubectl.namespace)] == [run["id"]]
    assert set(kubectl.get("workspace", "w")["metadata"]["annotations"]) == {
        "kubectl.kubernetes.io/last-applied-configuration", "note",
    }, "nothing of the watcher's is written there"  # fmt: skip


def test_an_edit_cancels_the_old_run_and_makes_a_new_one(kubectl: Any, server: Any, watcher: Watcher) -> None:
    watcher.start()
    kubectl("apply", "-f", "-", stdin=WORKSPACE)
    [first] = eventually(lambda: server.runs(kubectl.namespace), 30)
    kubectl("apply", "-f", "-", stdin=named("w", method="lora"))
    first, second = eventually(lambda: (r := server.runs(kubectl.namespace)) and len(r) == 2 and r)
    assert first["state_type"] == "CANCELLED", "it had not started"
    assert second["parameters"]["workspace"]["tuning"]["method"] == "lora"

    # One that runs is told to stop, and stops itself.
    server.set_state(second, "RUNNING")
    kubectl("apply", "-f", "-", stdin=WORKSPACE)
    eventually(lambda: server.runs(kubectl.namespace)[1]["state_type"] == "CANCELLING")
    assert len(server.runs(kubectl.namespace)) == 2, "its successor waits for it"
    server.set_state(second, "CANCELLED")
    third = eventually(lambda: (r := server.runs(kubectl.namespace)) and len(r) == 3 and r)[2]
    assert third["idempotency_key"].endswith(":3:")


def test_a_fault_that_only_code_can_see_is_a_condition_within_two_seconds_and_no_run(
    kubectl: Any, server: Any, watcher: Watcher
) -> None:
    watcher.start()
    kubectl("apply", "-f", "-", stdin=WORKSPACE)
    eventually(lambda: server.runs(kubectl.namespace), 30)
    wrong = named("wrong", preset={"name": "phi-9"})
    wrong["inference"] = {"preset": {"name": "phi-2"}}
    kubectl("apply", "-f", "-", stdin=wrong)
    start = time.monotonic()
    said = eventually(lambda: condition(kubectl, "wrong"))
    assert time.monotonic() - start < 2
    assert (said["status"], said["reason"]) == ("False", "InvalidWorkspace")
    assert "Unsupported tuning preset name phi-9" in said["message"]
    assert "not both" in said["message"]
    assert kubectl.get("workspace", "wrong")["status"]["state"] == "Failed"
    warnings = eventually(lambda: [e for e in kubectl.get("events")["items"] if e["type"] == "Warning"])
    assert warnings[0]["reason"] == "InvalidWorkspace"
    assert server.runs(kubectl.namespace, "wrong") == []

    # It is mended, and it runs.
    kubectl("delete", "workspace", "wrong", "--timeout=30s")
    assert watcher.deleted == [f"{kubectl.namespace}/wrong"], "what is not valid can be deleted"
    kubectl("apply", "-f", "-", stdin=named("wrong"))
    eventually(lambda: server.runs(kubectl.namespace, "wrong"))


def test_a_watcher_that_is_killed_starts_nothing_twice_and_loses_nothing(
    kubectl: Any, server: Any, watcher: Watcher
) -> None:
    watcher.start()
    kubectl("apply", "-f", "-", stdin=named("before"))
    kubectl("apply", "-f", "-", stdin=named("deleted"))
    eventually(lambda: len(server.runs(kubectl.namespace)) == 2, 30)
    watcher.kill()
    kubectl("apply", "-f", "-", stdin=named("meanwhile"))
    kubectl("delete", "workspace", "deleted", "--wait=false")
    assert kubectl.get("workspace", "deleted")["metadata"]["deletionTimestamp"], "the finalizer holds it"

    watcher.start()
    eventually(lambda: server.runs(kubectl.namespace, "meanwhile"), 30)
    eventually(lambda: kubectl.run("get", "workspace", "deleted").returncode != 0, 30)
    settle(watcher)
    assert len(server.runs(kubectl.namespace, "before")) == 1
    assert len(server.runs(kubectl.namespace, "meanwhile")) == 1
    [gone] = server.runs(kubectl.namespace, "deleted")
    assert gone["state_type"] == "CANCELLED"
    assert watcher.deleted == [f"{kubectl.namespace}/deleted"]
    assert server.deletions(kubectl.namespace, "deleted") == ["COMPLETED"], "it is a flow run that can be seen"


def test_annotations_suspend_pause_and_run_again(kubectl: Any, server: Any, watcher: Watcher) -> None:
    def annotate(*what: str) -> None:
        kubectl("annotate", "--overwrite", "workspace", "w", *what)

    watcher.start()
    suspended = named("w")
    suspended["metadata"]["annotations"] = {"kaito-flows/suspend": "true"}
    kubectl("apply", "-f", "-", stdin=suspended)
    assert eventually(lambda: condition(kubectl, "w"), 30)["reason"] == "workspaceSuspended"
    assert server.runs(kubectl.namespace) == []
    annotate("kaito-flows/suspend-")
    [first] = eventually(lambda: server.runs(kubectl.namespace))

    server.set_state(first, "RUNNING")
    annotate("kaito-flows/pause=true")
    eventually(lambda: condition(kubectl, "w")["reason"] == "workspacePaused")
    [first] = server.runs(kubectl.namespace)
    assert (first["state_type"], first["state"]["message"]) == ("CANCELLING", "paused")
    server.set_state(first, "CANCELLED")
    settle(watcher)
    assert len(server.runs(kubectl.namespace)) == 1
    annotate("kaito-flows/pause-")
    second = eventually(lambda: (r := server.runs(kubectl.namespace)) and len(r) == 2 and r)[1]
    assert second["idempotency_key"] == first["idempotency_key"] + ":resumed-1"

    server.set_state(second, "COMPLETED")
    annotate("kaito-flows/rerun=new data")
    third = eventually(lambda: (r := server.runs(kubectl.namespace)) and len(r) == 3 and r)[2]
    assert third["idempotency_key"].endswith(":1:new data")
    server.set_state(third, "COMPLETED")
    annotate("kaito-flows/rerun=new data")
    settle(watcher)
    assert len(server.runs(kubectl.namespace)) == 3


def test_an_inference_workspace_is_served(kubectl: Any, server: Any, watcher: Watcher) -> None:
    watcher.start()
    served = {key: value for key, value in named("s").items() if key != "tuning"}
    served["inference"] = {"preset": {"name": "phi-3-mini-128k-instruct"}}
    kubectl("apply", "-f", "-", stdin=served)
    [run] = eventually(lambda: server.runs(kubectl.namespace), 30)
    flow = httpx.get(f"{server.api}/flows/{run['flow_id']}", timeout=30).json()
    assert flow["name"] == "serve-workspace"


def test_prefect_being_away_is_a_condition_and_is_waited_out(kubectl: Any, server: Any, watcher: Watcher) -> None:
    gate = Gate(server.port)
    watcher.api = gate.api
    watcher.start()
    kubectl("apply", "-f", "-", stdin=named("w"))
    kubectl("apply", "-f", "-", stdin=named("deleted"))
    eventually(lambda: condition(kubectl, "w").get("reason") == "PrefectUnavailable", 30)
    assert "prefect-unavailable" in condition(kubectl, "w")["message"]
    eventually(lambda: condition(kubectl, "deleted"))
    kubectl("delete", "workspace", "deleted", "--timeout=30s")
    assert watcher.deleted == [f"{kubectl.namespace}/deleted"], "deletion waits for nobody"
    # Whoever starts anew finds the condition as it is, and still tries again.
    watcher.kill()
    watcher.start()
    settle(watcher, 8)
    assert condition(kubectl, "w")["reason"] == "PrefectUnavailable"
    gate.open()
    try:
        [run] = eventually(lambda: server.runs(kubectl.namespace), 90)
        eventually(lambda: condition(kubectl, "w")["reason"] == "workspacePending")
        assert kubectl.get("workspace", "w")["status"]["run"]["flowRunId"] == run["id"]
    finally:
        gate.close()


def told(kubectl: Any, name: str, reason: str, said: str) -> dict[str, Any]:
    """Wait until the condition has that reason and says that; return the status."""

    def holds() -> bool:
        now = condition(kubectl, name)
        return now.get("reason") == reason and said in now["message"]

    eventually(holds, 30)
    found: dict[str, Any] = kubectl.get("workspace", name)["status"]
    return found


def newest_run(server: Any, kubectl: Any, name: str, number: int) -> dict[str, Any]:
    """Wait for the Workspace's run of that number, and until its status names it."""
    run: dict[str, Any] = eventually(
        lambda: (r := server.runs(kubectl.namespace, name)) and len(r) == number and r[-1], 30
    )
    eventually(lambda: kubectl.get("workspace", name).get("status", {}).get("run", {}).get("flowRunId") == run["id"])
    return run


# A flow run as its pod runs it.
RUN = """
import sys
from uuid import UUID
from prefect.flow_engine import load_flow_run, run_flow
from kaito_flows.flows.tune_workspace import tune_workspace
run_flow(tune_workspace, flow_run=load_flow_run(UUID(sys.argv[1])), return_type="state")
"""


def test_a_run_without_rights_in_the_namespace_is_told_by_the_watcher(
    kubectl: Any, server: Any, watcher: Watcher, tmp_path: Path
) -> None:
    watcher.start()
    kubectl("apply", "-f", "-", stdin=WORKSPACE)
    run = newest_run(server, kubectl, "w", 1)
    kubectl("create", "serviceaccount", "nobody")
    nobody = kubeconfig_of(kubectl, "nobody", tmp_path / "kubeconfig")
    environment = {
        **os.environ, "PREFECT_API_URL": server.api, "KAITO_FLOWS_HOME": str(tmp_path / "home"), "KUBECONFIG": nobody,
        "KAITO_FLOWS_PLATFORM": "kubernetes", "KAITO_FLOWS_NAMESPACE": kubectl.namespace,
    }  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", RUN, run["id"]], env=environment, capture_output=True, text=True)
    [ended] = server.runs(kubectl.namespace)
    assert ended["state_type"] == "FAILED", ran.stderr
    status = told(kubectl, "w", "AccessDenied", "access-denied: ")
    assert status["state"] == "Failed"
    assert status["run"]["flowRunId"] == run["id"]
    assert condition(kubectl, "w")["message"] in ended["state"]["message"]
    events = eventually(lambda: [e for e in kubectl.get("events")["items"] if e["type"] == "Warning"])
    assert [(e["reason"], e["message"]) for e in events] == [("AccessDenied", condition(kubectl, "w")["message"])]
    quiet = len(watcher.requests)
    settle(watcher, 4)
    assert len(watcher.requests) == quiet


def test_what_becomes_of_a_run_that_never_begins_is_told_and_the_tenth_crash_is_the_last(
    kubectl: Any, server: Any, watcher: Watcher
) -> None:
    watcher.start()
    kubectl("apply", "-f", "-", stdin=WORKSPACE)
    run = newest_run(server, kubectl, "w", 1)
    pod = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.kubernetes.pod.pending",
        "resource": {
            "prefect.resource.id": "prefect.kubernetes.pod.1",
            "prefect.resource.name": "tune-w-abc",
            "kubernetes.diagnosis": "ImagePullError",
        },
        "related": [{"prefect.resource.id": f"prefect.flow-run.{run['id']}", "prefect.resource.role": "flow-run"}],
    }
    httpx.post(f"{server.api}/events", json=[pod], timeout=30).raise_for_status()
    assert told(kubectl, "w", "workspacePending", "its pod tune-w-abc: ImagePullError")["state"] == "Pending"
    for times in range(10):
        server.set_state(run, "CRASHED", "the pod ended")
        server.set_state(run, "CRASHED", "the pod ended, says the other")
        if times < 9:
            server.set_state(run, "SCHEDULED")
    status = told(kubectl, "w", "TooManyCrashes", "crashed 10 times, at last: the pod ended")
    assert status["state"] == "Failed"
    assert server.runs(kubectl.namespace)[0]["state_type"] == "FAILED"

    # The next run is followed as well; who cancels one finds it stopped.
    kubectl("annotate", "workspace", "w", "kaito-flows/rerun=again")
    second = newest_run(server, kubectl, "w", 2)
    server.set_state(second, "CRASHED", "the pod ended")
    told(kubectl, "w", "workspacePending", "is begun again: the pod ended")
    server.set_state(second, "CANCELLED")
    assert told(kubectl, "w", "workspaceStopped", second["id"])["state"] == "Stopped"


def test_a_run_that_fails_while_the_watcher_or_prefect_is_away_is_told_later(
    kubectl: Any, server: Any, watcher: Watcher
) -> None:
    gate = Gate(server.port)
    gate.open()
    try:
        watcher.api = gate.api
        watcher.start()
        for name in ("one", "two"):
            kubectl("apply", "-f", "-", stdin=named(name))
        one, two = (newest_run(server, kubectl, name, 1) for name in ("one", "two"))
        watcher.kill()
        server.set_state(one, "FAILED", "Flow run encountered an exception: RunError: job-failed: it broke")
        watcher.start()
        told(kubectl, "one", "JobFailed", "job-failed: it broke")
        settle(watcher, 1)
        gate.close()
        server.set_state(two, "FAILED", "Flow run encountered an exception: KeyError: 'x'")
        gate.open()
        told(kubectl, "two", "RunFailed", "KeyError: 'x'")
    finally:
        gate.close()


def test_fifty_at_once_have_fifty_runs_in_little_memory_and_few_requests(
    kubectl: Any, server: Any, watcher: Watcher
) -> None:
    watcher.start()
    eventually(lambda: any("watch=true" in line for line in watcher.requests), 30)
    settle(watcher, 1)
    before, start = len(watcher.requests), time.monotonic()
    kubectl("create", "-f", "-", stdin=yaml.safe_dump_all([named(f"w-{i:02}") for i in range(50)]))
    eventually(lambda: len(server.runs(kubectl.namespace)) == 50, 90)
    eventually(lambda: all(w.get("status") for w in kubectl.get("workspaces")["items"]), 30)
    seconds = time.monotonic() - start
    settle(watcher, 5)
    names = {r["parameters"]["workspace"]["metadata"]["name"] for r in server.runs(kubectl.namespace)}
    assert len(names) == 50
    each = (len(watcher.requests) - before) / 50
    memory = watcher.memory
    quiet = len(watcher.requests)
    settle(watcher, 10)
    assert len(watcher.requests) == quiet, "an idle watcher asks nothing"

    start = time.monotonic()
    kubectl("delete", "workspaces", "--all", "--timeout=60s")
    deletion = time.monotonic() - start
    assert len(watcher.deleted) == 50
    after = watcher.memory
    print(json.dumps({  # noqa: T201 - the numbers, for whoever runs it with -s
        "seconds": round(seconds, 1), "requests_each": each, "deletion_seconds": round(deletion, 1),
        "memory_mb": round(memory), "memory_mb_after_deletion": round(after),
    }))  # fmt: skip
    assert each <= 5
    assert max(memory, after) < 200


def kubeconfig_of(kubectl: Any, account: str, path: Path) -> str:
    """Write the kubeconfig of a service account of the namespace."""
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/service-account-token",
        "metadata": {"name": f"{account}-token", "annotations": {"kubernetes.io/service-account.name": account}},
    }
    kubectl("create", "-f", "-", stdin=secret)
    template = "go-template={{.data.token | base64decode}}"
    token = eventually(lambda: kubectl("get", "secret", f"{account}-token", "-o", template))
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    config["users"][0]["user"] = {"token": token}
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_rights_in_its_namespace_are_enough(kubectl: Any, server: Any, watcher: Watcher, tmp_path: Path) -> None:
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "watcher"},
        "rules": RIGHTS,
    }
    kubectl("create", "serviceaccount", "watcher")
    kubectl("create", "-f", "-", stdin=role)
    account = f"--serviceaccount={kubectl.namespace}:watcher"
    kubectl("create", "rolebinding", "watcher", "--role=watcher", account)
    watcher.kubeconfig = kubeconfig_of(kubectl, "watcher", tmp_path / "kubeconfig")
    port = free_port()
    watcher.liveness = f"http://127.0.0.1:{port}/healthz"
    watcher.start()
    kubectl("apply", "-f", "-", stdin=WORKSPACE)
    eventually(lambda: server.runs(kubectl.namespace), 30)
    eventually(lambda: kubectl.get("events")["items"])
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    kubectl("delete", "workspace", "w", "--timeout=30s")
    assert "forbidden" not in watcher.log.lower()
