"""The way to a cluster: who we are there, what we may do, and what is said when there is no way."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_flows.cluster import connection
from kaito_flows.cluster.gateway import Cluster
from kaito_flows.cluster.refusals import Request
from kaito_flows.cluster.resources import resource
from kaito_flows.cluster.rights import Right
from kaito_flows.errors import AccessError, InputError

NAMESPACE = "gateway-access"
cluster_only = pytest.mark.cluster

Make = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def token(space: Cluster) -> str:
    """The token of a service account that may only read Pods, and list Jobs."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "reader"}}
    space.apply(account)
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list"]},
    ]
    rbac = "rbac.authorization.k8s.io"
    space.apply({"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": "reader"}, "rules": rules})
    space.apply(
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "reader"},
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "reader"},
            "subjects": [{"kind": "ServiceAccount", "name": "reader", "namespace": space.namespace}],
        }
    )
    accounts = resource("ServiceAccount")
    answer = space.connection.request(
        Request("create", accounts, space.namespace, "reader", "token"),
        "POST",
        accounts.path(space.namespace, "reader", "token"),
        body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}},
    )
    return str(answer["status"]["token"])


@pytest.fixture
def write(kubeconfig: Path, space: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a kubeconfig with another user, or changes to its cluster; KUBECONFIG names it."""

    def make(user: dict[str, Any], **changes: Any) -> Path:
        config = yaml.safe_load(kubeconfig.read_text())
        for item in config["users"]:
            item["user"] = user
        for item in config["clusters"]:
            item["cluster"] |= changes
        for item in config["contexts"]:
            item["context"]["namespace"] = space.namespace
        path = tmp_path / "kubeconfig.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(path))
        return path

    return make


@cluster_only
def test_who_may_not_is_told_what_and_where_and_which_role(token: str, write: Write, make_config_map: Make) -> None:
    write({"token": token})
    reader = Cluster.connect()
    assert reader.list("Pod") == []
    space, user = reader.namespace, f"system:serviceaccount:{reader.namespace}:reader"
    with pytest.raises(AccessError) as failure:
        reader.create(make_config_map("mine"))
    assert str(failure.value) == (
        f"access-denied: ConfigMap {space}/mine: {user} may not create configmaps in namespace '{space}' "
        f"(a Role bound to it must allow 'create' on 'configmaps')"
    )
    asks: list[tuple[Callable[[], object], str]] = [
        (lambda: reader.get("Job", "j"), f"may not get jobs.batch in namespace '{space}'"),
        (lambda: reader.list("Node"), "may not list nodes cluster-wide .*a ClusterRole bound to it"),
        (lambda: reader.follow_logs("p", on_line=print), r"may not get pods/log .*'get' on 'pods/log'"),
        (lambda: next(reader.watch("Job")), "may not watch jobs.batch"),
        (lambda: reader.apply_status({**make_config_map("m"), "status": {}}), "may not patch configmaps/status"),
        (lambda: reader.delete("Pod", "p"), "may not delete pods"),
        (lambda: reader.list("Pod", all_namespaces=True), "may not list pods cluster-wide"),
    ]
    for ask, said in asks:
        with pytest.raises(AccessError, match=said):
            ask()


@cluster_only
def test_rights_are_asked_for_before_they_are_needed(token: str, write: Write, cluster: Cluster) -> None:
    write({"token": token})
    reader, asked = Cluster.connect(), []
    assert reader.can_i("list", "pods")
    assert not reader.can_i("list", "pods", namespace="default")
    assert not reader.can_i("get", "pods/log")
    assert reader.can_i("list", "jobs", "batch")
    assert not reader.can_i("list", "jobs")
    held = [Right("get", "pods"), Right("watch", "pods"), Right("list", "jobs", "batch")]
    reader.connection.http.event_hooks = {"request": [asked.append]}
    assert reader.missing_rights(held) == []
    assert len(asked) == 1
    lacking = [Right("create", "jobs", "batch"), Right("get", "pods/log")]
    assert reader.missing_rights([*held, *lacking]) == lacking
    assert [str(right) for right in lacking] == ["create jobs.batch", "get pods/log"]
    assert cluster.missing_rights(lacking) == []


@cluster_only
def test_a_login_plug_in_is_asked(token: str, write: Write, tmp_path: Path) -> None:
    version = "client.authentication.k8s.io/v1beta1"
    credential = {"apiVersion": version, "kind": "ExecCredential", "status": {"token": token}}
    (tmp_path / "credential.json").write_text(json.dumps(credential))
    plugin = {"apiVersion": version, "command": "cat", "args": [str(tmp_path / "credential.json")]}
    write({"exec": plugin})
    assert Cluster.connect().list("Pod") == []
    write({"exec": {**plugin, "command": "false"}})
    with pytest.raises(AccessError, match=r"not-logged-in: .*kubeconfig.yaml: the login plug-in .*kubelogin"):
        Cluster.connect()


@cluster_only
def test_a_login_that_is_not_known_is_told(write: Write) -> None:
    write({"token": "nobody"})
    with pytest.raises(AccessError, match=r"not-logged-in: Pod .*log in again"):
        Cluster.connect().list("Pod")


@cluster_only
def test_a_server_with_another_certificate_is_not_waited_for(kubeconfig: Path, write: Write) -> None:
    certificate = yaml.safe_load(kubeconfig.read_text())["users"][0]["user"].get("client-certificate-data")
    if certificate is None:
        pytest.skip("the kubeconfig has no certificate to take for another authority's")
    write({"token": "any"}, **{"certificate-authority-data": b64encode(b64decode(certificate)).decode()})
    with pytest.raises(AccessError, match="cluster-not-trusted"):
        Cluster.connect().list("Pod")


@cluster_only
def test_a_pod_uses_its_service_account(
    cluster: Cluster, space: Cluster, token: str, kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import incluster_config

    authority = yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]["certificate-authority-data"]
    for name, content in (("token", token), ("ca.crt", b64decode(authority).decode()), ("namespace", space.namespace)):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(connection, "_SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    server = cluster.connection.server.removeprefix("https://").rstrip("/")
    host, _, port = server.partition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port or "443")
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    inside = Cluster.connect()
    assert (inside.namespace, inside.connection.in_cluster) == (space.namespace, True)
    assert inside.list("Pod") == []
    assert inside.service_url("phi-3") == f"http://phi-3.{space.namespace}.svc:80"


def test_no_cluster_at_all_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("", str(tmp_path / "missing")):
        monkeypatch.setenv("KUBECONFIG", path)
        with pytest.raises(InputError, match=r"no-cluster: no Kubernetes cluster is configured: .*\(set KUBECONFIG"):
            Cluster.connect()


@pytest.mark.parametrize("text", ["", "a: [", "clusters: {}", "just text", "current-context: nothing"])
def test_a_kubeconfig_that_cannot_be_used_is_told(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(InputError, match="no-cluster: the kubeconfig cannot be used"):
        Cluster.connect()
