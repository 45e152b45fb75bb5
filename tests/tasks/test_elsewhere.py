"""What a run makes of the one that it has begun in another place; Prefect is real, and nobody starts that one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.runtime import flow_run as current_run
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, Scheduled
from prefect_harness import harness
from waiting import eventually

from kaito_flows.errors import DivergedError, RunError, SchedulingError
from kaito_flows.nodes.cost import NodeCost
from kaito_flows.settings import Settings
from kaito_flows.tasks import elsewhere
from kaito_flows.tasks.elsewhere import leave, namespace_of, other_places, stop_elsewhere, tune_elsewhere
from kaito_flows.workspace import WorkspaceV1beta1

BECAUSE = SchedulingError("no quota here", place="resource.instanceType", code="no-node")
WORKSPACE = WorkspaceV1beta1.model_validate(
    {
        "metadata": {"name": "w", "namespace": "team", "uid": "u", "generation": 3, "annotations": {"a": "b"}},
        "resource": {"labelSelector": {}},
        "inference": {"template": {"spec": {}}},
    }
)
NO_NODE = "Flow run encountered an exception: SchedulingError: no-node: resource.instanceType: no quota either (ask)"


@pytest.fixture(scope="module")
def places() -> Iterator[list[str]]:
    """Two places whose workers are away."""
    with harness(), get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("tune-workspace")
        for name in ("north", "west"):
            client.create_deployment(flow_id, name=name, enforce_parameter_schema=False)
        yield ["north", "west"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "LOOK_SECONDS", 0.05)


class Home:
    """A run that tunes elsewhere, in the background; `end` returns what it came to."""

    def __init__(
        self, places: Sequence[str], *, patience: float = 600.0, check: Callable[[str], object] = str, run: str = ""
    ) -> None:
        self.run_id = run
        self._begun = threading.Event()
        self._result: Any = None

        @flow(name="home")
        def home() -> NodeCost:
            self.run_id = str(current_run.id)
            self._begun.set()
            platform: Any = SimpleNamespace(check_known=check)
            return tune_elsewhere(WORKSPACE, "text", places, BECAUSE, platform, patience)

        def work() -> None:
            with tags("kaito"):
                try:
                    self._result = home()
                except Exception as exc:  # noqa: BLE001 - it is what the test looks at
                    self._result = exc

        self._thread = threading.Thread(target=work)
        self._thread.start()
        self._begun.wait(60)

    def end(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self._result


def guest(home: Home, place: str, attempt: int = 1) -> FlowRun:
    """The run in a place, as soon as it is there."""

    def find() -> FlowRun | None:
        with get_client(sync_client=True) as client:
            keyed = {run.idempotency_key: run for run in client.read_flow_runs()}
        return keyed.get(f"{home.run_id}:elsewhere-{place}-{attempt}")

    found: FlowRun = eventually(find, 30)
    return found


def become(run: FlowRun, *states: State[Any]) -> None:
    with get_client(sync_client=True) as client:
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)


def test_the_run_there_is_this_workspace_s_and_says_whose_guest_it_is(places: list[str]) -> None:
    home = Home(places)
    run = guest(home, "north")
    become(run, Running(), Completed())
    assert home.end() == NodeCost()
    assert (run.parameters["training_config"], run.parameters["serve"]) == ("text", False)
    metadata = run.parameters["workspace"]["metadata"]
    annotations = {"a": "b", "kaito-flows/guest-of": home.run_id}
    assert metadata == {"name": "w", "namespace": "team", "annotations": annotations}
    assert "kaito" in run.tags, "or a crash would be the end of it"
    there = WORKSPACE.model_validate(run.parameters["workspace"])
    assert other_places(there, Settings(elsewhere="north")) == (), "a guest goes no further"
    assert other_places(WORKSPACE, Settings(elsewhere="north,west")) == ("north", "west")
    assert namespace_of(there, Settings(namespace="guests")) == "guests"
    assert namespace_of(WORKSPACE, Settings(namespace="guests")) == "team"


def test_a_place_that_has_no_node_or_no_worker_or_is_none_is_followed_by_the_next(places: list[str]) -> None:
    home = Home(["nowhere", "north", "west"])
    become(guest(home, "north"), Failed(message=NO_NODE))
    become(guest(home, "west"), Completed())
    assert home.end() == NodeCost()
    refused = Home(["north"], patience=0.1).end()
    assert isinstance(refused, SchedulingError) and refused.code == "no-node"
    assert "no quota here; north: not-started: its run was not started" in refused.message


def test_a_run_that_no_worker_starts_is_taken_back(places: list[str]) -> None:
    home = Home(["north"], patience=0.1)
    home.end()
    assert guest(home, "north").state.name == "Cancelled"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("message", "kind", "code"),
    [
        ("Flow run encountered an exception: DivergedError: diverged: step 4: loss is nan", DivergedError, "diverged"),
        ("Flow run encountered an exception: ValueError: what", RunError, "run-failed"),
    ],
)
def test_what_the_training_failed_with_there_is_what_it_fails_with_here(
    places: list[str], message: str, kind: type[Exception], code: str
) -> None:
    home = Home(places)
    become(guest(home, "north"), Running(), Failed(message=message))
    failure = home.end()
    assert type(failure) is kind and failure.code == code  # type: ignore[attr-defined]


def test_one_that_has_crashed_is_given_the_time_in_which_it_is_resumed(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(places)
    run = guest(home, "north")
    become(run, Running(), Crashed())
    time.sleep(0.3)
    become(run, Scheduled(name="AwaitingRetry"), Running(), Completed())
    assert home.end() == NodeCost()
    monkeypatch.setattr(elsewhere, "CRASHED_SECONDS", 0.2)
    home = Home(places)
    run = guest(home, "north")
    become(run, Running(), Crashed())
    assert home.end().code == "run-crashed"
    assert guest(home, "north").state.name == "Cancelled", "and is not resumed later"  # type: ignore[union-attr]


def test_cancelled_there_is_the_end_here(places: list[str]) -> None:
    home = Home(places)
    become(guest(home, "north"), Cancelled())
    assert home.end().code == "cancelled"


def test_a_workspace_that_is_deleted_or_a_run_that_is_cancelled_ends_the_one_there(places: list[str]) -> None:
    gone = threading.Event()

    def check(name: str) -> None:
        if gone.is_set():
            raise RunError("was deleted", code="workspace-deleted")

    home = Home(places, check=check)
    run = guest(home, "north")
    become(run, Running())
    gone.set()
    assert home.end().code == "workspace-deleted"
    assert guest(home, "north").state.name == "Cancelling"  # type: ignore[union-attr]

    home = Home(places)
    run = guest(home, "north")
    stop_elsewhere(UUID(home.run_id))
    assert home.end().code == "cancelled"


def test_a_run_that_comes_again_finds_the_one_there_and_begins_a_failed_one_anew(places: list[str]) -> None:
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(flow(name="home")(lambda: None))

        def begin() -> FlowRun:
            return begun(client, str(run.id))

        first = begin()
        become(first, Running())
        assert begin().id == first.id
        become(first, Crashed())
        assert begin().id == first.id, "it is resumed"
        become(first, Failed(message=NO_NODE))
        assert begin().id != first.id


def begun(client: SyncPrefectClient, home: str) -> FlowRun:
    """The run there, of a home run that is begun in another process."""
    task_run = client.create_task_run(elsewhere.tune_elsewhere, flow_run_id=UUID(home), dynamic_key="0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elsewhere, "current_run", SimpleNamespace(id=home))
        patch.setattr(elsewhere, "current_task", SimpleNamespace(id=str(task_run.id)))
        return elsewhere._Guest("north", WORKSPACE, None, 600)._begin(client)


@pytest.mark.parametrize("usd", [1.25, None])
def test_what_the_nodes_there_have_cost_is_known_here(places: list[str], usd: float | None) -> None:
    home = Home(places)
    run = guest(home, "north")
    cost = NodeCost(usd=usd, gpu_hours=2.0, paid_seconds=600.0, boot_seconds=60.0, training_share=0.5)
    removed: list[str] = []
    status = SimpleNamespace(facts={"cost": cost.as_dict()})
    platform: Any = SimpleNamespace(read_status=lambda name: status, delete=removed.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elsewhere, "current_run", SimpleNamespace(id=str(run.id)))
        leave("w", platform)
    become(run, Running(), Completed())
    assert home.end() == cost
    assert removed == ["w"]
    assert cost.training_seconds == 300.0
