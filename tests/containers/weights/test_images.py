"""A base model from an OCI image, however its files lie in it."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.canonical import canonical_json
from kaito_flows.oci.images import build_image, open_repository
from kaito_flows.oci.layout import Layout

Run = Callable[..., Any]

FILES = {
    "config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ m }}",
    "model.safetensors": b"tensors",
}  # fmt: skip


def make_image(folder: Path, *layers: dict[str, bytes]) -> dict[str, str]:
    build_image(Layout(folder), layers, annotations={}, tag="v1")
    return {"kind": "image", "image": f"oci:{folder}:v1"}


@pytest.mark.parametrize("inside", ["", "model/", "data/", "workspace/weights/", "opt/models/tiny/"])
def test_the_folder_that_holds_a_model_is_found(tmp_path: Path, run_weights: Run, inside: str) -> None:
    layer = {f"{inside}{name}": content for name, content in FILES.items()}
    source = make_image(tmp_path / "image", {"etc/passwd": b"", "usr/share/x/tokenizer.json": b"other"}, layer)
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache")
    assert outcome.exit_code == 0, outcome.stderr
    assert set(outcome.last["files"]) == {*FILES, "source.json"}
    assert (tmp_path / "root/workspace/weights/tokenizer.json").read_bytes() == b"{}"


def test_later_layers_lie_over_earlier_ones_and_hide_what_they_say(tmp_path: Path, run_weights: Run) -> None:
    first = {f"model/{name}": content for name, content in FILES.items()} | {"old/config.json": b"old"}
    second = {"model/config.json": b'{"new": 1}', "model/.wh.chat_template.jinja": b"", "old/.wh..wh..opq": b""}
    outcome = run_weights(tmp_path / "root", make_image(tmp_path / "image", first, second), tmp_path / "cache")
    assert outcome.exit_code == 0, outcome.stderr
    assert "chat_template.jinja" not in outcome.last["files"]
    assert (tmp_path / "root/workspace/weights/config.json").read_bytes() == b'{"new": 1}'


def test_only_the_tokenizer_is_taken_when_only_that_is_asked_for(tmp_path: Path, run_weights: Run) -> None:
    source = make_image(tmp_path / "image", {f"data/{name}": content for name, content in FILES.items()})
    outcome = run_weights(tmp_path / "root", source, tmp_path / "cache", {"parts": "tokenizer"})
    assert set(outcome.last["files"]) == {*FILES, "tokenizer-source.json"} - {"model.safetensors"}


def test_pickles_and_code_are_left_in_the_image(tmp_path: Path, run_weights: Run) -> None:
    pickles = {"data/pytorch_model.bin": b"pickle", "data/modeling_x.py": b"code", "data/tokenizer.bin": b"pickle"}
    layer = {f"data/{name}": content for name, content in FILES.items() if name != "model.safetensors"} | pickles
    outcome = run_weights(tmp_path / "root", make_image(tmp_path / "image", layer), tmp_path / "cache")
    assert (outcome.exit_code, outcome.last["code"]) == (12, "weights-not-safetensors")
    assert not (tmp_path / "root/workspace/weights").exists()


def test_an_image_without_a_model_is_refused(tmp_path: Path, run_weights: Run) -> None:
    outcome = run_weights(tmp_path / "root", make_image(tmp_path / "image", {"x": b""}), tmp_path / "cache")
    assert (outcome.exit_code, outcome.last["code"]) == (12, "weights-not-found")
    outcome = run_weights(tmp_path / "root", {"kind": "image", "image": "oci:/nowhere:v1"}, tmp_path / "cache")
    assert (outcome.exit_code, outcome.last["code"]) == (17, "image-not-found")


def test_nothing_is_written_outside_of_the_folder(tmp_path: Path, run_weights: Run) -> None:
    layer = FILES | {"../../../../escaped/config.json": b"out"}
    outcome = run_weights(tmp_path / "root", make_image(tmp_path / "image", layer), tmp_path / "cache")
    assert outcome.exit_code == 0, outcome.stderr
    assert not list(tmp_path.rglob("escaped"))


def test_an_image_with_compressed_layers_comes_from_a_registry(tmp_path: Path, run_weights: Run, registry: Any) -> None:
    image = f"{registry.host}/models/tiny:v1"
    env = {"DOCKER_CONFIG": str(registry.config_folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", env["DOCKER_CONFIG"])
        push_compressed(f"docker://{image}", {f"workspace/weights/{name}": content for name, content in FILES.items()})
    outcome = run_weights(tmp_path / "root", {"kind": "image", "image": image}, tmp_path / "cache", **env)
    assert outcome.exit_code == 0, outcome.stderr
    assert (tmp_path / "root/workspace/weights/model.safetensors").read_bytes() == b"tensors"
    outcome = run_weights(tmp_path / "other", {"kind": "image", "image": image}, tmp_path / "cache", DOCKER_CONFIG="/x")
    assert (outcome.exit_code, outcome.last["code"]) == (19, "pull-refused")


def push_compressed(image: str, files: dict[str, bytes]) -> None:
    """Push an image as Docker builds them: one gzip layer."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    repository = open_repository(image)
    layer = repository.put_blob([gzip.compress(packed.getvalue())], "application/vnd.oci.image.layer.v1.tar+gzip")
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
    described = repository.put_blob([canonical_json(config)], "application/vnd.oci.image.config.v1+json")
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described.as_dict(), "layers": [layer.as_dict()],
    }  # fmt: skip
    repository.tag("v1", repository.put_manifest(manifest))
