"""Workspace files: what KAITO takes is taken, and what is wrong is said at once, with its place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_flows.errors import InputError, WorkspaceError
from kaito_flows.workspace import WorkspaceV1alpha1, WorkspaceV1beta1, load_workspace, parse_workspace

# KAITO's example as its repository has it, placeholders included.
SEED = """\
apiVersion: kaito.sh/v1alpha1
kind: Workspace
metadata:
  name: workspace-tuning-phi-3
resource:
  instanceType: "Standard_NC24ads_A100_v4"
  labelSelector:
    matchLabels:
      app: tuning-phi-3
tuning:
  preset:
    name: phi-3-mini-128k-instruct
  method: qlora
  input:
    urls:
      - "https://huggingface.co/datasets/philschmid/dolly-15k-oai-style/resolve/main/data/train-00000-of-00001-54e3756291ca09c6.parquet?download=true"
  output:
    image: "ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1" # Tuning Output ACR Path
    imagePushSecret: ACR_REGISTRY_SECRET_HERE
"""

# KAITO's example ConfigMap for Phi-3, its comments left out.
CONFIG_MAP = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: optimized-phi3-tuning
data:
  training_config.yaml: |
    training_config:
      ModelConfig:
        torch_dtype: "bfloat16"
        local_files_only: true
        device_map: "auto"
      QuantizationConfig:
        load_in_4bit: true
        bnb_4bit_quant_type: "nf4"
        bnb_4bit_compute_dtype: "bfloat16"
        bnb_4bit_use_double_quant: true
      LoraConfig:
        r: 8
        lora_alpha: 8
        lora_dropout: 0.0
        target_modules: ["q_proj", "k_proj", "v_proj", "o_proj"]
      TrainingArguments:
        output_dir: "/mnt/results"
        save_strategy: "epoch"
        per_device_train_batch_size: 2
        ddp_find_unused_parameters: false
      DataCollator:
        mlm: true
      DatasetConfig:
        shuffle_dataset: true
        train_test_split: 1
"""


@pytest.fixture
def seed() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(SEED)
    document["tuning"]["output"] = {"image": "acr.azurecr.io/phi3:0.0.1", "imagePushSecret": "secret"}
    return document


def faults(document: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(WorkspaceError) as caught:
        parse_workspace(document, options.pop("platform", "kubernetes"), **options)
    return [str(fault) for fault in caught.value.faults]


def test_the_seed_example_parses_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(SEED)
    loaded = load_workspace(tmp_path / "w.yaml", "kubernetes")
    assert isinstance(loaded.workspace, WorkspaceV1alpha1)
    assert loaded.workspace.name == "workspace-tuning-phi-3"
    assert loaded.workspace.tuning is not None
    assert loaded.workspace.tuning.method == "qlora"
    assert loaded.workspace.resource.count == 1
    assert loaded.training_config is not None
    assert loaded.training_config.QuantizationConfig.load_in_4bit


def test_its_placeholders_are_named(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(SEED)
    places = {f.path: f.message for f in load_workspace(tmp_path / "w.yaml", "kubernetes").placeholders}
    assert set(places) == {"tuning.output.image", "tuning.output.imagePushSecret"}
    assert "ACR_REPO_HERE, IMAGE_NAME_HERE" in places["tuning.output.image"]


def test_both_api_versions_are_read(seed: dict[str, Any]) -> None:
    assert isinstance(parse_workspace(seed, "kubernetes").workspace, WorkspaceV1alpha1)
    seed["apiVersion"] = "kaito.sh/v1beta1"
    assert isinstance(parse_workspace(seed, "kubernetes").workspace, WorkspaceV1beta1)


def test_the_default_size_is_v1alpha1s_alone(seed: dict[str, Any]) -> None:
    del seed["resource"]["instanceType"]
    assert parse_workspace(seed, "kubernetes").workspace.resource.instance_type == "Standard_NC24ads_A100_v4"
    seed["apiVersion"] = "kaito.sh/v1beta1"
    assert parse_workspace(seed, "kubernetes").workspace.resource.instance_type == ""


def test_a_config_map_in_the_same_file_is_found_by_its_name(tmp_path: Path, seed: dict[str, Any]) -> None:
    seed["tuning"]["config"] = "optimized-phi3-tuning"
    (tmp_path / "w.yaml").write_text(CONFIG_MAP + "---\n" + yaml.safe_dump(seed) + "---\n")
    config = load_workspace(tmp_path / "w.yaml", "kubernetes").training_config
    assert config is not None
    assert config.LoraConfig.r == 8
    assert config.TrainingArguments.per_device_train_batch_size == 2
    assert config.DatasetConfig.train_test_split == 1


def test_a_config_map_that_is_missing_is_a_fault(seed: dict[str, Any]) -> None:
    seed["tuning"]["config"] = "absent"
    assert faults(seed) == ["tuning.config: no ConfigMap 'absent' in the file (add it to the file as another document)"]


def test_what_kubectl_prints_is_read(seed: dict[str, Any]) -> None:
    seed["metadata"] |= {"uid": "1", "resourceVersion": "5", "managedFields": [{"manager": "kubectl"}], "generation": 3}
    seed["status"] = {"conditions": []}
    assert parse_workspace(seed, "kubernetes").workspace.metadata.generation == 3


def test_methods_are_read_without_case(seed: dict[str, Any]) -> None:
    seed["tuning"]["method"] = "QLoRA"
    tuning = parse_workspace(seed, "kubernetes").workspace.tuning
    assert tuning is not None
    assert tuning.method == "qlora"


def test_every_fault_is_told_at_once(seed: dict[str, Any]) -> None:
    seed["metadata"]["name"] = "Bad_Name"
    seed["resource"]["cuont"] = 1
    seed["tuning"]["metod"] = seed["tuning"].pop("method")
    seed["tuning"]["preset"]["name"] = "phi-3-mini-128k-instrct"
    seed["tuning"]["input"]["image"] = "a/b"
    del seed["tuning"]["output"]["imagePushSecret"]
    told = "\n".join(faults(seed))
    assert 'resource.cuont: unknown key "cuont" (did you mean "count"?)' in told
    assert 'tuning.metod: unknown key "metod" (did you mean "method"?)' in told
    assert "tuning.method: is required" in told
    assert "metadata.name: 'Bad_Name' is not a DNS-1123 label" in told
    assert "Unsupported tuning preset name phi-3-mini-128k-instrct" in told
    assert "phi-3-mini-128k-instruct" in told
    assert "tuning.input: Exactly one of URLs, Volume, or Image must be specified" in told
    assert "tuning.output.imagePushSecret: Must specify imagePushSecret with destination image" in told


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tuning": None}, "Either Inference or Tuning must be specified, not neither"),
        ({"inference": {"preset": {"name": "phi-4"}}}, "Either Inference or Tuning must be specified, but not both"),
        ({"resource": None}, "resource: "),
        ({"resource": {"labelSelector": {}, "count": 0}}, "resource.count: Input should be greater than or equal to 1"),
        ({"resource": {}}, "resource.labelSelector: is required"),
        ({"apiVersion": "kaito.sh/v1"}, "apiVersion: 'kaito.sh/v1' is not known"),
        ({"apiVersion": 1}, "apiVersion: 1 is not known"),
        ({"spec": {}}, 'spec: unknown key "spec"'),
        ({"metadata": {}}, "metadata.name: is required"),
        ({"metadata": {"name": "a" * 64}}, "is not a DNS-1123 label"),
    ],
)
def test_a_document_that_is_wrong_is_refused(seed: dict[str, Any], change: dict[str, Any], fault: str) -> None:
    assert any(fault in told for told in faults({**seed, **change}))


def test_several_nodes_tune_in_a_cluster_and_not_on_this_machine(seed: dict[str, Any]) -> None:
    seed["resource"]["count"] = 2
    assert parse_workspace(seed, "kubernetes").workspace.resource.count == 2
    (fault,) = faults(seed, platform="local")
    assert fault.startswith("resource.count: Tuning does not currently support multinode configurations.")


@pytest.mark.parametrize(
    ("section", "value", "fault"),
    [
        ("method", "full", "tuning.method: 'full' is not 'qlora' or 'lora'"),
        ("input", {}, "Exactly one of URLs, Volume, or Image must be specified"),
        ("input", {"volume": {}}, "KAITO's key is `volumeSource`"),
        ("input", {"urls": ["https://a/b"], "volumeSource": {"emptyDir": {}}}, "Exactly one of"),
        ("input", {"urls": "https://a/b"}, "tuning.input.urls: Input should be a valid list"),
        ("input", {"urls": ["ftp://a/b"]}, "the scheme 'ftp' is not http or https"),
        ("input", {"urls": ["http://127.0.0.1/x"]}, "loopback, private or link-local"),
        ("input", {"urls": ["http://[::1]/x"]}, "loopback, private or link-local"),
        ("input", {"urls": ["http://169.254.169.254/x"]}, "loopback, private or link-local"),
        ("input", {"urls": ["http://10.0.0.1/x"]}, "loopback, private or link-local"),
        ("input", {"urls": ["http://a.localhost/x"]}, "the host 'a.localhost' is not allowed"),
        ("input", {"urls": ["http://metadata.google.internal/x"]}, "is not allowed"),
        ("input", {"urls": ["file:///etc/passwd"]}, "a file URL means nothing to a pod"),
        ("input", {"urls": ["https://[bad/x"]}, "is not a URL"),
        ("input", {"image": "A/B"}, "tuning.input.image: not an image reference"),
        ("output", {}, "Exactly one of Volume or Image must be specified"),
        ("output", {"image": "a/b", "imagePushSecret": "s", "volumeSource": {"emptyDir": {}}}, "Exactly one of"),
        ("output", {"image": "a//b", "imagePushSecret": "s"}, "tuning.output.image: not an image reference"),
        ("output", {"image": "a/b"}, "Must specify imagePushSecret with destination image"),
        ("output", {"image": "a/b@sha256:" + "0" * 64, "imagePushSecret": "s"}, "a digest cannot be written to"),
        ("output", {"image": "a/b:run-1", "imagePushSecret": "s"}, "those that kaito-flows gives itself"),
        ("preset", {}, "tuning.preset.name: is required"),
        ("preset", {"name": "gpt-5"}, "Unsupported tuning preset name gpt-5"),
    ],
)
def test_a_tuning_section_that_is_wrong_is_refused(seed: dict[str, Any], section: str, value: Any, fault: str) -> None:
    seed["tuning"][section] = value
    assert any(fault in told for told in faults(seed))


def test_a_file_url_and_a_missing_push_secret_are_fine_on_this_machine(seed: dict[str, Any]) -> None:
    seed["tuning"]["input"] = {"urls": ["file:///data/a.parquet"]}
    seed["tuning"]["output"] = {"image": "a/b"}
    assert parse_workspace(seed, "local").workspace.tuning is not None


def test_a_relative_file_url_is_relative_to_its_file(tmp_path: Path, seed: dict[str, Any]) -> None:
    seed["tuning"]["input"]["urls"] = ["file:data/a%20b.parquet"]
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(seed))
    tuning = load_workspace(tmp_path / "w.yaml", "local").workspace.tuning
    assert tuning is not None
    assert tuning.input.urls == [(tmp_path / "data/a b.parquet").as_uri()]


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("a: [", "invalid-yaml", "w.yaml:1:"),
        ("a: b: c", "invalid-yaml", "mapping values are not allowed"),
        ("", "invalid-yaml", "holds 0 Workspaces"),
        ("just words", "invalid-yaml", "holds 0 Workspaces, not one (documents: str)"),
        ("kind: ConfigMap", "invalid-yaml", "(documents: ConfigMap)"),
        ("kind: Workspace\n---\nkind: Workspace\n", "invalid-yaml", "holds 2 Workspaces"),
        ("kind: Workspace", "invalid-value", "apiVersion"),
        ("kind: Workspace\nname: 2024-13-45", "invalid-yaml", "month must be in 1..12"),
    ],
)
def test_a_file_that_is_no_workspace_is_refused_with_its_place(tmp_path: Path, text: str, code: str, told: str) -> None:
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_workspace(tmp_path / "w.yaml", "local")
    assert caught.value.code == code
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file-not-found"):
        load_workspace(tmp_path / "absent.yaml", "local")
    with pytest.raises(InputError, match="file-not-readable"):
        load_workspace(tmp_path, "local")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="file-not-readable"):
        load_workspace(tmp_path / "binary.yaml", "local")


def test_the_parameters_of_a_file_make_the_same_workspace_again(tmp_path: Path, seed: dict[str, Any]) -> None:
    seed["tuning"]["config"] = "optimized-phi3-tuning"
    (tmp_path / "w.yaml").write_text(CONFIG_MAP + "---\n" + yaml.safe_dump(copy.deepcopy(seed)))
    loaded = load_workspace(tmp_path / "w.yaml", "kubernetes")
    parameters = loaded.as_parameters()
    assert parameters["workspace"] == seed
    again = parse_workspace(parameters["workspace"], "kubernetes", training_config=parameters["training_config"])
    assert again == loaded


@pytest.mark.parametrize("urls", ["https://bob:hunter2@h.io/d?sig=SECRET", ["https://bob:hunter2@/d?sig=SECRET"]])
def test_a_fault_in_a_url_does_not_tell_its_secrets(seed: dict[str, Any], urls: Any) -> None:
    seed["tuning"]["input"]["urls"] = urls
    told = "\n".join(faults(seed))
    assert "tuning.input.urls" in told
    assert "hunter2" not in told
    assert "SECRET" not in told
