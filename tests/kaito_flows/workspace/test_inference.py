"""Workspaces that serve: KAITO's rules, at create as at update, and ours where a file would be passed over."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_flows.errors import WorkspaceError
from kaito_flows.presets.loader import load_preset
from kaito_flows.workspace import WorkspaceV1beta1, load_workspace, parse_workspace, validation

# KAITO's example of adapters, its removed preset and size replaced.
SERVED = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata:
  name: workspace-phi-3-adapters
resource:
  instanceType: "Standard_NC24ads_A100_v4"
  labelSelector:
    matchLabels:
      apps: phi-3
inference:
  preset:
    name: phi-3-mini-128k-instruct
  config: inference-params
  adapters:
    - source:
        name: "glosses"
        image: "registry.example.com/glosses:0.0.1"
        imagePullSecrets: [registry]
      strength: "0.2"
    - source:
        name: "verses.v2"
        volumeSource:
          persistentVolumeClaim: {claimName: verses}
"""
CONFIG_MAP = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: inference-params
data:
  inference_config.yaml: |
    max_probe_steps: 0
    vllm:
      max-model-len: 8192
"""


@pytest.fixture
def served() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(SERVED)
    del document["inference"]["config"]
    return document


def adapters(document: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document["inference"]["adapters"]
    return found


def faults(document: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(WorkspaceError) as caught:
        parse_workspace(document, options.pop("platform", "kubernetes"), **options)
    return [str(fault) for fault in caught.value.faults]


def test_an_inference_workspace_is_read_with_its_adapters_and_its_config(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(f"{SERVED}---\n{CONFIG_MAP}")
    loaded = load_workspace(tmp_path / "w.yaml", "kubernetes")
    inference = loaded.workspace.inference
    assert isinstance(loaded.workspace, WorkspaceV1beta1)
    assert inference is not None and loaded.training_config is None
    assert [(adapter.source.name, adapter.strength) for adapter in inference.adapters] == [
        ("glosses", "0.2"), ("verses.v2", "1.0"),
    ]  # fmt: skip
    assert loaded.inference_config is not None and loaded.inference_config.max_model_len == 8192
    parameters = loaded.as_parameters()
    assert set(parameters) == {"workspace", "inference_config"}
    assert (
        parse_workspace(parameters["workspace"], "kubernetes", inference_config=parameters["inference_config"])
        == loaded
    )


def test_without_a_config_nothing_is_asked_for(served: dict[str, Any]) -> None:
    loaded = parse_workspace(served, "kubernetes")
    assert loaded.inference_config is not None and loaded.inference_config.max_model_len is None
    assert loaded.as_parameters() == {"workspace": served}


def test_the_base_model_alone_can_be_served(served: dict[str, Any]) -> None:
    del served["inference"]["adapters"]
    inference = parse_workspace(served, "kubernetes").workspace.inference
    assert inference is not None and inference.adapters == []


def test_a_config_map_that_is_missing_is_a_fault(served: dict[str, Any]) -> None:
    served["inference"]["config"] = "absent"
    assert faults(served)[0].startswith("inference.config: no ConfigMap 'absent' in the file")
    training = {"kind": "ConfigMap", "metadata": {"name": "absent"}, "data": {"training_config.yaml": "a: b"}}
    assert faults(served, config_maps=[training]) == [
        "inference.config: ConfigMap 'absent' has no key 'inference_config.yaml'"
    ]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"source": {}}, "inference.adapters[0].source.name: Name of Adapter must be specified"),
        ({"source": {"name": "a"}}, "inference.adapters[0].source: Exactly one of Image or Volume must be specified"),
        ({"source": {"name": "a", "volume": {}}}, "KAITO's key is `volumeSource`"),
        ({"source": {"name": "a", "image": "b", "volumeSource": {"emptyDir": {}}}}, "Exactly one of Image or Volume"),
        ({"source": {"name": "a", "urls": ["https://a/b"]}}, "source.urls: URLs are not supported for adapters"),
        ({"source": {"name": "a" * 254, "image": "b"}}, "is not a DNS-1123 subdomain"),
        ({"source": {"name": "A_b", "image": "b"}}, "'A_b' is not a DNS-1123 subdomain"),
        ({"source": {"name": "a..b", "image": "b"}}, "'a..b' is not a DNS-1123 subdomain"),
        ({"source": {"name": "verses.v2", "image": "b"}}, "adapters[1].source.name: Duplicate adapter source name"),
        ({"source": {"name": "phi-3-mini-128k-instruct", "image": "b"}}, "is the base model's name"),
        ({"source": {"name": "a", "image": "A/B"}}, "inference.adapters[0].source.image: not an image reference"),
        ({"strength": "strong"}, "inference.adapters[0].strength: 'strong' is not a number from 0 to 1"),
        ({"strength": "1.5"}, "'1.5' is not a number from 0 to 1"),
        ({"strength": "-0.1"}, "'-0.1' is not a number from 0 to 1"),
        ({"strength": "nan"}, "'nan' is not a number from 0 to 1"),
        ({"strength": 0.5}, "inference.adapters[0].strength: Input should be a valid string"),
    ],
)
def test_an_adapter_that_is_wrong_is_refused_at_create(
    served: dict[str, Any], changes: dict[str, Any], fault: str
) -> None:
    adapters(served)[0].update(changes)
    assert any(fault in told for told in faults(served))


def test_an_adapter_needs_a_source(served: dict[str, Any]) -> None:
    adapters(served)[0] = {"strength": "0.5"}
    assert faults(served) == ["inference.adapters[0].source: is required (add it)"]


def test_ten_adapters_are_served_and_not_eleven(served: dict[str, Any]) -> None:
    served["inference"]["adapters"] = [{"source": {"name": f"a{i}", "image": "b"}} for i in range(10)]
    assert parse_workspace(served, "kubernetes").workspace.inference is not None
    adapters(served).append({"source": {"name": "a10", "image": "b"}})
    assert "at most 10 items" in faults(served)[0]


def test_strengths_may_be_anything_from_none_to_all(served: dict[str, Any]) -> None:
    for strength in ("0", "0.0", "1", "1.0", ".5", "1e-3"):
        adapters(served)[0]["strength"] = strength
        assert parse_workspace(served, "kubernetes").workspace.inference is not None


@pytest.mark.parametrize("document", [{}, {"preset": {"name": "phi-4"}, "template": {"spec": {}}}])
def test_exactly_one_of_preset_and_template_is_served(served: dict[str, Any], document: dict[str, Any]) -> None:
    served["inference"] = document
    assert faults(served) == ["inference: Exactly one of Preset or Template must be specified"]


def test_a_template_has_neither_adapters_nor_a_config_of_ours(served: dict[str, Any]) -> None:
    served["inference"] = {"template": {"spec": {"containers": []}}}
    loaded = parse_workspace(served, "kubernetes")
    assert loaded.inference_config is None
    served["inference"] |= {"config": "c", "adapters": [{"source": {"name": "a", "image": "b"}}]}
    assert [fault.split(":")[0] for fault in faults(served)] == ["inference.config", "inference.adapters"]


def test_one_pod_serves_a_preset_and_a_template_decides_for_itself(served: dict[str, Any]) -> None:
    served["resource"]["count"] = 2
    assert faults(served) == [
        "resource.count: 2 nodes, but one pod serves a preset, on one node"
        " (write 1; for more replicas, a Workspace each)"
    ]
    served["inference"] = {"template": {"spec": {"containers": []}}}
    assert parse_workspace(served, "kubernetes").workspace.resource.count == 2


@pytest.mark.parametrize(
    ("gated", "given", "fault"),
    [
        (True, False, "This preset requires a modelAccessSecret"),
        (True, True, ""),
        (False, True, "This preset does not require a modelAccessSecret"),
        (False, False, ""),
        (None, True, ""),  # no source says whether the Hub asks for acceptance
        (None, False, ""),
    ],
)
def test_a_gated_model_needs_the_secret_and_no_other_takes_it(
    served: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gated: bool | None, given: bool, fault: str
) -> None:
    preset = load_preset("phi-3-mini-128k-instruct").model_copy(update={"gated": gated})
    monkeypatch.setattr(validation, "load_preset", lambda name: preset)
    if given:
        served["inference"]["preset"]["presetOptions"] = {"modelAccessSecret": "hub"}
    if fault:
        (told,) = faults(served)
        assert told.startswith(f"inference.preset.presetOptions.modelAccessSecret: {fault}")
    else:
        assert parse_workspace(served, "kubernetes").workspace.inference is not None


def test_a_placeholder_in_an_adapters_image_is_named(served: dict[str, Any]) -> None:
    adapters(served)[0]["source"]["image"] = "ACR_REPO_HERE.azurecr.io/adapter:0.0.1"
    (fault,) = parse_workspace(served, "kubernetes").placeholders
    assert fault.path == "inference.adapters[0].source.image"


def test_a_length_that_the_model_does_not_read_is_refused(served: dict[str, Any]) -> None:
    served["inference"]["preset"]["name"] = "phi-3-mini-4k-instruct"
    text = "vllm: {max-model-len: 8192}"
    assert faults(copy.deepcopy(served), inference_config=text) == [
        "inference_config.yaml: vllm.max-model-len: 8192 tokens; phi-3-mini-4k-instruct reads 4096 (write 4096 or less)"
    ]


def test_every_fault_is_told_at_once(served: dict[str, Any]) -> None:
    served["inference"]["preset"]["name"] = "phi-5"
    adapters(served)[0]["strength"] = "2"
    adapters(served)[1]["source"]["urls"] = ["https://a/b"]
    told = "\n".join(faults(served, inference_config="vllm: {port: 1, max-model-len: none}\nmax_probe_steps: 6"))
    for part in ("Unsupported inference preset name phi-5", "'2' is not a number", "URLs are not supported",
                 'unknown key "port"', "vllm.max-model-len", "max_probe_steps: 6 is not 0"):  # fmt: skip
        assert part in told
