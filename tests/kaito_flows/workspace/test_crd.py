"""The CRD: what KAITO takes, the API server takes; what the models refuse, it refuses wherever a schema can say it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kaito_flows.errors import WorkspaceError
from kaito_flows.workspace import parse_workspace
from kaito_flows.workspace.crd import as_yaml, crd
from kaito_flows.workspace.spec import ResourceSpec

IMAGE = {"image": "registry.example.com/adapters/phi-3:0.0.1", "imagePushSecret": "push"}
TUNING: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "w"},
    "resource": {"instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {"matchLabels": {"app": "w"}}},
    "tuning": {
        "preset": {"name": "phi-3-mini-128k-instruct"},
        "method": "qlora",
        "input": {"urls": ["https://example.com/data.parquet?download=true"]},
        "output": IMAGE,
    },
}
INFERENCE: dict[str, Any] = {
    **{key: TUNING[key] for key in ("apiVersion", "kind", "metadata", "resource")},
    "inference": {
        "preset": {"name": "phi-3-mini-128k-instruct"},
        "adapters": [{"source": {"name": "dolly", "image": IMAGE["image"]}, "strength": "0.5"}],
    },
}


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at the path; None takes the key away."""
    made = copy.deepcopy(document)
    *parents, last = path.split(".")
    here: Any = made
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here[part]
    if value is None:
        del here[last]
    else:
        here[last] = value
    return made


def dataset(**source: Any) -> dict[str, Any]:
    return changed(TUNING, "tuning.input", source)


def adapter(source: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    return changed(INFERENCE, "inference.adapters", [{**({} if source is None else {"source": source}), **more}])


VOLUME = {"volumeSource": {"emptyDir": {}}}
URLS = ["https://example.com/a"]
# By the names that KAITO's own tests of its webhook have.
ACCEPTED = {
    "Tuning validation with single node": TUNING,
    "All fields valid": changed(TUNING, "tuning.config", "my-config"),
    "Verify QLoRA Config": changed(TUNING, "tuning.method", "QLoRA"),
    "Method lora in any case": changed(TUNING, "tuning.method", "LoRA"),
    "DataSource: URLs only": dataset(urls=URLS),
    "DataSource: a host that begins like a private address": dataset(urls=["https://10.example.com/a"]),
    "DataSource: volume only": dataset(**VOLUME),
    "DataSource: image only": dataset(image="registry.example.com/data:1"),
    "DataSource: image without tag": dataset(image="aimodelsregistry.azurecr.io/data"),
    "DataDestination: volume only": changed(TUNING, "tuning.output", VOLUME),
    "DataDestination: placeholders of an example": changed(
        TUNING,
        "tuning.output",
        {"image": "ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1", "imagePushSecret": "A_HERE"},
    ),
    "adapters: image": INFERENCE,
    "adapters: volume ok": adapter({"name": "a", **VOLUME}, strength="1"),
    "inference: a pod template": changed(INFERENCE, "inference", {"template": {"spec": {"containers": []}}}),
}
REFUSED = {
    "a name with capitals": (changed(TUNING, "metadata.name", "Bad"), "metadata.name"),
    "a name of 64 characters": (changed(TUNING, "metadata.name", "a" * 64), "metadata.name"),
    "no label selector": (changed(TUNING, "resource.labelSelector", None), "resource"),
    "no node": (changed(TUNING, "resource.count", 0), "resource.count"),
    "an expression that is not In": (
        changed(
            TUNING, "resource.labelSelector", {"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["b"]}]}
        ),
        "resource.labelSelector.matchExpressions",
    ),
    "Missing Input": (changed(TUNING, "tuning.input", None), "tuning"),
    "Missing Output": (changed(TUNING, "tuning.output", None), "tuning"),
    "Missing Preset": (changed(TUNING, "tuning.preset", None), "tuning"),
    "Invalid Method": (changed(TUNING, "tuning.method", "full"), "tuning.method"),
    "Input source casing": (dataset(image="registry.example.com/Data:1"), "tuning.input.image"),
    "Output destination casing": (
        changed(TUNING, "tuning.output.image", "registry.example.com/Adapter:1"),
        "tuning.output.image",
    ),
    "DataSource: unsupported scheme": (dataset(urls=["ftp://example.com/a"]), "tuning.input.urls"),
    "DataSource: a file": (dataset(urls=["file:///etc/passwd"]), "tuning.input.urls"),
    "DataSource: loopback IP": (dataset(urls=["http://127.0.0.1/a"]), "tuning.input.urls"),
    "DataSource: localhost": (dataset(urls=["http://LocalHost:8000/a"]), "tuning.input.urls"),
    "DataSource: private IP": (dataset(urls=["http://user:pw@10.0.0.1:80/a"]), "tuning.input.urls"),
    "DataSource: another private IP": (dataset(urls=["http://172.20.0.1/a"]), "tuning.input.urls"),
    "DataSource: link-local IP": (dataset(urls=["http://169.254.169.254/latest"]), "tuning.input.urls"),
    "DataSource: IPv6 loopback": (dataset(urls=["http://[::1]/a"]), "tuning.input.urls"),
    "DataSource: metadata hostname": (dataset(urls=["http://metadata.google.internal/a"]), "tuning.input.urls"),
    "DataSource: invalid image": (dataset(image="!not an image"), "tuning.input.image"),
    "DataSource: none specified": (dataset(name="data"), "tuning.input"),
    "DataSource: KAITO's old key `volume`": (dataset(volume={"emptyDir": {}}), "tuning.input"),
    "DataSource: URLs+Volume": (dataset(urls=URLS, **VOLUME), "tuning.input"),
    "DataSource: all three": (dataset(urls=URLS, image="a/b", **VOLUME), "tuning.input"),
    "DataDestination: none": (changed(TUNING, "tuning.output", {}), "tuning.output"),
    "DataDestination: invalid image": (changed(TUNING, "tuning.output.image", "!"), "tuning.output.image"),
    "DataDestination: both": (changed(TUNING, "tuning.output", {**IMAGE, **VOLUME}), "tuning.output"),
    "DataDestination: no secret": (changed(TUNING, "tuning.output.imagePushSecret", None), "tuning.output"),
    "inference: preset and template": (
        changed(INFERENCE, "inference.template", {"spec": {"containers": []}}),
        "inference",
    ),
    "inference: neither": (changed(INFERENCE, "inference", {}), "inference"),
    "inference: eleven adapters": (
        changed(INFERENCE, "inference.adapters", [{"source": {"name": f"a{i}", "image": "a/b"}} for i in range(11)]),
        "inference.adapters",
    ),
    "adapters: missing source": (adapter(None, strength="1"), "inference.adapters"),
    "adapters: missing name": (adapter({"image": "a/b"}), "inference.adapters"),
    "adapters: strength not a number": (adapter({"name": "a", "image": "a/b"}, strength="x"), "inference.adapters"),
    "adapters: strength > 1": (adapter({"name": "a", "image": "a/b"}, strength="1.5"), "inference.adapters"),
    "adapters: name > 253 characters": (adapter({"name": "a" * 254, "image": "a/b"}), "inference.adapters"),
    "adapters: missing image and volume": (adapter({"name": "a"}), "inference.adapters"),
    "adapters: URLs": (adapter({"name": "a", "urls": URLS}), "inference.adapters"),
}
# No schema of Kubernetes can say these: the watcher tells them.
ONLY_CODE = {
    "Invalid Preset": changed(TUNING, "tuning.preset.name", "no-such-model"),
    "inference and tuning": {**TUNING, "inference": INFERENCE["inference"]},
    "neither inference nor tuning": {key: TUNING[key] for key in ("apiVersion", "kind", "metadata", "resource")},
    "adapters: the same name twice": changed(
        INFERENCE, "inference.adapters", [{"source": {"name": "a", "image": "a/b"}}] * 2
    ),
}
EXAMPLES = ("phi-3-qlora.yaml",)


def schema(version: str) -> dict[str, Any]:
    [found] = [v for v in crd()["spec"]["versions"] if v["name"] == version]
    made: dict[str, Any] = found["schema"]["openAPIV3Schema"]
    return made


def errors(document: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema(document["apiVersion"].rpartition("/")[2]))
    return [".".join(map(str, error.absolute_path)) for error in validator.iter_errors(document)]


def faults(document: dict[str, Any]) -> list[str]:
    try:
        parse_workspace(document, "kubernetes", training_config=None)
    except WorkspaceError as exc:
        return [fault.path for fault in exc.faults]
    return []


def as_v1alpha1(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "apiVersion": "kaito.sh/v1alpha1"}


def test_the_file_in_deployments_is_up_to_date(repository_root: Path) -> None:
    text = (repository_root / "deployments/kubernetes/base/crd.yaml").read_text()
    assert text == as_yaml(), "python -m kaito_flows.workspace.crd > deployments/kubernetes/base/crd.yaml"


def test_titles_descriptions_defaults_and_limits_come_from_the_models() -> None:
    v1alpha1, v1beta1 = (schema(v)["properties"] for v in ("v1alpha1", "v1beta1"))
    assert v1alpha1["resource"]["properties"]["instanceType"]["default"] == "Standard_NC24ads_A100_v4"
    assert "default" not in v1beta1["resource"]["properties"]["instanceType"]
    assert v1beta1["resource"]["properties"]["count"] == {
        "title": "Nodes",
        "description": ResourceSpec.model_fields["count"].description,
        "default": 1,
        "type": "integer",
        "minimum": 1,
    }
    preset = v1beta1["tuning"]["properties"]["preset"]
    assert preset["properties"]["accessMode"]["default"] == "public"
    assert preset["properties"]["accessMode"]["enum"] == ["public", "private"]
    assert "modelAccessSecret" in preset["properties"]["presetOptions"]["properties"]
    assert "modelAccessSecret" not in str(v1alpha1)
    adapters = v1beta1["inference"]["properties"]["adapters"]
    assert adapters["maxItems"] == 10
    assert "default" not in adapters["items"]["properties"]["strength"], "what nobody wrote would count as written"
    assert v1beta1["tuning"]["required"] == ["preset", "method", "input", "output"]


def test_an_empty_default_is_none() -> None:
    """`image: ""` filled in by the server would count as given."""
    assert "default: ''" not in as_yaml()
    assert "default: []" not in as_yaml()


def test_free_objects_keep_what_they_hold() -> None:
    properties = schema("v1beta1")["properties"]
    for free in (
        properties["inference"]["properties"]["template"],
        properties["tuning"]["properties"]["input"]["properties"]["volumeSource"],
    ):
        assert free["type"] == "object"
        assert free["x-kubernetes-preserve-unknown-fields"] is True


def test_the_metadata_is_the_api_servers_but_for_the_name() -> None:
    assert set(schema("v1beta1")["properties"]["metadata"]["properties"]) == {"name"}


@pytest.mark.parametrize("document", ACCEPTED.values(), ids=ACCEPTED)
def test_what_kaito_accepts_is_accepted(document: dict[str, Any]) -> None:
    for version in (document, as_v1alpha1(document)):
        assert errors(version) == []
        assert faults(version) in ([], ["tuning.config"]), "the ConfigMap is in the cluster"


def test_an_empty_key_counts_as_none() -> None:
    document = dataset(urls=URLS, image="", name="")
    assert errors(document) == faults(document) == []


@pytest.mark.parametrize(("document", "path"), REFUSED.values(), ids=REFUSED)
def test_what_the_models_refuse_the_schema_refuses(document: dict[str, Any], path: str) -> None:
    for version in (document, as_v1alpha1(document)):
        assert any(place.startswith(path) for place in errors(version)), errors(version)
        assert any(place.startswith(path) for place in faults(version)), faults(version)


@pytest.mark.parametrize("document", ONLY_CODE.values(), ids=ONLY_CODE)
def test_what_only_code_can_see_the_schema_lets_through(document: dict[str, Any]) -> None:
    assert errors(document) == []
    assert faults(document)


@pytest.mark.cluster
class TestServer:
    """The same, by a real API server."""

    @pytest.mark.parametrize("document", [*ACCEPTED.values(), *ONLY_CODE.values()], ids=[*ACCEPTED, *ONLY_CODE])
    def test_it_accepts(self, kubectl: Any, document: dict[str, Any]) -> None:
        for version in (document, as_v1alpha1(document)):
            kubectl("create", "--dry-run=server", "-f", "-", stdin=version)

    @pytest.mark.parametrize(("document", "path"), REFUSED.values(), ids=REFUSED)
    def test_it_refuses_and_names_the_place(self, kubectl: Any, document: dict[str, Any], path: str) -> None:
        # kubectl's own look at the schema is switched off: it is the server that has to refuse.
        for version in (document, as_v1alpha1(document)):
            done = kubectl.run("create", "--dry-run=server", "--validate=false", "-f", "-", stdin=version)
            assert done.returncode != 0, done.stdout
            assert path in done.stderr

    @pytest.mark.parametrize("example", EXAMPLES)
    def test_it_takes_the_examples(self, kubectl: Any, repository_root: Path, example: str) -> None:
        kubectl("apply", "-f", str(repository_root / "examples" / example))
        [found] = kubectl.get("workspaces")["items"]
        wanted = yaml.safe_load((repository_root / "examples" / example).read_text())
        assert found["tuning"]["input"] == wanted["tuning"]["input"]
        assert found["tuning"]["preset"]["accessMode"] == "public"
        assert found["resource"]["count"] == 1

    def test_it_has_kaitos_default_size_in_v1alpha1_alone(self, kubectl: Any) -> None:
        without = changed(TUNING, "resource.instanceType", None)
        kubectl("create", "-f", "-", stdin=changed(without, "metadata.name", "beta"))
        kubectl("create", "-f", "-", stdin=as_v1alpha1(changed(without, "metadata.name", "alpha")))
        assert "instanceType" not in kubectl.get("workspace", "beta")["resource"]
        assert kubectl.get("workspace", "alpha")["resource"]["instanceType"] == "Standard_NC24ads_A100_v4"

    def test_it_shows_kaitos_columns(self, kubectl: Any) -> None:
        kubectl("create", "-f", "-", stdin=TUNING)
        head, row = kubectl("get", "workspace").splitlines()
        columns = ["NAME", "INSTANCE", "RESOURCEREADY", "INFERENCEREADY", "JOBSTARTED", "WORKSPACESUCCEEDED"]
        assert head.split() == [*columns, "STATE", "TARGETNODECOUNT", "AGE"]
        assert row.split()[:2] == ["w", "Standard_NC24ads_A100_v4"]
        old = kubectl("get", "workspaces.v1alpha1.kaito.sh").splitlines()[0]
        assert old.split() == ["NAME", "INSTANCE", "RESOURCEREADY", "INFERENCEREADY", "WORKSPACEREADY", "AGE"]

    @pytest.mark.parametrize("name", ["wk", "wks", "workspace", "workspaces"])
    def test_it_knows_the_short_names(self, kubectl: Any, name: str) -> None:
        assert kubectl.run("get", name).returncode == 0

    def test_it_explains_the_fields(self, kubectl: Any) -> None:
        text = kubectl("explain", "workspace.tuning")
        assert "A ConfigMap with the key training_config.yaml." in text
        assert "Where data comes from: exactly one of" in text
