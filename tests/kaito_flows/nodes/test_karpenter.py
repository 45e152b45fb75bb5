"""Nodes rented by NodeClaims of a real API server: leased, told of, refused, taken over, given back.

What Karpenter would do, `provisioner.py` does; sizes and clouds are made up, schemas and conditions are not.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from provisioner import Provisioner, Refusal
from waiting import eventually

from kaito_flows.cluster.gateway import Cluster
from kaito_flows.errors import AccessError, InputError, LeaseLostError, SchedulingError
from kaito_flows.nodes import renting
from kaito_flows.nodes.base import Holder, NodeRequest, Offer
from kaito_flows.nodes.claims import MACHINE, NODE_CLAIM, manifest
from kaito_flows.nodes.karpenter import NodeClaims
from kaito_flows.nodes.node_classes import NodeClass
from kaito_flows.nodes.pools import LeaseRecord, pool_name
from kaito_flows.nodes.renting import RentedNodes
from kaito_flows.settings import Settings

pytestmark = pytest.mark.cluster

A100, H100 = Offer("Standard_NC24ads_A100_v4", 1), Offer("Standard_NC40ads_H100_v5", 1)
SPOT = Offer("Standard_NC24ads_A100_v4", 1, spot=True)
NO_QUOTA = Refusal("SubscriptionQuotaReached", "subscription level on-demand vCPU quota for it has been reached")
NO_CAPACITY = Refusal(
    "InsufficientCapacityError", "creating instance, unable to allocate resources in the selected zone", removes=True
)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renting, "_NODE_SECONDS", 0.05)
    monkeypatch.setattr(renting, "_CAPACITY_SECONDS", 0.1)
    monkeypatch.setattr(renting, "_BUSY_SECONDS", 0.1)
    monkeypatch.setattr(NodeClaims, "look_seconds", 0.05)


class Office:
    """Rents for one installation, whose name is the namespace's, so that tests beside this one are another's."""

    def __init__(self, space: Cluster, node_class: str) -> None:
        self.space, self.node_class = space, node_class
        self.told: list[tuple[str, dict[str, Any]]] = []

    def rented(self, **settings: Any) -> RentedNodes:
        given = {"node_ready_seconds": 30, "capacity_seconds": 0, "lease_minutes": 60}
        given |= {"owner": self.space.namespace, "karpenter_node_class": self.node_class} | settings
        made = Settings(**given)
        return RentedNodes(NodeClaims(self.space, made), self.space, made)

    def request(self, run_id: str, *offers: Offer, workspace: str = "phi-3", count: int = 1) -> NodeRequest:
        found = {"namespace": self.space.namespace, "run_id": run_id, "offers": offers or (A100,)}
        return NodeRequest(workspace, gpus=1, count=count, disk_bytes=150 * 1024**3, **found)  # type: ignore[arg-type]

    def tell(self, what: str, facts: dict[str, Any]) -> None:
        self.told.append((what, facts))


@pytest.fixture
def office(space: Cluster, node_class: str) -> Office:
    return Office(space, node_class)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NODE_CLAIM, MACHINE])
def test_the_api_server_takes_a_claim_and_drops_nothing_of_it(space: Cluster, karpenter_crds: None, kind: str) -> None:
    holder, now = Holder(space.namespace, "w", "r"), datetime.now(UTC)
    request = NodeRequest("w", namespace=space.namespace, gpus=1, disk_bytes=2**38)
    record = LeaseRecord("kaito-flows", holder, "leased", now, now)
    name = pool_name(space.namespace, holder, A100)
    wanted = manifest(kind, name, name, A100, request, record, NodeClass("AKSNodeClass", "default"), "eastus-1")
    made = space.create(wanted)
    try:
        assert made["spec"] == wanted["spec"]
        assert made["metadata"]["labels"] == wanted["metadata"]["labels"]
        assert made["metadata"]["annotations"] == wanted["metadata"]["annotations"]
    finally:
        space.delete(kind, name)


def test_the_api_server_refuses_a_claim_that_is_none(space: Cluster, karpenter_crds: None) -> None:
    with pytest.raises(InputError, match=r"nodeClassRef"):
        space.create({"apiVersion": "karpenter.sh/v1", "kind": "NodeClaim", "metadata": {"name": "x"}, "spec": {}})


# --- lease ------------------------------------------------------------------------------------------------------------


def test_a_lease_tells_each_wait_in_its_order_and_ends_with_the_node(office: Office, provisioner: Provisioner) -> None:
    provisioner.hold("")
    steps = [
        ("no node has joined the cluster: not launched: AwaitingReconciliation", "launched"),
        ("no node has joined the cluster: not registered: NodeNotFound: Node not registered with cluster", "joined"),
        ("{name}: not Ready: container runtime network not ready", "node ready"),
        ("{name}: no device plugin has registered nvidia.com/gpu: the driver is being installed", "gpus"),
    ]
    request = office.request("run-1")
    name = pool_name(office.space.namespace, request.holder, A100)
    left = [(reason.format(name=name), step) for reason, step in steps]

    def tell(what: str, facts: dict[str, Any]) -> None:
        office.tell(what, facts)
        if left and facts.get("reason", "").startswith(left[0][0]):
            provisioner.hold(left.pop(0)[1])

    lease = office.rented().lease(request, tell)
    assert not left, "every wait was told, and in this order"
    assert lease.nodes == (name,) and lease.name == name
    assert (lease.provider, lease.instance_type, lease.spot) == ("karpenter", A100.instance_type, False)
    assert lease.created_at and lease.ready_at and lease.expires_at
    assert lease.created_at <= lease.ready_at < lease.expires_at
    assert office.rented().alive(lease)
    [claim] = provisioner.claims()
    assert claim["metadata"]["annotations"]["kaito-flows-run"] == "run-1"


def test_a_lease_of_two_nodes_is_ready_when_both_are(office: Office, provisioner: Provisioner) -> None:
    rented = office.rented()
    lease = rented.lease(office.request("run-1", count=2), office.tell)
    assert len(set(lease.nodes)) == 2
    assert {node["metadata"]["name"] for node in provisioner.nodes()} == set(lease.nodes)
    [pool] = eventually(lambda: [pool for pool in rented.pools() if pool.state == "ready"])
    assert pool.count == 2
    rented.release(office.request("run-1").holder)
    assert eventually(lambda: not provisioner.claims() and not provisioner.nodes())


def test_machines_are_used_where_the_cluster_serves_no_node_claims(
    space: Cluster, karpenter_crds: None, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Cluster.served
    monkeypatch.setattr(Cluster, "served", lambda self, kind: [] if kind == "NodeClaim" else served(self, kind))
    rented = office.rented()
    assert rented.check(office.request("run-1", SPOT, A100)) == {str(SPOT): "gpu-provisioner makes no spot nodes"}
    with Provisioner(space, MACHINE) as provisioner:
        lease = rented.lease(office.request("run-1", SPOT, A100), office.tell)
        [machine] = provisioner.claims()
        assert machine["kind"] == "Machine" and lease.nodes == (machine["metadata"]["name"],)
        provisioner.refusals = {H100.instance_type: Refusal("LaunchFailed", "creating instance, no quota is left")}
        with pytest.raises(SchedulingError, match="no-quota: not launched: LaunchFailed: creating instance"):
            office.rented().lease(office.request("run-2", H100), office.tell)
        rented.release(office.request("run-1").holder)
        assert eventually(lambda: not provisioner.claims() and not provisioner.nodes())


# --- fallback ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "code", "reason"),
    [
        (NO_QUOTA, "no-quota", "not launched: SubscriptionQuotaReached: subscription level on-demand vCPU quota"),
        (NO_CAPACITY, "no-capacity", "InsufficientCapacityError: creating instance, unable to allocate resources"),
        (
            Refusal("NodeClassNotReady", "the identity may not join subnets", removes=True),
            "node-class-not-ready",
            "NodeClassNotReady: the identity may not join subnets",
        ),
        (
            Refusal("LaunchFailed", "VM size is not allowed in your subscription"),
            "size-not-allowed",
            "not launched: LaunchFailed: VM size is not allowed in your subscription",
        ),
    ],
)
def test_a_size_that_is_refused_is_moved_on_from_with_karpenters_reason(
    office: Office, provisioner: Provisioner, refusal: Refusal, code: str, reason: str
) -> None:
    provisioner.refusals = {H100.instance_type: refusal}
    lease = office.rented().lease(office.request("run-1", H100, A100), office.tell)
    assert lease.instance_type == A100.instance_type
    [moved] = [facts for what, facts in office.told if what == "moving on"]
    assert (moved["offer"], moved["code"]) == (str(H100), code)
    assert moved["reason"].startswith(reason)
    assert eventually(lambda: [claim["metadata"]["name"] for claim in provisioner.claims()] == [lease.name])


def test_without_spot_nodes_the_next_offer_on_demand_is_taken(office: Office, provisioner: Provisioner) -> None:
    provisioner.refusals = {f"{SPOT.instance_type} spot": NO_CAPACITY}
    lease = office.rented().lease(office.request("run-1", SPOT, A100), office.tell)
    assert not lease.spot
    assert [facts["offer"] for what, facts in office.told if what == "trying"] == [str(SPOT), str(A100)]


def test_a_spot_node_is_asked_for_as_one(office: Office, provisioner: Provisioner) -> None:
    lease = office.rented().lease(office.request("run-1", SPOT, A100), office.tell)
    assert lease.spot
    [node] = provisioner.nodes()
    assert node["metadata"]["labels"]["karpenter.sh/capacity-type"] == "spot"


def test_when_every_offer_is_refused_it_is_said_of_each_why_and_nothing_is_left(
    office: Office, provisioner: Provisioner
) -> None:
    provisioner.refusals = {H100.instance_type: NO_CAPACITY, A100.instance_type: NO_QUOTA}
    with pytest.raises(SchedulingError, match=r"no node could be rented: .*H100.*no-capacity: .*A100.*no-quota: "):
        office.rented().lease(office.request("run-1", H100, A100), office.tell)
    assert eventually(lambda: not provisioner.claims())


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("", "not launched: AwaitingReconciliation"),
        ("launched", "not registered: NodeNotFound"),
        ("joined", "not Ready: container runtime network not ready"),
        ("node ready", "no device plugin has registered nvidia.com/gpu"),
    ],
)
def test_a_node_that_is_stuck_is_given_back_after_the_limit_with_what_it_waited_for(
    office: Office, provisioner: Provisioner, step: str, reason: str
) -> None:
    provisioner.hold(step)
    with pytest.raises(SchedulingError, match=f"node-not-ready: not ready after 0 min: .*{reason}"):
        office.rented(node_ready_seconds=1.5).lease(office.request("run-1"), office.tell)
    assert eventually(lambda: not provisioner.claims() and not provisioner.nodes())


def test_one_claim_that_is_refused_fails_the_pool_of_two_and_the_other_goes_too(
    office: Office, provisioner: Provisioner
) -> None:
    request = office.request("run-1", count=2)
    first = pool_name(office.space.namespace, request.holder, A100)
    provisioner.refused_names = {first: NO_QUOTA}
    with pytest.raises(SchedulingError, match="no-quota: not launched: SubscriptionQuotaReached"):
        office.rented().lease(request, office.tell)
    assert eventually(lambda: not provisioner.claims() and not provisioner.nodes())


def test_one_claim_that_karpenter_removes_fails_the_pool_of_two_and_the_other_goes_too(
    office: Office, provisioner: Provisioner
) -> None:
    request = office.request("run-1", count=2)
    first = pool_name(office.space.namespace, request.holder, A100)
    provisioner.refused_names = {first: NO_CAPACITY}
    with pytest.raises(SchedulingError, match="InsufficientCapacityError: creating instance, unable to allocate"):
        office.rented().lease(request, office.tell)
    assert eventually(lambda: not provisioner.claims() and not provisioner.nodes())


def test_a_claim_that_somebody_removes_while_it_is_waited_for_ends_the_wait(
    office: Office, provisioner: Provisioner
) -> None:
    provisioner.hold("launched")
    removed = threading.Event()

    def tell(what: str, facts: dict[str, Any]) -> None:
        if "NodeNotFound" in facts.get("reason", "") and not removed.is_set():
            removed.set()
            office.space.delete("NodeClaim", facts["pool"])

    with pytest.raises(SchedulingError, match="node-removed: somebody has removed the pool"):
        office.rented().lease(office.request("run-1"), tell)


def test_who_may_not_read_why_a_claim_is_gone_is_told_so(
    office: Office, provisioner: Provisioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Cluster, target: Any) -> Any:
        raise AccessError("flow may not list events in namespace 'default'")

    monkeypatch.setattr(Cluster, "events", refuse)
    provisioner.refusals = {A100.instance_type: NO_CAPACITY}
    with pytest.raises(SchedulingError, match="node-removed: it is gone, and its Events cannot be read: flow may not"):
        office.rented().lease(office.request("run-1"), office.tell)


# --- who owns it ------------------------------------------------------------------------------------------------------


def test_a_run_that_comes_again_finds_its_node(office: Office, provisioner: Provisioner) -> None:
    first = office.rented().lease(office.request("run-1"), office.tell)
    again = office.rented().lease(office.request("run-1"), office.tell)
    assert (again.nodes, again.created_at, again.expires_at) == (first.nodes, first.created_at, first.expires_at)
    assert provisioner.launched == [first.name]


def test_a_run_that_comes_again_while_its_node_is_made_waits_for_that_one(
    office: Office, provisioner: Provisioner
) -> None:
    provisioner.hold("launched")
    killed = office.rented(node_ready_seconds=1)
    request = office.request("run-1", count=2)
    now = killed.cloud.now()
    record = LeaseRecord(office.space.namespace, request.holder, "leased", now, now + timedelta(hours=1))
    made = killed.cloud.create(pool_name(office.space.namespace, request.holder, A100), A100, request, record)
    assert made.state == "creating" and made.record.as_tags() == record.as_tags()
    provisioner.hold("gpus")
    lease = office.rented().lease(request, office.tell)
    assert lease.name == made.name
    assert len(provisioner.launched) == 2


def test_what_a_crash_has_left_of_a_pool_of_two_is_not_waited_for(office: Office, provisioner: Provisioner) -> None:
    request = office.request("run-1", count=2)
    cloud, now = office.rented().cloud, datetime.now(UTC)
    name = pool_name(office.space.namespace, request.holder, A100)
    record = LeaseRecord(office.space.namespace, request.holder, "leased", now, now + timedelta(hours=1))
    node_class = NodeClass(*office.node_class.split("/"))
    office.space.create(manifest(NODE_CLAIM, name, name, A100, request, record, node_class))
    half = cloud.look(name)
    assert half is not None
    assert (half.state, half.reason) == ("failed", "1 of its 2 claims are gone")
    lease = office.rented().lease(request, office.tell)
    assert lease.name != name and len(lease.nodes) == 2
    assert eventually(lambda: cloud.look(name) is None)


def test_two_runs_that_race_get_a_node_each(office: Office, provisioner: Provisioner) -> None:
    leases: dict[str, Any] = {}

    def run(run_id: str) -> None:
        leases[run_id] = office.rented().lease(office.request(run_id), office.tell)

    racers = [threading.Thread(target=run, args=(f"run-{i}",)) for i in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert leases["run-0"].nodes != leases["run-1"].nodes
    assert len(provisioner.claims()) == 2


def test_two_processes_of_one_run_share_its_node(office: Office, provisioner: Provisioner) -> None:
    leases = []
    racers = [
        threading.Thread(target=lambda: leases.append(office.rented().lease(office.request("run-1"), office.tell)))
        for _ in range(2)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert leases[0].nodes == leases[1].nodes
    assert len(provisioner.launched) == 1


def test_a_kept_node_goes_to_one_of_the_next_runs_only(office: Office, provisioner: Provisioner) -> None:
    first = office.rented(grace_seconds=600)
    lease = first.lease(office.request("run-1"), office.tell)
    eventually(lambda: [pool for pool in first.pools() if pool.state == "ready"])
    first.release(office.request("run-1").holder, keep=True)
    [kept] = first.pools()
    assert (kept.record.state, kept.name) == ("kept", lease.name)
    later = [office.rented() for _ in range(2)]
    seen = [rented.cloud.pools()[0] for rented in later]
    taken = [LeaseRecord(r.owner, Holder(r.holder.namespace, r.holder.workspace, f"run-{i}"), "leased", r.created_at,
                         r.expires_at) for i, r in enumerate([kept.record] * 2)]  # fmt: skip
    assert later[0].cloud.mark(seen[0], taken[0]).record == taken[0]
    with pytest.raises(LeaseLostError, match=f"NodeClaim {lease.name}: somebody has changed or removed it"):
        later[1].cloud.mark(seen[1], taken[1])
    with pytest.raises(LeaseLostError):
        later[1].cloud.delete(seen[1])
    assert office.rented().pools()[0].record == taken[0]


def test_of_two_runs_that_race_for_a_kept_node_one_gets_it_and_the_other_a_new_one(
    office: Office, provisioner: Provisioner
) -> None:
    first = office.rented(grace_seconds=600)
    kept = first.lease(office.request("run-1"), office.tell)
    eventually(lambda: [pool for pool in first.pools() if pool.state == "ready"])
    first.release(office.request("run-1").holder, keep=True)
    nodes: list[tuple[str, ...]] = []
    racers = [
        threading.Thread(
            target=lambda i=i: nodes.append(office.rented().lease(office.request(f"r{i}"), office.tell).nodes)
        )
        for i in range(3)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(set(nodes)) == 3 and nodes.count(kept.nodes) == 1


def test_the_workspaces_next_run_takes_the_node_that_was_kept_for_it(office: Office, provisioner: Provisioner) -> None:
    first = office.rented(grace_seconds=600)
    lease = first.lease(office.request("run-1"), office.tell)
    eventually(lambda: [pool for pool in first.pools() if pool.state == "ready"])
    first.release(office.request("run-1").holder, keep=True)
    other = office.rented().lease(office.request("run-2", workspace="mistral"), office.tell)
    assert other.nodes != lease.nodes, "it was not kept for another Workspace"
    again = office.rented().lease(office.request("run-3"), office.tell)
    assert again.nodes == lease.nodes
    assert again.created_at and lease.created_at and again.created_at >= lease.created_at
    first.release(office.request("run-1").holder)
    assert first.alive(again), "it is no longer the first run's to release"


def test_a_claim_of_that_name_which_somebody_else_made_is_never_touched(
    office: Office, provisioner: Provisioner
) -> None:
    request = office.request("run-1")
    name = pool_name(office.space.namespace, request.holder, A100)
    theirs = {"karpenter.sh/nodepool": "kaito", "kaito.sh/workspacenamespace": office.space.namespace}
    node_class = {"group": "karpenter.azure.com", "kind": "AKSNodeClass", "name": "default"}
    size = {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": [A100.instance_type]}
    made = office.space.create(
        {
            "apiVersion": "karpenter.sh/v1",
            "kind": "NodeClaim",
            "metadata": {"name": name, "labels": theirs},
            "spec": {"nodeClassRef": node_class, "requirements": [size]},
        }
    )
    with pytest.raises(InputError, match=f"pool-taken: NodeClaim {name}: there is a claim of that name"):
        office.rented().lease(request, office.tell)
    office.rented().release(Holder(office.space.namespace, "phi-3"))
    still = office.space.get("NodeClaim", name)
    assert still is not None and still["metadata"]["uid"] == made["metadata"]["uid"]
    assert "deletionTimestamp" not in still["metadata"]
    assert office.rented().pools() == []
    office.space.delete("NodeClaim", name)


def test_karpenters_own_writing_does_not_cost_us_the_lease(office: Office, provisioner: Provisioner) -> None:
    rented = office.rented()
    lease = rented.lease(office.request("run-1"), office.tell)
    pool = rented.cloud.look(lease.name)
    assert pool is not None

    class Writing(Cluster):
        """Karpenter writes between our look and our write, once."""

        def patch(self, kind: str, name: str, changes: Any, subresource: str = "") -> Any:
            self._interfere(kind, name)
            return super().patch(kind, name, changes, subresource)

        def delete(self, kind: str, name: str, **options: Any) -> bool:
            self._interfere(kind, name)
            return super().delete(kind, name, **options)

        def _interfere(self, kind: str, name: str) -> None:
            if not interfered:
                interfered.append(name)
                office.space.patch(kind, name, {"metadata": {"annotations": {"karpenter.sh/x": "1"}}})

    settings = Settings(karpenter_node_class=office.node_class)
    cloud = NodeClaims(Writing(office.space.connection, office.space.namespace), settings)
    interfered: list[str] = []
    marked = cloud.mark(pool, LeaseRecord(**{**_fields(pool.record), "state": "serving"}))
    assert interfered and marked.record.state == "serving" and marked.version != pool.version
    interfered.clear()
    cloud.delete(marked)
    assert interfered
    assert eventually(lambda: not provisioner.claims())


def _fields(record: LeaseRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("owner", "holder", "state", "created_at", "expires_at")}


# --- while it is held, and giving back --------------------------------------------------------------------------------


def test_a_lease_is_renewed_when_a_quarter_of_the_settings_is_left(office: Office, provisioner: Provisioner) -> None:
    rented = office.rented(lease_minutes=5)
    lease = rented.lease(office.request("run-1"), office.tell)
    assert rented.renew(lease) is lease, "it does not end soon"
    longer = office.rented(lease_minutes=60).renew(lease)
    assert longer.expires_at and lease.expires_at
    assert longer.expires_at - lease.expires_at > timedelta(minutes=50)
    [pool] = rented.pools()
    assert pool.record.expires_at == longer.expires_at.replace(microsecond=0)


def test_a_lease_whose_node_is_gone_is_lost(office: Office, provisioner: Provisioner) -> None:
    rented = office.rented(lease_minutes=60)
    lease = rented.lease(office.request("run-1"), office.tell)
    office.space.delete("NodeClaim", lease.name)
    assert eventually(lambda: not provisioner.nodes())
    assert not rented.alive(lease)
    with pytest.raises(LeaseLostError):
        office.rented(lease_minutes=300).renew(lease)


def test_a_released_node_is_gone_and_a_second_release_is_no_fault(office: Office, provisioner: Provisioner) -> None:
    rented, holder = office.rented(), office.request("run-1").holder
    lease = rented.lease(office.request("run-1"), office.tell)
    other = rented.lease(office.request("run-2"), office.tell)
    rented.release(holder)
    rented.release(holder)
    assert eventually(lambda: [node["metadata"]["name"] for node in provisioner.nodes()] == list(other.nodes))
    assert rented.cloud.look(lease.name) is None
    rented.release(Holder(holder.namespace, holder.workspace))
    assert eventually(lambda: not provisioner.claims() and not provisioner.nodes())


def test_a_pool_stays_deleting_as_long_as_its_node_is_there(office: Office, provisioner: Provisioner) -> None:
    rented = office.rented()
    lease = rented.lease(office.request("run-1"), office.tell)
    blocked = {"metadata": {"finalizers": ["kaito-flows-test/block", "karpenter.sh/termination"]}}
    office.space.patch("NodeClaim", lease.name, blocked)
    rented.release(office.request("run-1").holder)
    [pool] = rented.pools()
    found = office.rented().cloud.look(lease.name)
    assert pool.state == "deleting" and found is not None and found.state == "deleting"
    again = office.rented().lease(office.request("run-1"), office.tell)
    assert again.name != lease.name, "a node on its way out is not used again"
    office.space.patch("NodeClaim", lease.name, {"metadata": {"finalizers": None}})


def test_of_a_pool_of_two_that_was_deleted_by_half_the_rest_is_deleted_too(
    office: Office, provisioner: Provisioner
) -> None:
    rented = office.rented()
    lease = rented.lease(office.request("run-1", count=2), office.tell)
    blocked = {"metadata": {"finalizers": ["kaito-flows-test/block", "karpenter.sh/termination"]}}
    office.space.patch("NodeClaim", lease.name, blocked)
    office.space.delete("NodeClaim", lease.name)
    [pool] = rented.pools()
    assert (pool.state, pool.reason) == ("failed", "1 of its 2 claims are gone")
    rented.release(office.request("run-1").holder)
    assert eventually(lambda: [pool.state for pool in rented.pools()] == ["deleting"])
    office.space.patch("NodeClaim", lease.name, {"metadata": {"finalizers": None}})


def test_a_node_that_is_handed_over_serves_and_the_service_gives_back_the_one_before(
    office: Office, provisioner: Provisioner
) -> None:
    rented = office.rented()
    before = rented.lease(office.request("run-1"), office.tell)
    service = Holder(office.space.namespace, "phi-3")
    rented.hand_over(service, before.nodes)
    rented.release(office.request("run-1").holder)
    assert rented.alive(before), "what serves is not the run's to release"
    after = rented.lease(office.request("run-2"), office.tell)
    rented.hand_over(service, after.nodes)
    rented.hand_over(service, after.nodes)
    assert eventually(lambda: [node["metadata"]["name"] for node in provisioner.nodes()] == list(after.nodes))
    rented.release(service)
    assert eventually(lambda: not provisioner.nodes())


# --- before anything is made ------------------------------------------------------------------------------------------


def test_karpenter_tells_nothing_against_a_size_before_it_is_asked_for(office: Office, karpenter_crds: None) -> None:
    assert office.rented().check(office.request("run-1", SPOT, Offer("no-such-size", zone="1"))) == {}


def test_gpu_provisioner_is_asked_for_no_spot_node_and_no_zone(office: Office, karpenter_crds: None) -> None:
    rented = office.rented(karpenter_node_class="KaitoNodeClass/default")
    zoned = Offer(A100.instance_type, 1, zone="1")
    against = rented.check(office.request("run-1", SPOT, zoned, A100))
    assert set(against) == {str(SPOT), str(zoned)}
    with pytest.raises(SchedulingError, match="makes no spot nodes"):
        office.rented(karpenter_node_class="KaitoNodeClass/default").check(office.request("run-1", SPOT))


def test_that_karpenter_is_missing_is_said_before_anything_is_made(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "served", lambda self, kind: [])
    for ask in (lambda: office.rented().check(office.request("run-1")), office.rented().pools):
        with pytest.raises(InputError, match=r"karpenter-not-installed: .*no NodeClaims of karpenter\.sh/v1"):
            ask()


def test_that_the_node_class_is_missing_is_said_before_anything_is_made(office: Office, karpenter_crds: None) -> None:
    rented = office.rented(karpenter_node_class="AKSNodeClass/none")
    with pytest.raises(InputError, match=r"node-class-missing: .*there is no AKSNodeClass/none"):
        rented.check(office.request("run-1"))


def test_the_time_is_the_api_servers(office: Office) -> None:
    now = office.rented().cloud.now()
    assert now.tzinfo is UTC and abs(now - datetime.now(UTC)) < timedelta(seconds=30)
