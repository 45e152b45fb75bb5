"""`kaito-flows nodes`: what is listed, removed and given back, for people on 80 columns and as JSON."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
from fake_cloud import SIZE, START, FakeCloud, FakeCluster

from kaito_flows.cli import output
from kaito_flows.cli.app import main
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import CloudError
from kaito_flows.nodes import opening
from kaito_flows.nodes.base import Offer
from kaito_flows.nodes.reaping import RunState
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.platforms.kubernetes import KubernetesPlatform
from kaito_flows.settings import Settings
from kaito_flows.tasks import reap as reaping

Run = Callable[..., tuple[int, str, str]]

FAILED, RUNNING = RunState("FAILED", START), RunState("RUNNING", START)


@pytest.fixture
def cloud() -> FakeCloud:
    return FakeCloud("aks")


@pytest.fixture
def kaito_flows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, in this process: its exit code, what it prints, and what it complains of."""

    def run(*arguments: str, stdin: str = "", columns: int = 1000) -> tuple[int, str, str]:
        given = io.StringIO(stdin)
        given.isatty = lambda: bool(stdin)  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", given)
        monkeypatch.setattr(sys, "argv", ["kaito-flows", *arguments])
        monkeypatch.setattr(output, "_width", lambda: columns)
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return cast(int, end.value.code), said.out, said.err

    return run


@pytest.fixture
def renting(monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud) -> None:
    """The settings rent from the cloud."""
    cluster = cast(Cluster, FakeCluster(cloud))
    provider = RentedNodes(cloud, cluster, Settings())
    monkeypatch.setattr(opening, "open_rented", lambda settings, kinds=(): [provider])
    monkeypatch.setattr(Cluster, "connect", lambda: cluster)


def test_where_nothing_is_rented_it_says_so_plainly(kaito_flows: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAITO_FLOWS_NODES", raising=False)
    plain = "nothing is rented: KAITO_FLOWS_NODES is existing\n"
    assert kaito_flows("nodes") == (0, plain, "")
    assert kaito_flows("nodes", "reap") == (0, plain, "")
    assert kaito_flows("nodes", "--json") == (0, "[]\n", "")
    assert kaito_flows("nodes", "reap", "--json") == (0, "[]\n", "")
    code, _, complaint = kaito_flows("nodes", "release", "kf1", "--yes")
    assert (code, complaint) == (
        2, "error: lease-not-found: 'kf1': no such lease (KAITO_FLOWS_NODES is existing: nothing is rented)\n"
    )  # fmt: skip


def test_a_setting_that_is_none_is_named(kaito_flows: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_FLOWS_NODES", "gcp")
    code, _, complaint = kaito_flows("nodes")
    assert code == 2
    assert complaint.startswith("error: invalid-setting: KAITO_FLOWS_NODES: ")


@pytest.mark.usefixtures("renting")
def test_leases_are_listed_with_age_cost_and_expiry(kaito_flows: Run, cloud: FakeCloud) -> None:
    assert kaito_flows("nodes") == (0, "no node is rented\n", "")
    cloud.add("kf0123456789", "r", age=30, left=42, offer=Offer("Standard_X", 1, True, price_usd_hour=3.0))
    cloud.add("kfabcdefabcd", state="serving", workspace="other", age=60 * 50, owner="kaito-flows")
    cloud.add("kftheirs", owner="others")
    code, listed, _ = kaito_flows("nodes")
    assert code == 0
    assert [line.split() for line in listed.splitlines()] == [
        ["NAME", "WORKSPACE", "SIZE", "NODES", "STATE", "AGE", "COST", "EXPIRES"],
        ["kfabcdefabcd", "team/other", SIZE, "1", "serving", "2d", "180.00", "-"],
        ["kf0123456789", "team/w", "Standard_X", "(spot)", "1", "leased", "30m", "1.50", "in", "42m"],
    ]


@pytest.mark.usefixtures("renting")
@pytest.mark.parametrize("option", [["--json"], ["-o", "json"], ["--output", "json"]])
def test_leases_are_json_for_programs(kaito_flows: Run, cloud: FakeCloud, option: list[str]) -> None:
    cloud.add("kf1", "r", left=42)
    code, listed, complaint = kaito_flows("nodes", *option)
    [found] = json.loads(listed)
    assert (code, complaint) == (0, "")
    assert (found["name"], found["provider"], found["flow_run_id"]) == ("kf1", "aks", "r")
    cloud.faults["pools"] = [CloudError("HTTP 503")]
    code, said, _ = kaito_flows("nodes", *option)
    assert (code, json.loads(said)["error"]["code"]) == (1, "cloud-unavailable")


def test_another_form_than_json_is_refused(kaito_flows: Run) -> None:
    code, _, complaint = kaito_flows("nodes", "-o", "yaml")
    assert (code, complaint) == (2, "error: usage: --output: 'yaml' is no form of output (json)\n")


@pytest.mark.usefixtures("renting")
def test_everything_fits_80_columns(kaito_flows: Run, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaping, "run_states", lambda ids: {})
    cloud.add("kf0123456789", "r", workspace="w" * 30, namespace="n" * 30, offer=Offer(SIZE, 1, spot=True))
    cloud.add("kfabcdefabcd", "r", left=-90)
    code, listed, _ = kaito_flows("nodes", columns=80)
    assert code == 0
    assert "expires" in listed.lower()
    for printed in (listed, kaito_flows("nodes", "--help")[1], kaito_flows("nodes", "reap", "--help")[1]):
        assert max(map(len, printed.splitlines())) <= 80, printed


@pytest.mark.usefixtures("renting")
def test_reaping_says_what_became_of_each(kaito_flows: Run, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaping, "run_states", lambda ids: {"over": FAILED, "works": RUNNING})
    cloud.add("kf1", "over", age=20)
    cloud.add("kf2", "works", age=10)
    planned = kaito_flows("nodes", "reap", "--dry-run")
    assert planned == (
        0, "kf1 of team/w: would be removed: its run has failed\n"
        "kf2 of team/w: kept: leased for 50m more; its run is running\n", "",
    )  # fmt: skip
    assert cloud.alive == ["kf1", "kf2"]
    code, said, _ = kaito_flows("nodes", "reap", "--json")
    assert (code, [row["outcome"] for row in json.loads(said)]) == (0, ["removed", "kept"])
    assert cloud.alive == ["kf2"]


@pytest.mark.usefixtures("renting")
def test_without_prefect_only_what_is_long_out_of_its_lease_is_reaped(
    kaito_flows: Run, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaping, "run_states", lambda ids: None)
    cloud.add("late", "r", age=100, left=-10)
    cloud.add("later", "r", age=200, left=-61)
    code, said, _ = kaito_flows("nodes", "reap")
    assert (code, cloud.alive) == (0, ["late"])
    assert "Prefect does not answer" in said


@pytest.mark.usefixtures("renting")
def test_what_cannot_be_reaped_is_one_line_and_an_exit_code(
    kaito_flows: Run, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaping, "run_states", lambda ids: {"over": FAILED})
    cloud.add("kf1", "over")
    cloud.faults["delete"] = [CloudError("HTTP 503")]
    code, said, complaint = kaito_flows("nodes", "reap")
    assert code == 1
    assert said.startswith("kf1 of team/w: not removed: ")
    assert complaint == (
        "error: not-reaped: 1 of 1 pools not removed: kf1: cloud-unavailable: HTTP 503 "
        "(it is tried again at the next run)\n"
    )


@pytest.mark.usefixtures("renting")
def test_a_lease_is_released_when_that_is_confirmed(kaito_flows: Run, cloud: FakeCloud) -> None:
    cloud.add("kf1", "r1")
    cloud.add("kf2", state="serving")
    code, said, _ = kaito_flows("nodes", "release", "kf1", stdin="n\n")
    assert (code, cloud.alive) == (1, ["kf1", "kf2"])
    assert "flow run r1 of team/w holds it, and would lose its nodes" in said
    assert said.endswith("nothing was released\n")
    code, _, complaint = kaito_flows("nodes", "release", "kf1")
    assert (code, cloud.alive) == (2, ["kf1", "kf2"])
    assert complaint == "error: usage: nodes release: asks before it removes nodes (--yes answers)\n"
    code, said, _ = kaito_flows("nodes", "release", "kf2", stdin="y\n")
    assert (code, cloud.alive) == (0, ["kf1"])
    assert "it is serving for team/w" in said
    assert kaito_flows("nodes", "release", "kf1", "--yes") == (0, "released kf1: it is being removed\n", "")
    assert cloud.alive == []


@pytest.mark.usefixtures("renting")
def test_only_own_leases_can_be_released(kaito_flows: Run, cloud: FakeCloud) -> None:
    cloud.add("theirs", owner="others")
    code, _, complaint = kaito_flows("nodes", "release", "theirs", "--yes")
    assert (code, cloud.alive) == (2, ["theirs"])
    assert complaint == "error: lease-not-found: 'theirs': no such lease (kaito-flows nodes lists them)\n"


@pytest.mark.usefixtures("renting")
def test_deleting_a_workspace_gives_its_nodes_back(
    kaito_flows: Run, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeCluster(cloud)
    monkeypatch.setattr(Cluster, "connect", lambda namespace=None: cluster.within(namespace or "usual"))
    monkeypatch.setattr(KubernetesPlatform, "read_status", lambda self, name: None)
    monkeypatch.setattr(KubernetesPlatform, "service", lambda self, name: None)
    monkeypatch.setattr(KubernetesPlatform, "delete", lambda self, name: [f"job {name}"])
    cloud.add("kf1", "r", workspace="w", namespace="team")
    cloud.add("kf2", "r", workspace="w", namespace="usual", state="kept")
    assert kaito_flows("delete", "w", "-n", "team") == (0, "deleted w: stopped job w\n", "")
    assert cloud.alive == ["kf2"]
    monkeypatch.setenv("KAITO_FLOWS_PLATFORM", "kubernetes")
    assert kaito_flows("delete", "w")[0] == 0
    assert cloud.alive == []


def test_the_command_itself_knows_it(command: Any) -> None:
    done = command("nodes")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing is rented: KAITO_FLOWS_NODES is existing\n", "")
