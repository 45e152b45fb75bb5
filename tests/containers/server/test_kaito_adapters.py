"""The server takes adapters from a registry, KAITO's own among them."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.containers.program import read_job
from kaito_flows.containers.server.inputs import check_adapter, unpack_adapter
from kaito_flows.containers.server.job import Adapter, ServerJob
from kaito_flows.errors import AccessError
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.images import open_repository
from kaito_flows.oci.repository import MANIFEST_TYPE

from .conftest import write_job

pytestmark = pytest.mark.registry


@pytest.fixture
def kaitos(registry: Any, adapters: dict[str, Path]) -> Adapter:
    """An adapter as KAITO's pusher makes it: one layer of tar and gzip, a config without os and architecture."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(adapters["glosses"], "data")
    credentials = Credentials.from_dockerconfig(registry.dockerconfig)
    repository = open_repository(f"docker://{registry.host}/team/kaito", credentials)
    config = repository.put_blob([b'{"rootfs":{"diff_ids":[]}}'], "application/vnd.oci.image.config.v1+json")
    layer = repository.put_blob([gzip.compress(out.getvalue(), mtime=0)], "application/vnd.oci.image.layer.v1.tar+gzip")
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config.as_dict(), "layers": [layer.as_dict()],
    }  # fmt: skip
    repository.tag("latest", repository.put_manifest(manifest))
    return Adapter("kaito", repository.reference("latest"))


def test_kaitos_adapter_is_checked_and_unpacked(
    registry: Any, kaitos: Adapter, adapters: dict[str, Path], weights: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DOCKER_CONFIG", str(registry.config_folder))
    job = read_job(write_job(tmp_path, weights, {kaitos.name: kaitos.image}), ServerJob)
    check_adapter(job, kaitos)
    folder = unpack_adapter(job, kaitos)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (adapters["glosses"] / name).read_bytes()


def test_an_adapter_that_may_not_be_pulled_is_told(
    kaitos: Adapter, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    job = read_job(write_job(tmp_path, weights, {kaitos.name: kaitos.image}), ServerJob)
    with pytest.raises(AccessError, match="pull-refused: docker://"):
        check_adapter(job, kaitos)
