"""Adapters in a registry that asks for a password, in our form of an image and in KAITO's."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.containers.program import read_job
from kaito_flows.containers.server.inputs import check_adapter, unpack_adapter
from kaito_flows.containers.server.job import ServerJob
from kaito_flows.errors import AccessError, ImageError
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.images import build_image
from kaito_flows.oci.registry import RegistryRepository

from .conftest import write_job

pytestmark = pytest.mark.registry

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def repository(registry: Any, monkeypatch: pytest.MonkeyPatch) -> RegistryRepository:
    monkeypatch.setenv("DOCKER_CONFIG", str(registry.config_folder))
    return RegistryRepository(registry.host, "team/adapters", Credentials.from_dockerconfig(registry.dockerconfig))


def job_with(image: str, weights: Path, root: Path) -> ServerJob:
    named = [{"name": "glosses", "image": image, "strength": 0.5}]
    return read_job(write_job(root, weights, {}, adapters=named), ServerJob)


def push_as_kaito_does(repository: RegistryRepository, folder: Path) -> str:
    """One gzip layer that holds `data/`, a config with diff ids alone, and the annotation of KAITO's pusher."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name in FILES:
            tar.add(folder / name, f"data/{name}")
    layer = repository.put_blob([gzip.compress(raw.getvalue(), mtime=0)], "application/vnd.oci.image.layer.v1.tar+gzip")
    config = json.dumps({"rootfs": {"diff_ids": [layer.digest]}}).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": repository.put_blob([config], "application/vnd.oci.image.config.v1+json").as_dict(),
        "layers": [layer.as_dict()],
        "annotations": {"sh.kaito.model.name": "phi-3"},
    }
    return repository.reference(repository.put_manifest(manifest).digest)


@pytest.mark.parametrize("form", ["ours", "kaito's"])
def test_an_adapter_comes_from_a_registry(
    repository: RegistryRepository, weights: Path, adapters: dict[str, Path], tmp_path: Path, form: str
) -> None:
    folder = adapters["glosses"]
    if form == "ours":
        layers = [{f"data/{name}": (folder / name).read_bytes()} for name in reversed(FILES)]
        image = build_image(repository, layers, annotations={}).reference
    else:
        image = push_as_kaito_does(repository, folder)
    assert image.startswith("docker://127.0.0.1:") and "@sha256:" in image
    job = job_with(image, weights, tmp_path)
    check_adapter(job, job.adapters[0])
    unpacked = unpack_adapter(job, job.adapters[0])
    assert unpacked == tmp_path / "mnt" / "adapter" / "glosses"
    for name in FILES:
        assert (unpacked / name).read_bytes() == (folder / name).read_bytes()


def test_a_registry_that_says_no_and_an_image_that_is_not_there_are_told_apart(
    repository: RegistryRepository, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = job_with(repository.reference("absent"), weights, tmp_path)
    with pytest.raises(ImageError) as not_found:
        check_adapter(absent, absent.adapters[0])
    assert not_found.value.code == "image-not-found"
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(AccessError) as refused:
        check_adapter(absent, absent.adapters[0])
    assert refused.value.code == "pull-refused"
