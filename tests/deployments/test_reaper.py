"""Nodes are given back without Prefect: the CronJob is what flow runs are, and its pod does it in a cluster."""

from __future__ import annotations

import json
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from deployments.conftest import WORKER_IMAGE, Installer
from kubernetes.client import V1CronJobSpec
from waiting import eventually

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.nodes.base import Holder, NodeRequest, Offer
from kaito_flows.nodes.karpenter import NodeClaims
from kaito_flows.nodes.pools import LeaseRecord
from kaito_flows.settings import Settings

REAPER = "deployments/kubernetes/reaper"


@pytest.fixture(scope="module")
def job(renderer: Installer, repository_root: Path) -> dict[str, Any]:
    """The CronJob. The test cluster is too old to take it: there it is `batch/v1beta1`."""
    [found] = renderer.kustomize(repository_root / REAPER)
    assert (found["apiVersion"], found["kind"]) == ("batch/v1", "CronJob")
    return found


def test_it_runs_every_quarter_of_an_hour_and_never_twice_at_once(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert set(spec) <= set(V1CronJobSpec.attribute_map.values())
    assert (spec["schedule"], spec["concurrencyPolicy"]) == ("*/15 * * * *", "Forbid")
    assert 1 <= spec["successfulJobsHistoryLimit"] + spec["failedJobsHistoryLimit"] <= 3
    once = spec["jobTemplate"]["spec"]
    assert once["activeDeadlineSeconds"] < 15 * 60, "one that hangs does not keep the next one from its work"
    assert once["backoffLimit"] == 0
    assert once["template"]["spec"]["restartPolicy"] == "Never"


def test_its_pod_may_and_knows_what_the_pods_of_flow_runs_do(job: dict[str, Any], repository_root: Path) -> None:
    text = (repository_root / "deployments/kubernetes/base/job-template.json").read_text()
    template = json.loads(text)
    usual = {name: found.get("default") for name, found in template["variables"]["properties"].items()}
    flow = template["job_configuration"]["job_manifest"]["spec"]["template"]
    ours = job["spec"]["jobTemplate"]["spec"]["template"]
    identity = "azure.workload.identity/use"
    assert ours["metadata"]["labels"][identity] == flow["metadata"]["labels"][identity] == "true"
    assert ours["spec"]["serviceAccountName"] == usual["service_account_name"]
    assert job["metadata"]["namespace"] == usual["namespace"]
    [flows_container], [container] = flow["spec"]["containers"], ours["spec"]["containers"]
    for key in ("securityContext", "volumes", "automountServiceAccountToken", "enableServiceLinks"):
        assert ours["spec"][key] == flow["spec"][key], key
    for key in ("securityContext", "volumeMounts"):
        assert container[key] == flows_container[key], key
    assert container["envFrom"] == [{"configMapRef": {"name": usual["settings"]}}]
    assert container["image"] == usual["image"]
    set_here = {variable["name"]: variable["value"] for variable in container["env"]}
    assert set_here.items() <= usual["env"].items()
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])


@pytest.mark.cluster
def test_in_a_cluster_it_gives_back_what_is_long_out_of_its_lease_though_prefect_is_away(
    allowed: Installer,
    here: list[dict[str, Any]],
    job: dict[str, Any],
    cluster: Cluster,
    node_class: str,
    images: dict[str, str],
) -> None:
    """Its Job, which is all that the test cluster is too old for, made by hand."""
    owner = allowed.namespace
    [settings] = [m for m in here if m["kind"] == "ConfigMap" and m["metadata"]["name"] == "kaito-flows"]
    settings["data"] |= {
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
        "KAITO_FLOWS_NODES": "karpenter",
        "KAITO_FLOWS_KARPENTER_NODE_CLASS": node_class,
        "KAITO_FLOWS_OWNER": owner,
    }
    claims = NodeClaims(cluster, Settings(owner=owner, karpenter_node_class=node_class))
    offer, now, run = Offer("Standard_NC24ads_A100_v4", 1), claims.now(), str(uuid.uuid4())
    request = NodeRequest("w", gpus=1, namespace=owner, run_id=run, offers=(offer,))

    def add(name: str, minutes: float) -> None:
        """A claim that nobody serves, whose lease of an hour ends in so many minutes."""
        ends = now + timedelta(minutes=minutes)
        record = LeaseRecord(owner, Holder(owner, "w", run), "leased", ends - timedelta(hours=1), ends)
        claims.create(name, offer, request, record)

    names = {"kflate": -200.0, "kfrenewed": 40.0, "kfjustover": -20.0}
    template = job["spec"]["jobTemplate"]["spec"]
    template["template"]["spec"]["containers"][0]["image"] = WORKER_IMAGE
    once = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "reaper"}, "spec": template}
    try:
        for name, minutes in names.items():
            add(name, minutes)
        allowed.apply([settings, {**once, "metadata": {"name": "reaper", "namespace": owner}}])
        eventually(lambda: allowed.get("job", "reaper")["status"].get("succeeded"), seconds=120, every=0.5)
        left = {pool.name for pool in claims.pools() if pool.record.owner == owner}
        said = allowed("logs", "job/reaper")
        assert left == {"kfrenewed", "kfjustover"}, said
        assert "kflate" in said
        assert "removed: its lease ran out 3h ago; Prefect does not answer" in said
    finally:
        for pool in claims.pools():
            if pool.name in names and pool.record.owner == owner:
                claims.delete(pool)
        allowed.run("delete", "job", "reaper")
