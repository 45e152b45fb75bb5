"""`kaito-flows plan` where nodes are rented: what would be tried, in which order, and what cannot be had now."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from arm_fixtures import A100, A100_FAMILY, T4

if TYPE_CHECKING:
    from arm import Azure

H100 = "Standard_NC40ads_H100_v5"


@pytest.fixture
def command(command: Any, azure: Azure, tmp_path: Path) -> Any:
    """The command, whose settings rent from AKS; nobody answers at the cluster, which is not asked."""
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    # The command's own environment drops all settings that the test has.
    set_here = {name: value for name, value in os.environ.items() if name.startswith("KAITO_FLOWS_AKS_")}
    command.environment |= set_here | {"KUBECONFIG": str(tmp_path / "kubeconfig")}
    command.environment |= {"KAITO_FLOWS_PLATFORM": "kubernetes", "KAITO_FLOWS_NODES": "aks"}
    return command


@pytest.fixture
def workspace(tmp_path: Path) -> Callable[..., Path]:
    """Write a Workspace that tunes Phi-3 with QLoRA."""

    def write(size: str = A100, annotations: dict[str, str] | None = None, **resource: Any) -> Path:
        workspace = {
            "apiVersion": "kaito.sh/v1beta1",
            "kind": "Workspace",
            "metadata": {"name": "phi", "annotations": annotations or {}},
            "resource": {"instanceType": size, "labelSelector": {"matchLabels": {"app": "phi"}}, **resource},
            "tuning": {
                "preset": {"name": "phi-3-mini-128k-instruct"},
                "method": "qlora",
                "input": {"urls": ["https://example.com/chats.parquet"]},
                "output": {"image": "r.example/phi:1", "imagePushSecret": "push"},
            },
        }
        if not size:
            del workspace["resource"]["instanceType"]  # type: ignore[attr-defined]
        path = tmp_path / "phi.yaml"
        path.write_text(yaml.safe_dump(workspace))
        return path

    return write


SEVERAL = {"kaito-flows/instance-types": H100, "kaito-flows/capacity": "spot,on-demand"}


def test_other_places_are_the_last_resort(command: Any, azure: Azure, workspace: Any) -> None:
    azure.usages["cores"] = [0, 0]
    file = workspace()
    refused = command("plan", file)
    assert refused.returncode == 1
    assert "no-node" in refused.stderr
    command.environment["KAITO_FLOWS_ELSEWHERE"] = "west,north"
    done = command("plan", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == [
        "  elsewhere  the deployment tune-workspace/west, which finds its own nodes",
        "  elsewhere  the deployment tune-workspace/north, which finds its own nodes",
    ]
    assert command.facts("plan", file)["elsewhere"] == ["west", "north"]


def test_offers_are_listed_in_order_with_price_and_what_speaks_against_each(
    command: Any, azure: Azure, workspace: Any
) -> None:
    azure.usages["lowPriorityCores"] = [0, 10]
    file = workspace(annotations=SEVERAL)
    done = command("plan", file)
    assert (done.returncode, done.stderr) == (0, "")
    plan, _, offered = done.stdout.partition("Nodes, in the order in which they are tried\n")
    assert plan.startswith("Plan of phi\n")
    short = "cannot be had: the quota Total Regional Spot vCPUs in eastus is 14 vCPUs short: 24 are needed, 10 of 10"
    lines = offered.splitlines()
    assert lines[0].startswith(f"  aks  {A100} (spot), at most 3.67 USD/h: {short} are left; more: https://")
    assert lines[1:] == [
        f"  aks  {A100}, 3.67 USD/h",
        f"  aks  {H100} (spot), at most 6.98 USD/h: cannot be had: not offered in eastus",
        f"  aks  {H100}, 6.98 USD/h: cannot be had: not offered in eastus",
    ]
    assert azure.names() == [], "nothing was rented"
    narrow = command.on_terminal("plan", file)
    assert narrow.exit_code == 0
    # A link is to be copied, so it is not broken.
    assert [line for line in narrow.lines if len(line) > 80 and "https://" not in line] == []


def test_offers_are_facts_for_programs(command: Any, azure: Azure, workspace: Any) -> None:
    azure.usages[A100_FAMILY] = [24, 48]
    facts = command.facts("plan", workspace(annotations={"kaito-flows/capacity": "spot,on-demand"}, count=2))
    spot, on_demand = facts["offers"]
    assert spot == {
        "provider": "aks", "instance_type": A100, "nodes": 2, "gpus": 1, "spot": True, "zone": "",
        "price_usd_hour": 7.346, "against": "",
    }  # fmt: skip
    assert on_demand["against"].startswith(f"the quota {A100_FAMILY} vCPUs in eastus is 24 vCPUs short")


def test_where_no_size_is_named_the_cheapest_is_planned_and_offered(command: Any, azure: Azure, workspace: Any) -> None:
    azure.offer("Standard_NV36ads_A10_v5", "StandardNVADSA10v5Family", cores=36, limit=36)
    facts = command.facts("plan", workspace(""))
    assert facts["instance_type"] == "Standard_NV36ads_A10_v5"
    assert [(offer["instance_type"], offer["against"]) for offer in facts["offers"]] == [(facts["instance_type"], "")]


def test_when_none_can_be_had_the_plan_is_shown_and_it_fails(command: Any, azure: Azure, workspace: Any) -> None:
    azure.restrict(A100, "NotAvailableForSubscription")
    file = workspace()
    done = command("plan", file)
    assert done.returncode == 1
    assert "cannot be had: not open to this subscription in eastus" in done.stdout
    assert done.stderr == (
        "error: no-node: resource.instanceType: none of them can be rented now "
        "(more quota, or more sizes: annotation kaito-flows/instance-types)\n"
    )
    done = command("plan", file, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["offers"][0]["against"]


def test_own_nodes_are_named_where_they_are_tried_first(command: Any, azure: Azure, workspace: Any) -> None:
    azure.restrict(A100, "NotAvailableForSubscription")
    command.environment["KAITO_FLOWS_NODES"] = "existing,aks"
    done = command("plan", workspace())
    assert (done.returncode, done.stderr) == (0, ""), "they may do"
    offered = done.stdout.partition("Nodes, in the order in which they are tried\n")[2].splitlines()
    assert offered[0] == "  existing  own nodes that have the Workspace's labels, size and GPUs"
    assert offered[1].startswith(f"  aks       {A100}, 3.67 USD/h: cannot be had: ")


@pytest.mark.parametrize(
    ("annotations", "settings", "complaint"),
    [
        ({"kaito-flows/instance-types": T4}, {}, "error: unknown-instance-type: metadata.annotations["),
        ({}, {"KAITO_FLOWS_MAX_PRICE_USD_HOUR": "1"}, "error: too-expensive: resource.instanceType: "),
        ({}, {"KAITO_FLOWS_AKS_CLUSTER": ""}, "error: no-cloud: KAITO_FLOWS_NODES: "),
    ],
)
def test_what_is_wrong_with_the_file_or_the_settings_is_one_line(
    command: Any, workspace: Any, annotations: dict[str, str], settings: dict[str, str], complaint: str
) -> None:
    command.environment |= settings
    done = command("plan", workspace(annotations=annotations))
    assert done.returncode == 2
    assert done.stderr.startswith(complaint)
    assert done.stderr.count("\n") == 1


def test_a_cloud_that_says_no_is_one_line_behind_the_plan(command: Any, azure: Azure, workspace: Any) -> None:
    assert azure.allowed is not None
    azure.allowed -= {"Microsoft.Compute/skus/read"}
    done = command("plan", workspace())
    assert done.returncode == 2
    assert done.stdout.startswith("Plan of phi\n")
    assert done.stderr.startswith("error: access-denied: ")
    assert "Microsoft.Compute/skus/read" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plan_for_this_machine_asks_no_cloud(command: Any, azure: Azure, workspace: Any) -> None:
    facts = command.facts("plan", workspace(), "--platform", "local")
    assert (facts["platform"], azure.calls) == ("local", [])
    assert "offers" not in facts
