"""The flow `reap-nodes`, on a real Prefect server and a cloud in memory whose clock is another than ours."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast
from uuid import uuid4

import pytest
from fake_cloud import FakeCloud, FakeCluster, service_object, workspace_object
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import State, StateType

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import AccessError, CloudError
from kaito_flows.flows import reap_nodes as module
from kaito_flows.flows.reap_nodes import reap_nodes
from kaito_flows.nodes.base import NodeLease, NodeRequest
from kaito_flows.nodes.pools import shape_of
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings
from kaito_flows.tasks.reap import remove_pool

pytestmark = pytest.mark.usefixtures("prefect_server")

AWAY = CloudError("HTTP 503")


@flow(name="tune-workspace")
def some_flow() -> None:
    """Stands for the runs that have leased nodes."""


def run_in(state: StateType) -> str:
    """The id of a flow run in that state."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(some_flow)
        client.set_flow_run_state(run.id, State(type=state), force=True)
    return str(run.id)


@pytest.fixture
def cloud() -> FakeCloud:
    return FakeCloud()


@pytest.fixture
def cluster(cloud: FakeCloud) -> FakeCluster:
    return FakeCluster(cloud)


@pytest.fixture(autouse=True)
def rented(cloud: FakeCloud, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> list[RentedNodes]:
    """What the settings rent: the cloud; tries again come at once."""
    settings = Settings()
    providers = [RentedNodes(cloud, cast(Cluster, cluster), settings)]
    monkeypatch.setattr(module, "open_rented", lambda settings, kinds=(): providers)
    monkeypatch.setattr(module.Cluster, "connect", lambda: cluster)
    monkeypatch.setattr(remove_pool, "retry_delay_seconds", [0.0, 0.0])
    return providers


def outcomes(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["NAME"]: row["OUTCOME"] for row in rows}


def table() -> list[dict[str, str]]:
    """The newest report in Prefect."""
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["rented-nodes"]))
        found = client.read_artifacts(artifact_filter=wanted)
    newest = max(found, key=lambda artifact: artifact.created)
    return cast(list[dict[str, str]], json.loads(newest.data))


def test_what_no_run_answers_for_goes_and_what_is_in_use_stays(
    cloud: FakeCloud, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.objects += [service_object(["serves-0"], "served"), workspace_object("w")]
    cloud.add("running", run_in(StateType.RUNNING))
    cloud.add("crashed", run_in(StateType.CRASHED))
    cloud.add("elsewhere", str(uuid4()))
    cloud.add("damaged", "no uuid at all")
    cloud.add("kept", run_in(StateType.COMPLETED), state="kept")
    cloud.add("serves", run_in(StateType.COMPLETED), state="serving", workspace="served", left=-9000)
    cloud.add("theirs", str(uuid4()), owner="others", left=-9000)
    cloud.add("completed", run_in(StateType.COMPLETED))
    cloud.add("cancelled", run_in(StateType.CANCELLED))
    cloud.add("failed", run_in(StateType.FAILED), pool_state="failed")
    cloud.add("half-made", run_in(StateType.CRASHED), pool_state="creating", left=-1)
    cloud.add("kept-too-long", run_in(StateType.COMPLETED), state="kept", left=-1)
    cloud.add("deleted", run_in(StateType.CANCELLED), state="serving", workspace="deleted")
    cloud.add("forgotten", run_in(StateType.COMPLETED), state="kept", workspace="deleted")
    asked: list[int] = []
    ask = SyncPrefectClient.read_flow_runs

    def counted(self: SyncPrefectClient, **options: Any) -> Any:
        asked.append(len(options["flow_run_filter"].id.any_))
        return ask(self, **options)

    monkeypatch.setattr(SyncPrefectClient, "read_flow_runs", counted)
    rows = reap_nodes()
    assert sorted(cloud.alive) == [
        "crashed", "damaged", "elsewhere", "kept", "running", "serves", "theirs",
    ]  # fmt: skip
    assert asked == [12], "one request for all runs"
    assert set(outcomes(rows).values()) == {"kept", "removed"}
    assert "theirs" not in outcomes(rows)
    assert table() == rows, "and so says the report"

    again = reap_nodes()
    assert outcomes(again)["completed"] == "going"
    assert cloud.calls.count("delete") == 7, "what is on its way out is not asked for again"


def test_a_dry_run_says_what_would_go_and_removes_nothing(cloud: FakeCloud) -> None:
    cloud.add("over", run_in(StateType.FAILED))
    cloud.add("running", run_in(StateType.RUNNING))
    before = dict(cloud.there)
    assert outcomes(reap_nodes(dry_run=True)) == {"over": "would be removed", "running": "kept"}
    assert cloud.there == before
    assert "delete" not in cloud.calls


def test_a_run_that_renews_its_lease_meanwhile_keeps_its_nodes(cloud: FakeCloud, rented: list[RentedNodes]) -> None:
    pool = cloud.add("pool", run_in(StateType.SCHEDULED), left=-1)
    run_id, expires, size = pool.record.holder.run_id, pool.record.expires_at, pool.offer.instance_type
    lease = NodeLease("fake", "w", ("pool-0",), size, 3.6, name="pool", run_id=run_id, expires_at=expires)
    cloud.before["delete"] = lambda: rented[0].renew(lease)
    assert outcomes(reap_nodes()) == {"pool": "in use again"}
    assert cloud.alive == ["pool"]
    assert cloud.there["pool"].record.expires_at > cloud.time
    assert outcomes(reap_nodes()) == {"pool": "kept"}


def test_a_run_that_takes_a_kept_pool_meanwhile_has_it(
    cloud: FakeCloud, cluster: FakeCluster, rented: list[RentedNodes]
) -> None:
    cluster.objects.append(workspace_object("w"))
    shape = shape_of(NodeRequest("w"))
    pool = cloud.add("pool", run_in(StateType.COMPLETED), state="kept", left=-1, shape=shape)
    taker = run_in(StateType.RUNNING)
    request = NodeRequest("w", pool.offer.instance_type, gpus=1, namespace="team", run_id=taker, offers=(pool.offer,))
    cloud.before["delete"] = lambda: rented[0].lease(request, lambda what, facts: None)
    assert outcomes(reap_nodes()) == {"pool": "in use again"}
    assert cloud.there["pool"].record.holder.run_id == taker
    assert outcomes(reap_nodes()) == {"pool": "kept"}


def test_a_deletion_that_fails_twice_succeeds_in_the_same_run(cloud: FakeCloud) -> None:
    cloud.add("over", run_in(StateType.COMPLETED))
    cloud.faults["delete"] = [AWAY, AWAY]
    assert outcomes(reap_nodes()) == {"over": "removed"}
    assert cloud.alive == []


def test_one_that_cannot_be_removed_keeps_no_other_and_is_tried_again_at_the_next_run(cloud: FakeCloud) -> None:
    cloud.add("first", run_in(StateType.COMPLETED), age=20)
    cloud.add("second", run_in(StateType.COMPLETED), age=10)
    cloud.faults["delete"] = [AWAY] * 3
    state = reap_nodes(return_state=True)
    assert state.is_failed()
    with pytest.raises(CloudError) as failure:
        state.result()
    assert str(failure.value) == (
        "not-reaped: 1 of 2 pools not removed: first: cloud-unavailable: HTTP 503 (it is tried again at the next run)"
    )
    assert cloud.alive == ["first"]
    assert [(row["NAME"], row["OUTCOME"]) for row in table()] == [("first", "not removed"), ("second", "removed")]
    assert "HTTP 503" in table()[0]["REASON"]
    reap_nodes()
    assert cloud.alive == [], "two periods later nothing is left"


def test_what_a_right_is_missing_for_is_not_tried_again_and_again(cloud: FakeCloud) -> None:
    cloud.add("over", run_in(StateType.COMPLETED))
    cloud.faults["delete"] = [AccessError("may not delete agent pools")]
    with pytest.raises(CloudError, match="may not delete agent pools"):
        reap_nodes()
    assert cloud.calls.count("delete") == 1


def test_a_cloud_that_does_not_answer_keeps_no_other_from_being_cleaned(
    cloud: FakeCloud, rented: list[RentedNodes]
) -> None:
    other = FakeCloud("aks")
    rented.insert(0, RentedNodes(other, cast(Cluster, FakeCluster(other)), Settings()))
    other.faults["pools"] = [AWAY]
    cloud.add("over", run_in(StateType.COMPLETED))
    with pytest.raises(CloudError, match="pools not listed: aks: cloud-unavailable: HTTP 503"):
        reap_nodes()
    assert cloud.alive == []


def test_the_same_name_in_two_clouds_is_two_pools(
    cloud: FakeCloud, cluster: FakeCluster, rented: list[RentedNodes]
) -> None:
    other = FakeCloud("aks")
    rented.append(RentedNodes(other, cast(Cluster, cluster), Settings()))
    cluster.objects.append(service_object(["same-0"]))
    run = run_in(StateType.COMPLETED)
    cloud.add("same", run, state="serving")
    other.add("same", run, workspace="another")
    assert [row["OUTCOME"] for row in reap_nodes()] == ["kept", "removed"]
    assert (cloud.alive, other.alive) == (["same"], [])


def test_this_machines_clock_plays_no_part(cloud: FakeCloud) -> None:
    for years in (-20, 0, 20):
        cloud.time = cloud.time.replace(year=2026 + years)
        cloud.add(f"good-{2026 + years}", str(uuid4()), left=1)
        cloud.add(f"late-{2026 + years}", str(uuid4()), left=-1)
        rows = outcomes(reap_nodes())
        assert rows[f"good-{2026 + years}"] == "kept"
        assert rows[f"late-{2026 + years}"] == "removed"
        cloud.there.clear()


def test_a_run_that_was_killed_after_it_asked_for_a_pool_leaves_nothing_for_long(
    cloud: FakeCloud, rented: list[RentedNodes]
) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL: nothing of the run's own is done any more."""

    cloud.boots_at_once = False

    def killed(what: str, facts: dict[str, Any]) -> None:
        if what == "waiting for the node":
            raise Killed

    run = run_in(StateType.RUNNING)
    offer = replace(FakeCloud().add("x").offer)
    request = NodeRequest("w", offer.instance_type, gpus=1, namespace="team", run_id=run, offers=(offer,))
    with pytest.raises(Killed):
        rented[0].lease(request, killed)
    [name] = cloud.alive
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, State(type=StateType.CRASHED), force=True)
    assert outcomes(reap_nodes()) == {name: "kept"}, "it may be resumed, and finds it"
    cloud.advance(minutes=Settings().lease_minutes)
    assert outcomes(reap_nodes()) == {name: "removed"}


def test_where_nothing_is_rented_it_says_so_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from kaito_flows.nodes.opening import open_rented

    def never() -> Cluster:
        raise AssertionError("asked for a cluster")

    said: list[str] = []
    monkeypatch.setattr(module, "open_rented", open_rented)
    monkeypatch.setattr(module.Cluster, "connect", never)
    monkeypatch.setattr(module, "log", said.append)
    assert reap_nodes() == []
    assert said == ["nothing is rented: KAITO_FLOWS_NODES is existing"]


def test_where_to_look_can_be_said(monkeypatch: pytest.MonkeyPatch, rented: list[RentedNodes]) -> None:
    looked: list[tuple[str, ...]] = []

    def opened(settings: Settings, kinds: tuple[str, ...] = ()) -> list[RentedNodes]:
        looked.append(kinds)
        return rented

    monkeypatch.setattr(module, "open_rented", opened)
    reap_nodes(kinds=["aks"])
    reap_nodes()
    assert looked == [("aks",), ()]
