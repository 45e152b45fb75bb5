"""No rented node outlives its run, whatever kills the run, and none that works is taken away.

Azure is the stand-in of `tests/arm.py`; Kubernetes, Prefect and what is under test are real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from arm_fixtures import A100, T4
from fake_nodes import fake_node
from pod_fixtures import Place, chats_image, pod_repository, training_config, workspace
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.settings import PREFECT_API_URL
from tenant import tenant
from waiting import eventually

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.flows.delete_workspace import delete_workspace
from kaito_flows.flows.reap_nodes import reap_nodes
from kaito_flows.flows.tune_workspace import tune_workspace
from kaito_flows.nodes import renting
from kaito_flows.platforms import following
from kaito_flows.tasks.progress import listening
from kaito_flows.workspace import WorkspaceV1beta1

if TYPE_CHECKING:
    from arm import Azure

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("prefect_server")]

ROOT = Path(__file__).parents[2]

Boundary = Callable[["Azure", Callable[[], None]], None]


class Heard(list[tuple[str, str]]):
    """The requests that Azure has had; `act` is called when the first one begins that `wanted` is true of."""

    def __init__(self, wanted: Callable[[str, str], bool], act: Callable[[], None]) -> None:
        super().__init__()
        self._wanted, self._act = wanted, act

    def append(self, call: tuple[str, str]) -> None:
        super().append(call)
        if self._wanted(*call):
            self._act()


def request(method: str, part: str) -> Boundary:
    """When a request begins, before anything has come of it."""

    def wait(azure: Azure, kill: Callable[[], None]) -> None:
        azure.calls = Heard(lambda made, path: made == method and part in path, kill)

    return wait


def state(wanted: str) -> Boundary:
    """When Azure has changed a pool's state, and has not yet told whoever asked for it."""

    def wait(azure: Azure, kill: Callable[[], None]) -> None:
        before = azure.on_change

        def told(name: str, found: str) -> None:
            before(name, found)
            if found == wanted:
                kill()

        azure.on_change = told

    return wait


def at_once(azure: Azure, kill: Callable[[], None]) -> None:
    """Now."""
    kill()


BOUNDARIES = {
    "before the pool is asked for": request("GET", "/usages"),
    "after it was asked for, before the answer": state("Creating"),
    "while it is being made": request("GET", "/agentPools/kf"),
    "when its nodes have come": state("Succeeded"),
    "while the run has it": at_once,
    "before it is given back": request("GET", "/agentPools"),
    "while it is being given back": state("Deleting"),
}
NOTHING_LEFT = ("before the pool is asked for", "while it is being given back")


@pytest.fixture
def rented(at_azure: Azure, cluster: Cluster, home: Path, workspaces_crd: str) -> Iterator[Azure]:
    """Azure, whose pools' nodes join the cluster: nodes that nobody runs."""
    azure = at_azure
    with ExitStack() as nodes:
        there: dict[str, ExitStack] = {}

        def change(name: str, state: str) -> None:
            if state == "Succeeded" and name not in there:
                there[name] = stack = nodes.enter_context(ExitStack())
                pool = azure.pools[name].body["properties"]
                host = stack.enter_context(fake_node(cluster, f"aks-{name}-0", taint=True))
                labels = {**pool.get("nodeLabels", {}), "node.kubernetes.io/instance-type": pool["vmSize"]}
                cluster.patch("Node", host, {"metadata": {"labels": labels}})
            elif state == "Gone" and name in there:
                there.pop(name).close()

        azure.on_change = change
        yield azure


class Tenant:
    """A flow run in a process of its own, which can be killed and started again."""

    def __init__(self, folder: Path, azure: Azure) -> None:
        self.folder = folder
        with get_client(sync_client=True) as client:
            self.run_id = str(client.create_flow_run(tenant, parameters={"namespace": "n", "folder": "f"}).id)
        self._environment = {
            **os.environ,
            **azure.environment(),
            "NO_PROXY": os.environ["NO_PROXY"],
            "no_proxy": os.environ["no_proxy"],
            "PREFECT_API_URL": str(PREFECT_API_URL.value()),
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()

    def start(self) -> None:
        arguments = [sys.executable, "-m", "tenant", self.run_id, "team", self.folder]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(arguments, cwd=self.folder, env=self._environment, stdout=log, stderr=log)
        self._started.set()

    def kill(self) -> None:
        """`kill -9`, once."""
        self._started.wait()
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            self.process.wait()

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() in (None, -signal.SIGKILL), (self.folder / "log").read_text()
        return (self.folder / "ready").exists()

    def end(self) -> None:
        (self.folder / "end").touch()

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=60)

    def crash(self) -> None:
        """Let Prefect know what its automation finds out: the run's heartbeat has stopped."""
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(self.run_id), State(type=StateType.CRASHED), force=True)


def killed(azure: Azure, folder: Path, boundary: str) -> Tenant:
    """A run that was killed there."""
    run = Tenant(folder, azure)
    if "given back" in boundary or boundary == "while the run has it":
        run.start()
        eventually(run.is_ready, 60)
        BOUNDARIES[boundary](azure, run.kill)
        run.end()
    else:
        BOUNDARIES[boundary](azure, run.kill)
        run.start()
    assert run.wait() == -signal.SIGKILL, (folder / "log").read_text()
    run.crash()
    return run


def nodes_of(cluster: Cluster) -> list[str]:
    return [n["metadata"]["name"] for n in cluster.list("Node") if n["metadata"]["name"].startswith("aks-")]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_what_a_run_leaves_that_is_killed_is_removed_when_its_lease_has_run_out(
    rented: Azure, cluster: Cluster, tmp_path: Path, boundary: str
) -> None:
    rented.put_there("gpupool", A100)  # somebody else's
    killed(rented, tmp_path, boundary)
    eventually(lambda: not {"Creating", "Deleting"} & set(map(rented.state, rented.names())))
    left = [name for name in rented.names() if name != "gpupool"]
    assert len(left) == (boundary not in NOTHING_LEFT)
    # The run may come again, and then goes on: as long as its lease is good, nothing is taken away.
    reap_nodes()
    assert [name for name in rented.names() if name != "gpupool"] == left
    rented.wall = lambda: time.time() + 61 * 60
    for _ in range(2):
        reap_nodes()
    eventually(lambda: rented.names() == ["gpupool"])
    assert nodes_of(cluster) == ["aks-gpupool-0"]


@pytest.mark.parametrize("boundary", ["after it was asked for, before the answer", "while the run has it"])
def test_a_run_that_comes_again_has_the_node_that_it_had_asked_for(
    rented: Azure, tmp_path: Path, boundary: str
) -> None:
    run = killed(rented, tmp_path, boundary)
    made = rented.names()
    assert len(made) == 1
    rented.calls = []
    for name in ("ready", "end"):
        (tmp_path / name).unlink(missing_ok=True)
    run.start()
    eventually(run.is_ready, 60)
    assert rented.names() == made
    assert rented.count("PUT") == 0
    reap_nodes()
    assert rented.state(made[0]) == "Succeeded"
    run.end()
    assert run.wait() == 0, (tmp_path / "log").read_text()
    eventually(lambda: rented.names() == [])


class LentNode:
    """The cluster's real node, which plays the node of whichever pool is up: pods run on it."""

    def __init__(self, azure: Azure, cluster: Cluster) -> None:
        self.cluster, self.pool = cluster, ""
        node, *_ = [n for n in cluster.list("Node") if n["status"].get("nodeInfo", {}).get("kubeletVersion")]
        self.name = node["metadata"]["name"]
        self._labels = node["metadata"]["labels"]
        self._pool_labels: dict[str, str] = {}
        self.played: list[str] = []
        self._azure = azure
        azure.on_change = self.change

    def change(self, name: str, state: str) -> None:
        if state == "Succeeded" and self.pool != name:
            properties = self._azure.pools[name].body["properties"]
            self.pool, self._pool_labels = name, dict(properties["nodeLabels"])
            self.played.append(properties.get("scaleSetPriority") or "Regular")
            host = {"kubernetes.io/hostname": f"aks-{name}-0", "node.kubernetes.io/instance-type": properties["vmSize"]}
            self.cluster.patch("Node", self.name, {"metadata": {"labels": {**self._pool_labels, **host}}})
        elif state == "Gone" and self.pool == name:
            self.leave()

    def leave(self) -> None:
        """The machine is taken away; the pool stays, as after a spot eviction."""
        mine = {key: self._labels.get(key) for key in (*self._pool_labels, *self._labels)}
        kind = {"node.kubernetes.io/instance-type": self._labels.get("node.kubernetes.io/instance-type")}
        self.cluster.patch("Node", self.name, {"metadata": {"labels": {**mine, **kind}}})


@pytest.fixture
def lent(at_azure: Azure, place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[LentNode]:
    """The real node, lent to Azure's pools; nobody waits for long."""
    monkeypatch.setattr(following, "_NODE_SECONDS", 1.0)
    monkeypatch.setattr(following, "ROUND_SECONDS", 2.0)
    monkeypatch.setattr(renting, "_NODE_SECONDS", 0.1)
    node = LentNode(at_azure, place.cluster)
    yield node
    node.leave()


def test_a_training_whose_spot_node_is_evicted_goes_on_at_the_next_offer(
    at_azure: Azure, place: Place, lent: LentNode
) -> None:
    told: list[dict[str, Any]] = []
    evicted: list[int] = []

    def listener(stage: str, event: dict[str, Any]) -> None:
        told.append({"stage": stage, **event})
        if event["event"] == "checkpoint-pushed" and not evicted:
            evicted.append(event["step"])
            lent.leave()
            place.kubectl("delete", "pod", "-l", "kaito-flows/job", "--grace-period=0", "--force", "--wait=false")

    document = workspace(
        place,
        "evicted",
        chats_image(place),
        config=training_config(place, dtype="float32", max_steps=16),
        resource={"instanceType": T4},
        metadata={"annotations": {"kaito-flows/capacity": "spot,on-demand"}},
    )
    place.kubectl("apply", "-f", "-", stdin=document)
    with listening(listener):
        facts = tune_workspace(WorkspaceV1beta1.model_validate(document), serve=False)
    assert lent.played == ["Spot", "Regular"]
    [resumed] = [event["step"] for event in told if event["event"] == "resumed"]
    assert resumed >= evicted[0] > 0
    assert not facts["reused"]
    assert "checkpoint-" not in "".join(pod_repository(place, "evicted").tags())
    eventually(lambda: at_azure.names() == [])
    cost = place.kubectl.get("workspace", "evicted")["status"]["cost"]
    assert cost["usd"] > 0
    assert 0 < cost["trainingShare"] < 1
    tries = [event["name"] for event in told if event["event"] == "stage" and event["name"].startswith("trying")]
    assert tries == [f"trying {T4} (spot), 0.53 USD/h", f"trying {T4}, 0.53 USD/h"]


def test_a_service_keeps_the_node_that_it_runs_on_until_its_workspace_is_deleted(
    at_azure: Azure, place: Place, lent: LentNode
) -> None:
    config = training_config(place, dtype="float32", max_steps=4)
    document = workspace(place, "served", chats_image(place), config=config, resource={"instanceType": T4})
    place.kubectl("apply", "-f", "-", stdin=document)
    tune_workspace(WorkspaceV1beta1.model_validate(document))
    [name] = at_azure.names()
    assert at_azure.pools[name].body["properties"]["tags"]["kaito-flows-state"] == "serving"
    # No run holds it any more, and its lease has run out: it is the service that needs it.
    at_azure.wall = lambda: time.time() + 24 * 3600
    reap_nodes()
    assert at_azure.state(name) == "Succeeded"
    # The same inputs again: nothing is trained, so nothing is rented, and the service stays where it is.
    at_azure.calls = []
    facts = tune_workspace(WorkspaceV1beta1.model_validate(document))
    assert (facts["reused"], facts["service"]["adopted"]) == (True, True)
    assert (at_azure.count("PUT"), at_azure.names()) == (0, [name])
    delete_workspace(place.namespace, "served")
    eventually(lambda: at_azure.names() == [])
