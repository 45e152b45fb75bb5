"""The manifests: they render, the API server takes them, and the rights in them are enough and no more."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import Settings as PrefectSettings

from kaito_flows.settings import Settings

FLOW, WATCHER, WORKER = "kaito-flows-flow", "kaito-flows-watcher", "kaito-flows-worker"


def pods(manifests: list[dict[str, Any]], template: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pods of the base: those of Deployments, and that of a flow run."""
    found = {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"}
    return {**found, FLOW: template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]}


@pytest.fixture(scope="module")
def template(repository_root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((repository_root / "deployments/kubernetes/base/job-template.json").read_text())
    return found


def test_every_pod_is_as_the_restricted_pod_security_standard_wants_it(
    base: list[dict[str, Any]], template: dict[str, Any]
) -> None:
    found = pods(base, template)
    assert set(found) == {FLOW, WATCHER, WORKER}
    for name, pod in found.items():
        own = pod["securityContext"]
        assert own["runAsNonRoot"] and own["runAsUser"] == 10001, name
        assert own["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{name}/{container['name']}"
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), f"{name}/{container['name']}"


def old_fashioned(repository_root: Path, tmp_path: Path, name: str, *wanted: str) -> tuple[Path, dict[str, Any]]:
    """An overlay in the words of 2019, which the kubectl of any cluster understands; with items that are comments."""
    tree = tmp_path / "kubernetes"
    shutil.copytree(repository_root / "deployments/kubernetes", tree)
    folder = tree / "overlays" / name
    text = (folder / "kustomization.yaml").read_text()
    for item in wanted:
        assert text.count(f"  # - {item}\n") == 1
        text = text.replace(f"  # - {item}\n", f"  - {item}\n")
    overlay = yaml.safe_load(text)
    overlay["bases"] = [item for item in overlay["resources"] if (folder / item).is_dir()]
    overlay["resources"] = [item for item in overlay["resources"] if item not in overlay["bases"]]
    overlay["patchesStrategicMerge"] = [patch["path"] for patch in overlay.pop("patches")]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return folder, overlay


@pytest.mark.parametrize("name", ["kind", "aks"])
def test_an_overlay_renders_and_its_patches_find_what_they_change(
    renderer: Any, base: list[dict[str, Any]], repository_root: Path, tmp_path: Path, name: str
) -> None:
    folder, overlay = old_fashioned(repository_root, tmp_path, name)
    found = renderer.kustomize(folder)
    assert {m["metadata"]["name"] for m in found} >= {m["metadata"]["name"] for m in base if m["kind"] != "ConfigMap"}
    [settings] = [m for m in found if m["kind"] == "ConfigMap" and m["metadata"]["name"] == "kaito-flows"]
    [patch] = [yaml.safe_load((folder / path).read_text()) for path in overlay["patchesStrategicMerge"]]
    assert patch["data"].items() <= settings["data"].items()
    assert settings["data"]["KAITO_FLOWS_PLATFORM"] == "kubernetes"
    workers = {
        container["image"]
        for m in found
        if m["kind"] == "Deployment"
        for container in m["spec"]["template"]["spec"]["containers"]
    }
    assert workers == {settings["data"]["KAITO_FLOWS_WORKER_IMAGE"]}


def test_flow_runs_that_rent_nodes_have_an_identity_and_know_their_cluster(
    renderer: Any, template: dict[str, Any], repository_root: Path, tmp_path: Path
) -> None:
    folder, _ = old_fashioned(repository_root, tmp_path, "aks", "path: rent.yaml", "../../reaper")
    found = {(m["kind"], m["metadata"]["name"]): m for m in renderer.kustomize(folder)}
    account = found["ServiceAccount", FLOW]["metadata"]
    assert account["annotations"] == {"azure.workload.identity/client-id": "CLIENT_ID"}
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]
    assert pod["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    assert template["variables"]["properties"]["service_account_name"]["default"] == FLOW
    settings = found["ConfigMap", "kaito-flows"]["data"]
    prefix = "KAITO_FLOWS_"
    ours = {name.removeprefix(prefix).lower(): value for name, value in settings.items() if name.startswith(prefix)}
    del ours["worker_image"]
    read = Settings(**ours)
    assert read.rents
    assert (read.aks_subscription, read.aks_resource_group, read.aks_cluster) == ("SUBSCRIPTION", "GROUP", "CLUSTER")
    reaper = found["CronJob", "kaito-flows-reaper"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert reaper["containers"][0]["image"] == settings["KAITO_FLOWS_WORKER_IMAGE"]


def test_every_variable_of_the_settings_is_one_that_the_settings_know(base: list[dict[str, Any]]) -> None:
    [settings] = [m for m in base if m["kind"] == "ConfigMap" and m["metadata"]["name"] == "kaito-flows"]
    known = {f"KAITO_FLOWS_{name}".upper() for name in Settings.model_fields}
    # The image of flow runs is no setting of theirs: it is Prefect that reads it.
    known |= {"PREFECT_API_URL", "KAITO_FLOWS_WORKER_IMAGE"}
    assert set(settings["data"]) <= known


def test_every_deployment_in_prefect_has_a_flow_of_ours(repository_root: Path) -> None:
    text = (repository_root / "deployments/kubernetes/base/prefect.yaml").read_text()
    entrypoints = [deployment["entrypoint"] for deployment in yaml.safe_load(text)["deployments"]]
    assert len(entrypoints) == 3
    for entrypoint in entrypoints:
        module, _, name = entrypoint.rpartition(".")
        assert getattr(importlib.import_module(module), name).name == name.replace("_", "-")


def test_nodes_are_reaped_every_five_minutes_and_never_twice_at_once(repository_root: Path) -> None:
    text = (repository_root / "deployments/kubernetes/base/prefect.yaml").read_text()
    [reaper] = [d for d in yaml.safe_load(text)["deployments"] if d["entrypoint"].endswith(".reap_nodes")]
    [schedule] = reaper["schedules"]
    assert (schedule["interval"], schedule["active"]) == (300, True)
    assert reaper["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert "kaito" not in reaper["tags"], "one that has crashed is not resumed: the next one comes"


def test_prometheus_is_told_where_the_watcher_answers_and_is_let_in(base: list[dict[str, Any]]) -> None:
    [watcher] = [m for m in base if m["kind"] == "Deployment" and m["metadata"]["name"] == WATCHER]
    [container] = watcher["spec"]["template"]["spec"]["containers"]
    [port] = [p["containerPort"] for p in container["ports"] if p["name"] == "metrics"]
    environment = {v["name"]: v.get("value") for v in container["env"]}
    assert environment["KAITO_FLOWS_METRICS_PORT"] == str(port)
    annotations = watcher["spec"]["template"]["metadata"]["annotations"]
    assert (annotations["prometheus.io/scrape"], annotations["prometheus.io/port"]) == ("true", str(port))
    opened = [
        rule["port"]
        for m in base
        if m["kind"] == "NetworkPolicy"
        and m["spec"]["podSelector"] == {"matchLabels": {"app.kubernetes.io/component": "watcher"}}
        for ingress in m["spec"]["ingress"]
        for rule in ingress["ports"]
    ]
    assert opened == [port]


def test_the_watcher_has_no_part_in_renting(base: list[dict[str, Any]]) -> None:
    [watcher] = [m for m in base if m["kind"] == "Deployment" and m["metadata"]["name"] == WATCHER]
    [container] = watcher["spec"]["template"]["spec"]["containers"]
    assert {"name": "KAITO_FLOWS_NODES", "value": "existing"} in container["env"], "whatever the ConfigMap says"


def test_a_workspace_does_not_wait_long_for_prefects_worker(
    base: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    [worker] = [m for m in base if m["kind"] == "Deployment" and m["metadata"]["name"] == WORKER]
    for variable in worker["spec"]["template"]["spec"]["containers"][0]["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
    assert PrefectSettings().worker.query_seconds == 2


def test_the_pods_of_flow_runs_take_every_variable_that_their_template_names(template: dict[str, Any]) -> None:
    text = json.dumps(template["job_configuration"])
    named = {part.split("}}")[0].strip() for part in text.split("{{")[1:]}
    assert named == set(template["variables"]["properties"])


@pytest.mark.cluster
def test_the_api_server_takes_every_manifest(target: Any, base: list[dict[str, Any]], repository_root: Path) -> None:
    from_base = [json.loads(json.dumps(m).replace('"kaito-flows"', f'"{target.namespace}"')) for m in base]
    told = target.apply(from_base, "--dry-run=server")
    assert len(told.splitlines()) == len(base) >= 20
    workspaces = target.kustomize(repository_root / "deployments/kubernetes/workspaces")
    told = target.apply(workspaces, "--dry-run=server")
    assert len(told.splitlines()) == len(workspaces) == 4


ALL_VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
RESOURCES = (
    "workspaces.kaito.sh", "workspaces.kaito.sh/status", "jobs.batch", "deployments.apps", "configmaps", "services",
    "endpoints", "pods", "pods/log", "pods/exec", "secrets", "events", "serviceaccounts",
    "rolebindings.rbac.authorization.k8s.io",
)  # fmt: skip
MAKE = ("get", "list", "watch", "create", "patch", "delete")
ALLOWED: dict[str, dict[str, tuple[str, ...]]] = {
    FLOW: {
        "workspaces.kaito.sh": ("get", "list", "watch", "create", "delete"),
        "workspaces.kaito.sh/status": ("patch",),
        "jobs.batch": MAKE,
        "deployments.apps": MAKE,
        "configmaps": MAKE,
        "services": MAKE,
        "endpoints": ("list", "watch"),
        "pods": ("get", "list", "watch", "delete"),
        "pods/log": ("get",),
        "secrets": ("get",),
        "events": ("get", "list", "create", "patch"),
    },
    WATCHER: {
        "workspaces.kaito.sh": ("get", "list", "watch", "patch", "delete"),
        "workspaces.kaito.sh/status": ("patch",),
        "jobs.batch": ("list", "delete"),
        "deployments.apps": ("list", "delete"),
        "configmaps": ("list", "delete"),
        "services": ("list", "delete"),
        "pods": ("list", "watch", "delete"),
        "events": ("create",),
    },
    WORKER: {
        "jobs.batch": ("get", "list", "watch", "create", "delete"),
        "pods": ("get", "list", "watch"),
        "pods/log": ("get",),
    },
}


@pytest.mark.cluster
@pytest.mark.parametrize("account", ALLOWED)
def test_an_account_may_do_what_it_has_to_do_and_nothing_else(installed: Any, account: str) -> None:
    user = f"system:serviceaccount:{installed.namespace}:{account}"
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
    asked = [*itertools.product(RESOURCES, ALL_VERBS)]
    reviews = []
    for (resource, verb), namespace in itertools.product(asked, (installed.namespace, "kube-system")):
        plural, _, subresource = resource.partition("/")
        name, _, group = plural.partition(".")
        attributes = {"resource": name, "group": group, "subresource": subresource, "verb": verb}
        reviews.append({**review, "spec": {"user": user, "resourceAttributes": {**attributes, "namespace": namespace}}})
    answers = installed("create", "--output", "yaml", "--filename", "-", stdin=yaml.safe_dump_all(reviews))
    found: dict[str, set[tuple[str, str]]] = {installed.namespace: set(), "kube-system": set()}
    for answer in yaml.safe_load_all(answers):
        what = answer["spec"]["resourceAttributes"]
        if answer["status"]["allowed"]:
            name = ".".join(filter(None, (what["resource"], what.get("group", ""))))
            name += f"/{what['subresource']}" if what.get("subresource") else ""
            found[what["namespace"]].add((name, what["verb"]))
    assert found["kube-system"] == set()
    assert found[installed.namespace] == {(name, verb) for name, verbs in ALLOWED[account].items() for verb in verbs}


@pytest.mark.cluster
def test_only_flow_runs_read_nodes_and_nobody_changes_them(installed: Any) -> None:
    def may(account: str, verb: str) -> bool:
        user = f"system:serviceaccount:{installed.namespace}:{account}"
        return installed.run("auth", "can-i", verb, "nodes", "--as", user).returncode == 0

    assert may(FLOW, "get") and may(FLOW, "list")
    assert not any(may(account, verb) for account, verb in itertools.product((WATCHER, WORKER), ("get", "list")))
    assert not any(may(FLOW, verb) for verb in ("create", "patch", "update", "delete", "watch"))


@pytest.mark.cluster
def test_the_reaper_can_tell_a_namespace_that_is_gone_and_do_nothing_to_one(installed: Any) -> None:
    def may(account: str, verb: str) -> bool:
        user = f"system:serviceaccount:{installed.namespace}:{account}"
        return installed.run("auth", "can-i", verb, "namespaces/any", "--as", user).returncode == 0

    assert may(FLOW, "get")
    assert not any(may(FLOW, verb) for verb in ("list", "create", "patch", "update", "delete", "watch"))
    assert not any(may(account, "get") for account in (WATCHER, WORKER))
