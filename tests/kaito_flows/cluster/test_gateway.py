"""Objects in a real cluster: applied, ensured, replaced, deleted; and what it refuses, in one line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kaito_flows.cluster import gateway
from kaito_flows.cluster.ensuring import spec_hash
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.labels import SPEC_HASH
from kaito_flows.cluster.refusals import ConflictError
from kaito_flows.errors import AccessError, ClusterError, InputError

NAMESPACE = "gateway-objects"
pytestmark = pytest.mark.cluster

Make = Callable[..., dict[str, Any]]


def test_apply_changes_what_it_names_and_takes_back_what_it_no_longer_names(
    space: Cluster, make_config_map: Make
) -> None:
    space.apply(make_config_map("applied", ours="1", dropped="2"))
    space.patch("ConfigMap", "applied", {"data": {"theirs": "3"}})
    space.apply(make_config_map("applied", ours="4"))
    found = space.get("ConfigMap", "applied")
    assert found is not None
    assert found["data"] == {"ours": "4", "theirs": "3"}


def test_what_is_not_there_is_none(space: Cluster) -> None:
    assert space.get("Job", "nothing") is None
    assert space.patch("Job", "nothing", {"metadata": {"labels": {"a": "b"}}}) is None
    assert space.delete("Job", "nothing") is False
    status = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "nothing"}, "status": {"message": "m"}}
    assert space.apply_status(status) is None


def test_the_status_is_applied_apart_from_the_rest(space: Cluster, make_pod: Make) -> None:
    pod = make_pod("status", "true", spec={"schedulerName": "nobody"})
    space.apply(pod)
    condition = {"type": "kaito-flows/Test", "status": "True", "reason": "Told"}
    applied = space.apply_status({**pod, "status": {"conditions": [condition]}})
    assert applied is not None
    assert [c["reason"] for c in applied["status"]["conditions"] if c["type"] == "kaito-flows/Test"] == ["Told"]
    again = space.apply({**pod, "metadata": {"name": "status", "labels": {"a": "b"}}})
    assert "kaito-flows/Test" in {c["type"] for c in again["status"]["conditions"]}
    assert again["spec"]["containers"][0]["command"] == ["sh", "-c", "true"]


def test_what_is_ensured_twice_is_there_once(space: Cluster, make_job: Make) -> None:
    first = space.ensure(make_job("twice"))
    second = space.ensure(make_job("twice"))
    assert (first.outcome, second.outcome) == ("created", "adopted")
    assert first.object["metadata"]["uid"] == second.object["metadata"]["uid"]
    assert second.object["metadata"]["annotations"][SPEC_HASH] == spec_hash(make_job("twice"))


def test_a_job_that_was_made_from_something_else_is_replaced_with_its_pods(space: Cluster, make_job: Make) -> None:
    old = space.ensure(make_job("changed", "sleep 300"))
    for _, job in space.watch("Job", name="changed", timeout_seconds=60):
        if job["status"].get("active"):
            break
    new = space.ensure(make_job("changed", "true"))
    assert new.outcome == "replaced"
    assert new.object["metadata"]["uid"] != old.object["metadata"]["uid"]
    assert space.pods_of(old.object) == []


def test_a_digest_of_the_caller_decides_over_adoption(space: Cluster, make_job: Make) -> None:
    first = space.ensure(make_job("digest", "echo here"), digest="same work")
    second = space.ensure(make_job("digest", "echo there"), digest="same work")
    assert (first.outcome, second.outcome) == ("created", "adopted")


def test_what_somebody_else_made_is_not_replaced(space: Cluster, make_config_map: Make) -> None:
    space.create(make_config_map("theirs", a="1"))
    with pytest.raises(InputError, match=r"name-taken: ConfigMap .*/theirs: .*kubectl delete configmap theirs"):
        space.ensure(make_config_map("theirs", a="2"))
    found = space.get("ConfigMap", "theirs")
    assert found is not None
    assert found["data"] == {"a": "1"}


@pytest.mark.parametrize("before", [False, True], ids=["new", "replaced"])
def test_many_who_ensure_at_once_get_one_object(space: Cluster, make_config_map: Make, before: bool) -> None:
    name = f"at-once-{before}".lower()
    if before:
        space.ensure(make_config_map(name, a="0"))
    barrier, outcomes = threading.Barrier(8), []

    def ensure() -> None:
        barrier.wait()
        outcomes.append(space.ensure(make_config_map(name, a="1")))

    threads = [threading.Thread(target=ensure) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 8
    assert len({made.object["metadata"]["uid"] for made in outcomes}) == 1
    assert sum(made.outcome != "adopted" for made in outcomes) == 1


def test_what_does_not_go_away_is_named_with_what_holds_it(space: Cluster, make_config_map: Make) -> None:
    held = make_config_map("held", a="1")
    held["metadata"]["finalizers"] = ["kaito-flows.test/hold"]
    space.ensure(held)
    with pytest.raises(ClusterError, match=r"deletion-stuck: ConfigMap .*/held: .*kaito-flows.test/hold"):
        space.ensure(make_config_map("held", a="2"), timeout_seconds=1)
    timer = threading.Timer(1.0, space.patch, ("ConfigMap", "held", {"metadata": {"finalizers": None}}))
    timer.start()
    assert space.ensure(make_config_map("held", a="2"), timeout_seconds=30).outcome == "replaced"


def test_deletion_by_uid_leaves_a_namesake(space: Cluster, make_config_map: Make) -> None:
    space.create(make_config_map("namesake"))
    assert space.delete("ConfigMap", "namesake", uid="another") is False
    assert space.get("ConfigMap", "namesake") is not None


def test_deletion_by_labels_takes_those_and_no_others(space: Cluster, make_config_map: Make) -> None:
    for name, app in (("l1", "a"), ("l2", "a"), ("l3", "b")):
        space.create(make_config_map(name, {"app": app}))
    assert space.delete_labelled("ConfigMap", {"app": "a"}) == ["l1", "l2"]
    assert [item["metadata"]["name"] for item in space.list("ConfigMap", labels={"app": "b"})] == ["l3"]
    with pytest.raises(InputError, match="no labels"):
        space.delete_labelled("ConfigMap", {})


def test_a_long_list_comes_in_pages(space: Cluster, make_config_map: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_PAGE", 2)
    for i in range(5):
        space.create(make_config_map(f"page-{i}", {"pages": "yes"}))
    found = space.list("ConfigMap", labels="pages=yes")
    assert [item["metadata"]["name"] for item in found] == [f"page-{i}" for i in range(5)]
    assert {(item["apiVersion"], item["kind"]) for item in found} == {("v1", "ConfigMap")}


def test_what_is_there_cannot_be_created_again(space: Cluster, make_config_map: Make) -> None:
    space.create(make_config_map("again"))
    with pytest.raises(ConflictError, match="already exists"):
        space.create(make_config_map("again"))


def test_a_kind_that_the_cluster_does_not_know_is_told_with_how_to_install_it(space: Cluster) -> None:
    for ask in (lambda: space.list("kaito.sh/v9/Workspace"), lambda: space.get("kaito.sh/v9/Workspace", "w")):
        with pytest.raises(InputError, match=r"crd-not-installed: .*workspaces of kaito.sh/v9 \(kubectl apply -k"):
            ask()


def test_a_namespace_that_is_missing_is_named(space: Cluster, make_config_map: Make) -> None:
    with pytest.raises(InputError, match=r"namespace-not-found: .*'gateway-nowhere'"):
        space.within("gateway-nowhere").create(make_config_map("a"))


def test_a_manifest_that_is_not_valid_is_refused_in_one_line(space: Cluster, make_job: Make) -> None:
    job = make_job("invalid")
    job["spec"]["template"]["spec"]["restartPolicy"] = "Always"
    with pytest.raises(InputError, match=r"^invalid-object: Job .*/invalid: .*restartPolicy") as failure:
        space.apply(job)
    assert "\n" not in str(failure.value)


def test_a_quota_that_is_used_up_is_no_matter_of_rights(cluster: Cluster, make_config_map: Make) -> None:
    name = "gateway-quota"
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    full = cluster.within(name)
    try:
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
        full.apply({**quota, "spec": {"hard": {"count/secrets": "0"}}})
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}
        for _, found in full.watch("ResourceQuota", timeout_seconds=30):
            if found.get("status", {}).get("hard"):
                break
        with pytest.raises(InputError, match=r"quota-exceeded: .*count/secrets"):
            full.create(secret)
    finally:
        cluster.delete("Namespace", name)
    with pytest.raises((InputError, AccessError), match=r"namespace-(terminating|not-found)"):
        full.create(make_config_map("late"))


def test_what_the_cluster_serves_is_told_by_its_api_versions(space: Cluster, workspaces_crd: str) -> None:
    assert space.served("Workspace") == ["kaito.sh/v1beta1", "kaito.sh/v1alpha1"]
    assert space.served("KaitoNodeClass") == [], "the group is there, and the kind is not"
    assert space.served("EC2NodeClass") == [], "nor is the group"


def test_the_api_servers_time_is_about_ours(space: Cluster) -> None:
    now = space.server_time()
    assert now.microsecond == 0 and abs(now - datetime.now(UTC)) < timedelta(seconds=30)


def test_an_object_that_has_changed_since_it_was_read_is_not_deleted(space: Cluster) -> None:
    meta = {"name": "deleted-as-read", "namespace": space.namespace}
    read = space.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta})["metadata"]
    space.patch("ConfigMap", "deleted-as-read", {"data": {"a": "b"}})
    versions = {"uid": read["uid"], "resource_version": read["resourceVersion"]}
    with pytest.raises(ConflictError):
        space.delete("ConfigMap", "deleted-as-read", **versions)
    found = space.get("ConfigMap", "deleted-as-read")
    assert found is not None
    assert space.delete("ConfigMap", "deleted-as-read", resource_version=found["metadata"]["resourceVersion"])
    assert not space.delete("ConfigMap", "deleted-as-read", **versions)
