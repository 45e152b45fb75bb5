"""Manifests of jobs and services: locked down, named by what they are for, and pinned to their nodes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kaito_flows.platforms import JobSpec, Placement, ServiceSpec, Weights, pods
from kaito_flows.settings import Settings

OWNER = pods.Owner("kaito.sh/v1beta1", "phi", "uid-1", "run-1")
SETTINGS = Settings(tuner_image="tuner:1", server_image="server:1")
SOURCE = {"kind": "hub", "repo": "a/b", "revision": "main"}


def spec(**changes: Any) -> JobSpec:
    given: dict[str, Any] = {
        "name": "tune-phi-0123456789ab",
        "workspace": "phi",
        "program": "tuner",
        "arguments": {"version": 1},
        "files": {"mnt/config/training_config.yaml": "training_config: {}\n"},
        "weights": Weights("phi-4", SOURCE, 30 * 2**30, "hub-token"),
        "placement": Placement(("node-a", "node-b"), gpus=1),
        "secrets": ("push", "push"),
    }
    return JobSpec(**{**given, **changes})


def job(**changes: Any) -> dict[str, Any]:
    return pods.jobs(spec(**changes), OWNER, SETTINGS, {})[0]


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return found


def test_a_pod_satisfies_the_restricted_pod_security_standard() -> None:
    for manifest in (job(), pods.deployment(ServiceSpec(spec(program="server"), "abc"), OWNER, SETTINGS, "phi-abc")):
        pod = pod_of(manifest)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod["initContainers"], *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
        assert {next(k for k in v if k != "name") for v in pod["volumes"]} <= {*allowed, "secret"}


def test_a_new_node_is_warmed_up_by_a_small_image_while_the_large_one_is_pulled() -> None:
    settings = SETTINGS.model_copy(update={"worker_image": "worker:1", "weights_cache": "node:/models"})
    warm = pods.warm_job(spec(program="warmer"), OWNER, settings)
    pod = pod_of(warm)
    assert [c["image"] for c in pod["containers"]] == ["worker:1", "tuner:1"]
    assert "initContainers" not in pod
    assert all("nvidia.com/gpu" not in c["resources"]["requests"] for c in pod["containers"])
    assert (warm["spec"]["parallelism"], pods.placed(warm)) == (2, ("node-a", "node-b"))
    # Where nodes keep no weights there is nothing to fetch ahead but the image.
    assert [c["image"] for c in pod_of(pods.warm_job(spec(), OWNER, SETTINGS))["containers"]] == ["tuner:1"]


def digest(**changes: Any) -> str:
    changed = spec(**changes)
    told = changed.job_file("/")
    return pods.digest_of_work(
        pods.jobs(changed, OWNER, SETTINGS, told)[0], pods.config_map(changed, OWNER, SETTINGS, told)
    )


def test_a_job_is_the_same_whatever_was_thought_of_its_memory_and_time() -> None:
    """What a run of another Workspace has measured meanwhile must not stop a training."""
    estimated = {"memory": {"needed": 1, "kept_block": 2}, "expected_seconds": 1e9}
    assert spec(**estimated).job_file("/")["memory"] == {"needed": 1, "kept_block": 2}
    assert digest(**estimated) == digest()
    assert digest(placement=Placement(("node-c",), gpus=1)) == digest()
    assert digest(arguments={"version": 1, "shard": True}) != digest()
    assert digest(files={"mnt/config/training_config.yaml": "training_config: {a: 1}\n"}) != digest()


def test_secrets_are_files_and_no_environment() -> None:
    pod = pod_of(job())
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert all("value" in variable for variable in container["env"])
    mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["/var/run/secrets/kaito-flows/registry/push"] == "registry-0"
    assert sum(path.startswith("/var/run/secrets") for path in mounts) == 1, "the Hub's token is for the weights alone"
    assert "/var/run/secrets/kaito-flows/huggingface" in {
        m["mountPath"] for m in pod["initContainers"][0]["volumeMounts"]
    }


def test_the_secrets_of_a_base_model_are_for_the_container_that_brings_it() -> None:
    weights = Weights("phi-4", {"kind": "image", "image": "r/phi"}, 1, pull_secrets=("push", "model"))
    pod = pod_of(job(weights=weights))
    [init], [main] = pod["initContainers"], pod["containers"]
    folder = "/var/run/secrets/kaito-flows/registry/"
    secrets = [{m["mountPath"] for m in c["volumeMounts"] if m["mountPath"].startswith(folder)} for c in (init, main)]
    assert secrets == [{f"{folder}push", f"{folder}model"}, {f"{folder}push"}]
    assert {"secretName": "model", "defaultMode": 0o440} in [v.get("secret") for v in pod["volumes"]]


def test_a_server_has_the_time_to_answer_before_it_is_killed() -> None:
    pod = pod_of(pods.deployment(ServiceSpec(spec(program="server"), "abc"), OWNER, SETTINGS, "phi-abc"))
    assert f"sleep({pods.CONNECTIONS_SECONDS})" in str(pod["containers"][0]["lifecycle"]["preStop"])
    assert pod["terminationGracePeriodSeconds"] >= pods.CONNECTIONS_SECONDS + pods.DRAIN_SECONDS + 5


def test_gpus_are_asked_for_as_planned_and_none_where_none_is_wanted() -> None:
    resources = pod_of(job(placement=Placement((), gpus=4)))["containers"][0]["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": "4"}
    assert resources["requests"]["nvidia.com/gpu"] == "4"
    assert resources["requests"]["memory"] == f"{2048 + int(1.2 * 30 * 1024)}Mi"
    assert "limits" not in pod_of(job(placement=Placement()))["containers"][0]["resources"]


def test_a_job_is_pinned_to_its_nodes_and_tolerates_their_taints() -> None:
    assert pods.placed(job()) == ("node-a", "node-b")
    assert pods.placed(job(placement=Placement())) == ()
    tolerated = {(t["key"], t["effect"]) for t in pod_of(job())["tolerations"]}
    assert {("sku", "NoSchedule"), ("nvidia.com/gpu", "NoSchedule")} <= tolerated
    assert ("kubernetes.azure.com/scalesetpriority", "NoSchedule") in tolerated


def test_two_specs_that_differ_in_placement_and_run_alone_are_the_same_work() -> None:
    elsewhere = pods.jobs(
        spec(placement=Placement(("node-c",), gpus=1)),
        pods.Owner("kaito.sh/v1beta1", "phi", "uid-1", "run-2"),
        SETTINGS,
        {},
    )[0]
    assert pods.without_placement(elsewhere) == pods.without_placement(job())
    assert pods.without_placement(job(secrets=())) != pods.without_placement(job())


def test_a_job_ends_by_itself_and_is_kept_for_its_logs_for_a_while() -> None:
    body = job()["spec"]
    assert body["activeDeadlineSeconds"] == 24 * 3600
    assert body["ttlSecondsAfterFinished"] == 3600
    assert job(expected_seconds=40 * 3600.0)["spec"]["activeDeadlineSeconds"] == 160 * 3600


def test_everything_belongs_to_the_workspace_and_never_carries_prefects_label() -> None:
    everything = [
        job(),
        pods.config_map(spec(), OWNER, SETTINGS, {}),
        pods.service("phi", OWNER, ServiceSpec(spec(), "abc")),
        pods.rendezvous_service(spec(), OWNER),
    ]
    for manifest in everything:
        metadata = manifest["metadata"]
        assert metadata["ownerReferences"][0]["uid"] == "uid-1"
        assert metadata["labels"]["kaito.sh/workspace"] == "phi"
        assert metadata["labels"]["kaito-flows/run-id"] == "run-1"
        assert "prefect.io" not in json.dumps(manifest)


def test_a_job_on_several_nodes_is_a_job_for_each_and_a_service_for_the_first() -> None:
    many = spec(placement=Placement(("a", "b"), gpus=2, count=2))
    found = pods.jobs(many, OWNER, SETTINGS, {})
    assert [m["metadata"]["name"] for m in found] == ["tune-phi-0123456789ab-0", "tune-phi-0123456789ab-1"]
    assert [pod_of(m)["hostname"] for m in found] == ["node-0", "node-1"], "torch numbers them in this order"
    assert "hostname" not in pod_of(job())
    service = pods.rendezvous_service(many, OWNER)["spec"]
    assert service["clusterIP"] == "None"
    assert service["ports"][0]["port"] == 29500
    assert service["selector"].items() <= found[0]["spec"]["template"]["metadata"]["labels"].items()
    assert not service["selector"].items() <= found[1]["spec"]["template"]["metadata"]["labels"].items()


def test_a_workspace_with_the_longest_name_gets_names_that_kubernetes_takes() -> None:
    name = "w" * 63
    owner = pods.Owner("kaito.sh/v1beta1", name, "uid-1", "run-1")
    long = spec(name=f"tune-{name}-0123456789ab", workspace=name, placement=Placement(count=2))
    names = [m["metadata"]["name"] for m in pods.jobs(long, owner, SETTINGS, {})]
    assert len(set(names)) == 2
    assert all(len(n) <= 63 for n in names)
    for manifest in pods.jobs(long, owner, SETTINGS, {}):
        assert all(len(value) <= 63 for value in manifest["metadata"]["labels"].values())


@pytest.mark.parametrize(
    ("cache", "kind"),
    [("", "emptyDir"), ("node:/var/lib/models", "hostPath"), ("claim:models", "persistentVolumeClaim")],
)
def test_weights_lie_where_the_settings_say(cache: str, kind: str) -> None:
    settings = Settings(weights_cache=cache)
    pod = pod_of(pods.jobs(spec(), OWNER, settings, {})[0])
    name = "store" if cache else "workspace"
    assert kind in next(v for v in pod["volumes"] if v["name"] == name)
    weights = json.loads(pods.config_map(spec(), OWNER, settings, {})["data"]["weights.json"])
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert weights["cache"].startswith(mounts[name])
    assert weights.get("store") == (mounts["store"] if cache else None)


def test_the_service_leads_port_80_to_the_server_and_29500_to_torch() -> None:
    ports = pods.service("phi", OWNER, ServiceSpec(spec(program="server"), "abc"))["spec"]["ports"]
    assert [(p["port"], p["targetPort"]) for p in ports] == [(80, 5000), (29500, 29500)]


def test_an_own_pod_template_keeps_its_containers_and_gets_our_labels_and_nodes() -> None:
    template = {
        "metadata": {"labels": {"a": "b"}},
        "spec": {"containers": [{"name": "c", "ports": [{"containerPort": 81}]}]},
    }
    own = ServiceSpec(spec(placement=Placement(("node-a",))), "abc", template=template)
    manifest = pods.deployment(own, OWNER, SETTINGS, "phi-abc")
    assert pod_of(manifest)["containers"] == template["spec"]["containers"]  # type: ignore[index]
    assert pods.placed(manifest) == ("node-a",)
    labels = manifest["spec"]["template"]["metadata"]["labels"]
    assert labels["a"] == "b" and labels["kaito-flows/template"] == "true", "our network policies are not for it"
    assert manifest["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert pods.service("phi", OWNER, own)["spec"]["ports"][0]["targetPort"] == 81
