"""A run that was cancelled has no say any more: its jobs are stopped and its nodes given back by its name alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fake_cloud import SIZE, FakeCloud, FakeCluster
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled

from kaito_flows.errors import ClusterError
from kaito_flows.flows import giving_up
from kaito_flows.flows.serve_workspace import serve_workspace
from kaito_flows.flows.tune_workspace import tune_workspace
from kaito_flows.nodes import NodeRequest, Offer
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings
from kaito_flows.workspace.spec import GUEST_ANNOTATION


class Platform:
    """What is stopped is remembered; stopping may fail."""

    namespace = "team"

    def __init__(self, fault: Exception | None = None) -> None:
        self.stopped: list[str] = []
        self.deleted: list[str] = []
        self._fault = fault

    def stop_jobs(self, workspace: str) -> list[str]:
        if self._fault:
            raise self._fault
        self.stopped.append(workspace)
        return []

    def delete(self, workspace: str) -> list[str]:
        self.deleted.append(workspace)
        return []

    def read_status(self, workspace: str) -> None:
        return None


RUN_ID = uuid4()


@pytest.fixture
def cloud() -> FakeCloud:
    return FakeCloud()


@pytest.fixture
def cancel(cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> Callable[[Platform], None]:
    """Cancel a run that has a node, as another run of the Workspace has."""
    nodes = RentedNodes(cloud, FakeCluster(cloud), Settings())  # type: ignore[arg-type]  # of a cluster, it lists
    for name in (str(RUN_ID), "other"):
        offers = (Offer(SIZE, 1, price_usd_hour=3.6),)
        nodes.lease(NodeRequest("w", namespace="team", run_id=name, gpus=1, offers=offers), lambda *_: None)

    def act(platform: Platform, **annotations: str) -> None:
        metadata = {"name": "w", "namespace": "team", "annotations": annotations}
        parameters: dict[str, Any] = {"workspace": {"metadata": metadata}}
        monkeypatch.setattr(giving_up, "open_nodes", lambda settings: nodes)
        monkeypatch.setattr(giving_up, "open_platform", lambda *_: platform)
        run = FlowRun(id=RUN_ID, flow_id=uuid4(), parameters=parameters)
        giving_up.give_up(tune_workspace, run, Cancelled())

    return act


def holders(cloud: FakeCloud) -> list[str]:
    return [cloud.there[name].record.holder.run_id for name in cloud.alive]


def test_the_run_s_jobs_are_stopped_and_its_nodes_given_back_and_no_other_s(
    cancel: Callable[[Platform], None], cloud: FakeCloud
) -> None:
    platform = Platform()
    cancel(platform)
    assert platform.stopped == ["w"]
    assert holders(cloud) == ["other"]


def test_nodes_are_given_back_though_the_jobs_cannot_be_stopped(
    cancel: Callable[[Platform], None], cloud: FakeCloud
) -> None:
    with pytest.raises(ClusterError):
        cancel(Platform(ClusterError("away")))
    assert holders(cloud) == ["other"]


def test_a_run_elsewhere_is_cancelled_too_and_nodes_are_given_back_though_prefect_does_not_answer(
    cancel: Callable[[Platform], None], cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[UUID] = []

    def unreachable(run_id: UUID) -> None:
        asked.append(run_id)
        raise httpx.ConnectError("away")

    monkeypatch.setenv("KAITO_FLOWS_ELSEWHERE", "west")
    monkeypatch.setattr(giving_up, "stop_elsewhere", unreachable)
    with pytest.raises(httpx.ConnectError):
        cancel(platform := Platform())
    assert (asked, platform.deleted) == ([RUN_ID], [])
    assert holders(cloud) == ["other"]


def test_a_guest_leaves_nothing_behind(cancel: Callable[..., None], cloud: FakeCloud) -> None:
    platform = Platform()
    cancel(platform, **{GUEST_ANNOTATION: "a run elsewhere"})
    assert (platform.stopped, platform.deleted) == (["w"], ["w"])
    assert holders(cloud) == ["other"]


def test_both_flows_that_have_nodes_give_them_up_when_they_are_cancelled() -> None:
    for flow in (tune_workspace, serve_workspace):
        assert flow.on_cancellation_hooks == [giving_up.give_up]
