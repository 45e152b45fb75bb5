"""AKS as a cloud: what is asked of Azure, how its answers are read, and what each of its faults becomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from arm import CLUSTER, GROUP, SUBSCRIPTION, Azure, Failure
from arm_fixtures import A100, A100_FAMILY, SteadyClock, actions
from arm_proxy import Fault
from azure.core.exceptions import HttpResponseError
from azure.identity import DefaultAzureCredential
from azure.mgmt.containerservice import ContainerServiceClient

from kaito_flows.errors import AccessError, CapacityError, CloudError, InputError, KaitoFlowsError, LeaseLostError
from kaito_flows.nodes import NodeRequest, Offer
from kaito_flows.nodes.aks import AksPools
from kaito_flows.nodes.pools import LeaseRecord, Pool
from kaito_flows.settings import Settings

NAME = "kf0123456789"
LARGE, SPOT = Offer(A100, 1), Offer(A100, 1, spot=True)
REQUEST = NodeRequest("tune", A100, {"apps": "phi-3"}, gpus=1, namespace="default", run_id="run-1")
THEN = datetime(2030, 1, 1, 12, tzinfo=UTC)
RECORD = LeaseRecord("kaito-flows", REQUEST.holder, "leased", THEN, THEN + timedelta(hours=1))
KEPT = replace(RECORD, state="kept")


@pytest.fixture
def aks(azure: Azure, steady: SteadyClock) -> AksPools:
    return AksPools.connect(Settings())


def ready(aks: AksPools) -> Pool:
    """A pool that is up."""
    aks.create(NAME, LARGE, REQUEST, RECORD)
    pool = aks.look(NAME)
    assert pool is not None
    assert pool.state == "ready"
    return pool


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_pool_is_asked_for_with_labels_taint_and_record(aks: AksPools, azure: Azure) -> None:
    request = replace(
        REQUEST,
        count=2,
        disk_bytes=200 * 2**30 + 1,
        labels={"apps": "phi-3", "kubernetes.io/os": "linux", "karpenter.sh/nodepool": "kaito", "agentpool": "gpu"},
        any_of={"tier": ("a", "b")},
    )
    pool = aks.create(NAME, replace(LARGE, zone="2"), request, RECORD)
    (body,) = azure.bodies
    assert body["properties"] == {
        "mode": "User",
        "vmSize": A100,
        "count": 2,
        "osType": "Linux",
        "osDiskSizeGB": 201,
        "availabilityZones": ["2"],
        "gpuProfile": {"driver": "Install"},
        "nodeTaints": ["sku=gpu:NoSchedule"],
        "tags": RECORD.as_tags(),
        # What a kubelet or AKS says itself is left to them, and KAITO's gpu-provisioner is to let the pool be.
        "nodeLabels": {
            "apps": "phi-3",
            "tier": "a",
            "kaito.sh/workspace": "tune",
            "kaito.sh/workspacenamespace": "default",
            "kaito.sh/machine-type": "gpu",
            "kaito-flows/pool": NAME,
        },
    }
    assert (pool.name, pool.state, pool.record, pool.count) == (NAME, "creating", RECORD, 2)
    assert (pool.offer.instance_type, pool.offer.zone, pool.offer.spot) == (A100, "2", False)
    assert aks.node_labels(NAME) == {"kaito-flows/pool": NAME}


def test_a_spot_pool_has_a_price_and_is_deleted_when_evicted(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_FLOWS_AKS_SPOT_MAX_PRICE", "1.25")
    pool = AksPools.connect(Settings()).create(NAME, SPOT, REQUEST, RECORD)
    asked = azure.bodies[0]["properties"]
    assert asked["scaleSetPriority"] == "Spot"
    assert asked["scaleSetEvictionPolicy"] == "Delete"
    assert asked["spotMaxPrice"] == 1.25
    assert asked["osDiskSizeGB"] == 128
    assert pool.offer.spot


def test_a_pool_without_gpus_gets_no_driver(aks: AksPools, azure: Azure) -> None:
    aks.create(NAME, LARGE, replace(REQUEST, gpus=0), RECORD)
    assert "gpuProfile" not in azure.bodies[0]["properties"]
    assert azure.bodies[0]["properties"]["nodeLabels"]["kaito.sh/machine-type"] == "cpu"


def test_a_pool_joins_the_network_of_the_others(aks: AksPools, azure: Azure) -> None:
    subnet = "/subscriptions/s/resourceGroups/ml/providers/Microsoft.Network/virtualNetworks/v/subnets/"
    azure.put_there("system", mode="System", vnetSubnetID=subnet + "nodes", podSubnetID=subnet + "pods")
    aks.create(NAME, LARGE, REQUEST, RECORD)
    asked = azure.bodies[0]["properties"]
    assert (asked["vnetSubnetID"], asked["podSubnetID"]) == (subnet + "nodes", subnet + "pods")


@pytest.mark.parametrize(
    ("name", "properties"),
    [
        (NAME, {"provisioningState": "Succeeded"}),
        (NAME, {"status": {}}),
        (NAME, {"nodeImageVersion": "AKSUbuntu-1"}),
        (NAME, {"nodeLabels": {"app.kubernetes.io/managed-by": "kaito-flows"}}),
        (NAME, {"nodeLabels": {"apps": "not a label"}}),
        (NAME, {"vmsize": "a key that is not Azure's"}),
        ("Upper", {}),
    ],
)
def test_the_stand_in_refuses_what_azure_would(azure: Azure, name: str, properties: dict[str, object]) -> None:
    client = ContainerServiceClient(DefaultAzureCredential(), SUBSCRIPTION)
    body = {"properties": {"vmSize": A100, "count": 1, **properties}}
    with pytest.raises(HttpResponseError) as raised:
        client.agent_pools.begin_create_or_update(GROUP, CLUSTER, name, body, polling=False)  # type: ignore[call-overload]
    assert raised.value.status_code == 400
    assert azure.pools == {}


# --- a pool that is there already -------------------------------------------------------------------------------------


def test_a_pool_of_the_same_name_is_adopted(aks: AksPools, azure: Azure) -> None:
    first = ready(aks)
    again = AksPools.connect(Settings()).create(NAME, LARGE, REQUEST, replace(RECORD, created_at=RECORD.expires_at))
    assert again == first
    assert len(azure.pools) == 1


@pytest.mark.parametrize("busy_first", [False, True])
def test_a_pool_that_is_still_being_made_is_adopted(
    aks: AksPools, azure: Azure, steady: SteadyClock, busy_first: bool
) -> None:
    azure.boot_seconds, azure.busy_first = 240, busy_first
    aks.create(NAME, LARGE, REQUEST, RECORD)
    assert aks.create(NAME, LARGE, REQUEST, RECORD).state == "creating"


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_connection_that_is_cut_makes_one_pool(aks: AksPools, azure: Azure, cut: str) -> None:
    azure.faults = [Fault("PUT", cut=cut)]
    assert aks.create(NAME, LARGE, REQUEST, RECORD).record == RECORD
    assert azure.count("PUT") == 2
    assert len(azure.pools) == 1


def test_somebody_elses_pool_is_not_touched(aks: AksPools, azure: Azure) -> None:
    azure.put_there(NAME, tags={"team": "billing"})
    azure.put_there("half", tags={**RECORD.as_tags(), "kaito-flows-expires-at": "soon"})
    before = azure.pools[NAME].version
    with pytest.raises(InputError, match="pool-taken"):
        aks.create(NAME, LARGE, REQUEST, RECORD)
    assert aks.look(NAME) is None
    assert aks.pools() == []
    assert azure.pools[NAME].version == before


def test_pools_are_listed_with_whose_they_are(aks: AksPools, azure: Azure) -> None:
    azure.page = 1
    azure.put_there("system", mode="System")
    pool = ready(aks)
    assert aks.pools() == [pool]


# --- failures ---------------------------------------------------------------------------------------------------------

VMSS = (
    "VMSSAgentPoolReconciler retry failed: Category: ClientError; SubCode: ZonalAllocationFailed; "
    'Code="AllocationFailed" Message="We do not have sufficient capacity for the requested VM size in this region."'
)


@pytest.mark.parametrize(
    ("code", "message", "ours"),
    [
        ("ReconcileVMSSAgentPoolFailed", VMSS, "no-capacity"),
        ("OverconstrainedAllocationRequest", "Allocation failed. VM(s) with the following constraints", "no-capacity"),
        ("SkuNotAvailable", "The requested VM size for resource is currently not available", "size-not-offered"),
        ("QuotaExceeded", "Operation could not be completed as it results in exceeding approved quota", "no-quota"),
        ("VMExtensionProvisioningError", "CSE failed with exit status 124", "pool-failed"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_a_pool_that_fails_later_says_why(
    aks: AksPools, azure: Azure, code: str, message: str, ours: str, told: bool
) -> None:
    """By the pool itself, and where it does not say, by the operation that made it."""
    azure.failures = [Failure(code, message, told)]
    aks.create(NAME, LARGE, REQUEST, RECORD)
    pool = aks.look(NAME)
    assert pool is not None
    assert (pool.state, pool.code) == ("failed", ours)
    assert pool.reason == f"{code}: {message}"


def test_a_new_process_says_that_aks_gives_no_reason(aks: AksPools, azure: Azure) -> None:
    azure.failures = [Failure("AllocationFailed", "", told=False)]
    aks.create(NAME, LARGE, REQUEST, RECORD)
    pool = AksPools.connect(Settings()).look(NAME)
    assert pool is not None
    assert "AKS gives no reason" in pool.reason


REFUSALS = [
    (
        400,
        "ErrCode_InsufficientVCPUQuota",
        "Insufficient vcpu quota requested 24, remaining 0",
        CapacityError,
        "no-quota",
    ),
    (400, "QuotaExceeded", "Provisioning of resource(s) failed", CapacityError, "no-quota"),
    (409, "OperationNotAllowed", "exceeding approved standardNCADSA100v4Family Cores quota", CapacityError, "no-quota"),
    (409, "OperationNotAllowed", "exceeding approved Total Regional Cores quota", CapacityError, "no-quota"),
    (409, "OperationNotAllowed", "exceeding approved LowPriorityCores quota", CapacityError, "no-quota"),
    (409, "SkuNotAvailable", "The requested size is currently not available", CapacityError, "size-not-offered"),
    (
        400,
        "AvailabilityZoneNotSupported",
        "The zone(s) '3' for resource is not supported",
        CapacityError,
        "size-not-offered",
    ),
    (409, "AllocationFailed", "Allocation failed.", CapacityError, "no-capacity"),
    (409, "ZonalAllocationFailed", "Allocation failed.", CapacityError, "no-capacity"),
    (409, "OverconstrainedZonalAllocationRequest", "Allocation failed.", CapacityError, "no-capacity"),
    (
        409,
        "OperationNotAllowed",
        "Another agentpool operation (np1 - Creating) is in progress",
        CloudError,
        "cloud-busy",
    ),
    (409, "OperationNotAllowed", "managed cluster is in (Stopped) state", CloudError, "cloud-unavailable"),
    (
        400,
        "BadRequest",
        "The VM size of Standard_X is not allowed in your subscription in location 'eastus'.",
        CapacityError,
        "size-not-allowed",
    ),
    (400, "InvalidParameter", "Required parameter is missing", InputError, "refused-by-cloud"),
    (401, "InvalidAuthenticationToken", "The access token is invalid.", AccessError, "access-denied"),
    (403, "RequestDisallowedByPolicy", "Resource was disallowed by policy.", AccessError, "access-denied"),
    (404, "ResourceGroupNotFound", "Resource group 'ml' could not be found.", InputError, "no-cloud"),
    (404, "ParentResourceNotFound", "Failed to perform 'write' on resource", InputError, "no-cloud"),
]


@pytest.mark.parametrize(("status", "code", "message", "error", "ours"), REFUSALS)
def test_what_azure_refuses_has_a_class_and_a_code(
    aks: AksPools, azure: Azure, status: int, code: str, message: str, error: type[KaitoFlowsError], ours: str
) -> None:
    azure.faults = [Fault("PUT", status, code, message)]
    with pytest.raises(error) as raised:
        aks.create(NAME, LARGE, REQUEST, RECORD)
    assert type(raised.value) is error
    assert raised.value.code == ours
    assert code in raised.value.message
    assert message in raised.value.message
    assert azure.pools == {}


def test_the_flat_bodies_of_aks_are_read_too(aks: AksPools, azure: Azure) -> None:
    body = {"code": "ErrCode_InsufficientVCPUQuota", "details": None, "message": "Insufficient", "subcode": ""}
    azure.faults = [Fault("PUT", 400, raw=json.dumps(body).encode())]
    with pytest.raises(CapacityError, match=r"no-quota.*Insufficient.*myQuotas"):
        aks.create(NAME, LARGE, REQUEST, RECORD)


def test_a_code_among_the_details_counts(aks: AksPools, azure: Azure) -> None:
    details = [{"code": "SkuNotAvailable", "message": "not here"}]
    body = {"error": {"code": "DeploymentFailed", "message": "see details", "details": details}}
    azure.faults = [Fault("PUT", 409, raw=json.dumps(body).encode())]
    with pytest.raises(
        CapacityError, match=r"size-not-offered: .*DeploymentFailed: see details; SkuNotAvailable: not here"
    ):
        aks.create(NAME, LARGE, REQUEST, RECORD)


ON_SUBNET = (
    "The client 'x' has permission to perform action 'Microsoft.ContainerService/managedClusters/agentPools/write' on "
    "scope '/y'; however, it does not have permission to perform action(s) "
    "'Microsoft.Network/virtualNetworks/subnets/join/action' on the linked scope(s) '/z'"
)


@pytest.mark.parametrize(
    ("message", "action"),
    [
        (
            "The client 'x' with object id 'y' does not have authorization to perform action "
            "'Microsoft.ContainerService/managedClusters/agentPools/write' over scope '/z'",
            "Microsoft.ContainerService/managedClusters/agentPools/write",
        ),
        (ON_SUBNET, "Microsoft.Network/virtualNetworks/subnets/join/action"),
    ],
)
def test_a_right_that_is_missing_is_named(aks: AksPools, azure: Azure, message: str, action: str) -> None:
    azure.faults = [Fault("PUT", 403, "AuthorizationFailed", message)]
    with pytest.raises(AccessError, match=f"the right {action} is missing"):
        aks.create(NAME, LARGE, REQUEST, RECORD)


OPERATIONS = "Microsoft.ContainerService/locations/operations/read"


@pytest.mark.parametrize("action", sorted(actions() - {OPERATIONS}))
def test_no_right_of_our_roles_is_one_too_many(aks: AksPools, azure: Azure, action: str) -> None:
    """That they are enough, each other test shows."""
    assert azure.allowed is not None
    azure.allowed.remove(action)
    azure.boot_seconds = 600

    def lease() -> None:
        aks.against([LARGE], 1)
        aks.delete(aks.create(NAME, LARGE, REQUEST, RECORD))

    with pytest.raises(AccessError, match=f"the right {action} is missing"):
        lease()


def test_a_reason_that_may_not_be_read_hinders_nothing(aks: AksPools, azure: Azure) -> None:
    assert azure.allowed is not None
    azure.allowed.remove(OPERATIONS)
    azure.failures = [Failure("AllocationFailed", "none left", told=False)]
    aks.create(NAME, LARGE, REQUEST, RECORD)
    pool = aks.look(NAME)
    assert pool is not None
    assert pool.state == "failed"
    assert "AKS gives no reason" in pool.reason


# --- Azure does not answer --------------------------------------------------------------------------------------------


def test_throttling_is_waited_out(aks: AksPools, azure: Azure, steady: SteadyClock) -> None:
    azure.faults = [Fault("PUT", 429, "TooManyRequests", times=5, headers={"Retry-After": "7"})]
    assert aks.create(NAME, LARGE, REQUEST, RECORD).record == RECORD
    assert steady.passed == 35


def test_the_sdk_does_not_wait_for_another_operation(aks: AksPools, azure: Azure, steady: SteadyClock) -> None:
    """The run does, and says so."""
    busy = "Another agentpool operation (np1 - Creating) is in progress"
    azure.faults = [Fault("PUT", 409, "OperationNotAllowed", busy, headers={"Retry-After": "30"})]
    with pytest.raises(CloudError, match="cloud-busy"):
        aks.create(NAME, LARGE, REQUEST, RECORD)
    assert steady.passed == 0


def test_an_hour_is_not_waited_for(aks: AksPools, azure: Azure, steady: SteadyClock) -> None:
    azure.faults = [Fault("PUT", 429, "TooManyRequests", "wait", headers={"Retry-After": "3600"})]
    with pytest.raises(CloudError, match="429 TooManyRequests: wait"):
        aks.create(NAME, LARGE, REQUEST, RECORD)
    assert steady.passed == 0


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize(
    "fault", [Fault("", 500, "InternalServerError"), Fault("", 503, "ServiceUnavailable"), Fault("", cut="before")]
)
def test_an_azure_that_is_down_is_a_cloud_error(aks: AksPools, azure: Azure, method: str, fault: Fault) -> None:
    pool = ready(aks)
    azure.faults = [replace(fault, method=method, times=99)]
    do = {"GET": lambda: aks.look(NAME), "PUT": lambda: aks.mark(pool, KEPT), "DELETE": lambda: aks.delete(pool)}
    before = azure.count(method)
    with pytest.raises(CloudError):
        do[method]()
    assert azure.count(method) - before >= 4


@pytest.mark.parametrize(
    "raw",
    [
        b"<html>",
        b"[]",
        b"7",
        b"null",
        b'{"value": 3}',
        b'{"value": [3]}',
        b'{"value": [{"properties": 3}]}',
        b'{"value": [{"name": "a", "properties": {"tags": 3}}]}',
    ],
)
def test_an_answer_that_makes_no_sense_is_a_cloud_error(aks: AksPools, azure: Azure, raw: bytes) -> None:
    azure.faults = [Fault("GET", 200, raw=raw)]
    with pytest.raises(CloudError, match="cloud-unavailable"):
        aks.pools()


# --- marks ------------------------------------------------------------------------------------------------------------


def test_a_mark_changes_the_tags_and_nothing_else(aks: AksPools, azure: Azure) -> None:
    pool = ready(aks)
    azure.change(NAME, tags={**RECORD.as_tags(), "cost-center": "42"})
    before = dict(azure.pools[NAME].body["properties"])
    looked_at = aks.look(NAME)
    assert looked_at is not None
    marked = aks.mark(looked_at, KEPT)
    assert marked.record == KEPT
    assert marked.version != pool.version
    azure.settle()
    after = azure.pools[NAME].body["properties"]
    assert after == {**before, "tags": {**KEPT.as_tags(), "cost-center": "42"}}


def test_a_spot_pool_can_be_marked(aks: AksPools, azure: Azure) -> None:
    """AKS adds a label of its own, which comes back with the rest."""
    aks.create(NAME, SPOT, REQUEST, RECORD)
    pool = aks.look(NAME)
    assert pool is not None
    assert aks.mark(pool, KEPT).record == KEPT


def test_a_mark_is_lost_when_somebody_has_changed_the_record(aks: AksPools, azure: Azure) -> None:
    pool = ready(aks)
    azure.change(NAME, tags=replace(RECORD, owner="another").as_tags())
    with pytest.raises(LeaseLostError):
        aks.mark(pool, KEPT)
    assert azure.pools[NAME].body["properties"]["tags"]["kaito-flows-owner"] == "another"


def test_a_mark_is_lost_when_the_pool_is_gone(aks: AksPools, azure: Azure) -> None:
    pool = ready(aks)
    azure.pools.clear()
    with pytest.raises(LeaseLostError):
        aks.mark(pool, KEPT)
    assert azure.pools == {}


def test_two_who_mark_the_same_pool_do_not_both_have_it(aks: AksPools, azure: Azure) -> None:
    pool = ready(aks)
    other = AksPools.connect(Settings())
    other.mark(pool, replace(RECORD, holder=replace(RECORD.holder, run_id="run-2")))
    with pytest.raises(LeaseLostError):
        aks.mark(pool, replace(RECORD, holder=replace(RECORD.holder, run_id="run-3")))
    looked_at = aks.look(NAME)
    assert looked_at is not None
    assert looked_at.record.holder.run_id == "run-2"


def test_what_aks_changes_itself_does_not_lose_a_mark(aks: AksPools, azure: Azure) -> None:
    pool = ready(aks)
    azure.change(NAME, nodeImageVersion="AKSUbuntu-2204gen2containerd-202612.01.0")
    assert aks.mark(pool, KEPT).record == KEPT


def test_a_mark_whose_answer_was_lost_is_not_a_loss(aks: AksPools, azure: Azure, steady: SteadyClock) -> None:
    pool = ready(aks)
    azure.update_seconds = 600
    azure.faults = [Fault("PUT", cut="after")]
    assert aks.mark(pool, KEPT).record == KEPT
    assert steady.passed < 10


def test_a_mark_waits_for_another_operation(aks: AksPools, azure: Azure, steady: SteadyClock) -> None:
    azure.update_seconds = 15
    pool = ready(aks)
    again = aks.mark(aks.mark(pool, KEPT), RECORD)
    assert again.record == RECORD
    assert 15 <= steady.passed <= 25


def test_a_mark_does_not_wait_for_ever(aks: AksPools, azure: Azure) -> None:
    azure.update_seconds = 600
    pool = aks.mark(ready(aks), KEPT)
    with pytest.raises(CloudError, match="cloud-busy"):
        aks.mark(pool, RECORD)


# --- deletes ----------------------------------------------------------------------------------------------------------


def test_a_delete_is_asked_for_and_not_waited_for(aks: AksPools, azure: Azure, steady: SteadyClock) -> None:
    azure.delete_seconds = 300
    pool = ready(aks)
    aks.delete(pool)
    assert azure.state(NAME) == "Deleting"
    assert azure.queries[0]["ignore-pod-disruption-budget"] == "true"
    looked_at = aks.look(NAME)
    assert looked_at is not None
    assert looked_at.state == "deleting"
    aks.delete(pool)  # on its way
    assert steady.passed == 0
    steady.sleep(300)
    assert aks.look(NAME) is None
    aks.delete(pool)  # gone
    assert azure.usages[A100_FAMILY] == [0, 48]


def test_a_pool_that_somebody_has_changed_is_not_deleted(aks: AksPools, azure: Azure) -> None:
    pool = ready(aks)
    azure.change(NAME, tags={"team": "billing"})
    with pytest.raises(LeaseLostError):
        aks.delete(pool)
    assert azure.state(NAME) == "Succeeded"


def test_a_pool_whose_lease_was_extended_meanwhile_is_not_deleted(aks: AksPools, azure: Azure) -> None:
    pool = ready(aks)
    AksPools.connect(Settings()).mark(pool, replace(RECORD, expires_at=THEN + timedelta(hours=2)))
    with pytest.raises(LeaseLostError):
        aks.delete(pool)


def test_what_aks_changes_itself_does_not_keep_a_pool(aks: AksPools, azure: Azure) -> None:
    pool = ready(aks)
    azure.change(NAME, nodeImageVersion="AKSUbuntu-2204gen2containerd-202612.01.0")
    aks.delete(pool)
    assert azure.state(NAME) == "Gone"


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_delete_that_fails_twice_is_asked_for_again(aks: AksPools, azure: Azure, cut: str) -> None:
    pool = ready(aks)
    azure.delete_seconds = 300
    azure.faults = [Fault("DELETE", 500, "InternalServerError"), Fault("DELETE", cut=cut)]
    aks.delete(pool)
    assert azure.state(NAME) == "Deleting"


def test_a_delete_waits_for_another_operation(aks: AksPools, azure: Azure, steady: SteadyClock) -> None:
    azure.update_seconds = 15
    aks.delete(aks.mark(ready(aks), KEPT))
    assert azure.state(NAME) == "Gone"


def test_a_delete_of_a_pool_that_is_being_made_gives_that_up_first(
    aks: AksPools, azure: Azure, steady: SteadyClock
) -> None:
    azure.boot_seconds, azure.abort_seconds = 3600, 15
    pool = aks.create(NAME, LARGE, REQUEST, RECORD)
    aks.delete(pool)
    assert azure.count("POST") == 1
    assert azure.state(NAME) == "Gone"
    assert steady.passed < 60


def test_a_delete_says_when_it_must_be_tried_later(aks: AksPools, azure: Azure) -> None:
    azure.update_seconds = 600
    pool = aks.mark(ready(aks), KEPT)
    with pytest.raises(CloudError, match="cloud-busy"):
        aks.delete(pool)


# --- time and identity ------------------------------------------------------------------------------------------------


def test_the_time_is_azures(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays so between two answers, whatever this machine's clock says."""
    azure.wall = lambda: time.monotonic() + 2_000_000_000
    aks = AksPools.connect(Settings())
    first = aks.now()
    assert abs(first.timestamp() - azure.wall()) < 2
    calls = azure.count()
    monkeypatch.setattr(
        "kaito_flows.nodes.azure.arm.time", type("Later", (), {"monotonic": lambda: time.monotonic() + 60})
    )
    assert 59 < (aks.now() - first).total_seconds() < 63
    assert azure.count() == calls == 1


def test_the_settings_say_which_cluster(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAITO_FLOWS_AKS_CLUSTER")
    monkeypatch.setenv("KAITO_FLOWS_AKS_RESOURCE_GROUP", "")
    with pytest.raises(InputError, match="KAITO_FLOWS_AKS_RESOURCE_GROUP, KAITO_FLOWS_AKS_CLUSTER") as raised:
        AksPools.connect(Settings())
    assert raised.value.code == "no-cloud"


def test_a_cluster_that_is_not_there_is_told(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_FLOWS_AKS_CLUSTER", "typo")
    aks = AksPools.connect(Settings())
    gone = Pool(NAME, LARGE, 1, "ready", RECORD, version='"1"')
    asks = (aks.pools, lambda: aks.look(NAME), lambda: aks.against([LARGE], 1), lambda: aks.delete(gone))
    for ask in asks:
        with pytest.raises(InputError, match="typo") as raised:
            ask()
        assert raised.value.code == "no-cloud"


def test_a_pod_that_azure_does_not_know_is_told(azure: Azure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("another cluster's word")
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "WorkloadIdentityCredential")
    with pytest.raises(AccessError, match=r"AADSTS700213.*workload identity"):
        AksPools.connect(Settings()).pools()


def test_the_stand_in_runs_as_a_process(tmp_path: Path) -> None:
    """As later tests need it, whose flows are killed."""
    program = Path(__file__).parents[2] / "arm.py"
    process = subprocess.Popen([sys.executable, str(program), str(tmp_path)])
    try:
        until = time.monotonic() + 30
        while not (tmp_path / "environment.json").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        environment = json.loads((tmp_path / "environment.json").read_text())
        code = "from kaito_flows.nodes.aks import AksPools; from kaito_flows.settings import Settings; " + (
            "print(AksPools.connect(Settings()).pools())"
        )
        asked = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert asked.stdout.strip() == "[]", asked.stderr
    finally:
        process.terminate()
        process.wait()
