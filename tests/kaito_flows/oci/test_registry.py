"""A real registry with user and password: what is pushed comes back, and what is refused is told in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.errors import AccessError, ImageError, RegistryError
from kaito_flows.oci.credentials import Credentials
from kaito_flows.oci.images import build_image, extract, find_image, open_image, open_repository, read_file, retag
from kaito_flows.oci.layout import Layout
from kaito_flows.oci.registry import RegistryRepository
from kaito_flows.oci.repository import Repository
from kaito_flows.oci.session import Retries

pytestmark = pytest.mark.registry

LAYERS = [{"data/weights": b"w" * 2_500_000}, {"data/config.json": b"{}", "data/README.md": b"# It"}]


@pytest.fixture
def repository(registry: Any, request: pytest.FixtureRequest) -> RegistryRepository:
    """A repository of the test's own."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return RegistryRepository(registry.host, f"team/{name}", Credentials.from_dockerconfig(registry.dockerconfig))


def storage_of(registry: Any, repository: RegistryRepository) -> Path:
    return registry.storage / "docker/registry/v2/repositories" / repository.repository


def test_the_digests_in_a_registry_are_those_of_a_folder(repository: RegistryRepository, tmp_path: Path) -> None:
    both: list[Repository] = [repository, Layout(tmp_path)]
    images = [build_image(r, LAYERS, annotations={"k": "v"}, tag="one") for r in both]
    assert images[0].digest == images[1].digest
    assert repository.tags() == Layout(tmp_path).tags() == {"one": images[0].digest}
    assert repository.manifest("one") == Layout(tmp_path).manifest("one")
    assert repository.descriptor("one") == Layout(tmp_path).descriptor("one")


def test_what_is_pushed_is_pulled(repository: RegistryRepository, tmp_path: Path) -> None:
    pushed = build_image(repository, LAYERS, annotations={"k": "v"}, tag="one")
    image = find_image(repository, "one")
    assert (image.digest, image.annotations) == (pushed.digest, {"k": "v"})
    assert image.reference == f"docker://{repository.registry}/{repository.repository}@{pushed.digest}"
    extract(image, tmp_path / "out")
    assert (tmp_path / "out/data/weights").read_bytes() == b"w" * 2_500_000
    assert read_file(image, "data/README.md") == b"# It"
    assert repository.has("one") and repository.has(pushed.digest)


def test_an_image_is_opened_by_its_text_with_the_login_of_docker(
    registry: Any, repository: RegistryRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = build_image(repository, LAYERS, annotations={}, tag="one")
    monkeypatch.setenv("DOCKER_CONFIG", str(registry.config_folder))
    assert open_image(repository.reference("one")).digest == pushed.digest
    assert open_image(pushed.reference).digest == pushed.digest
    assert open_repository(pushed.reference).tags() == {"one": pushed.digest}


def test_a_tag_moves_and_the_old_digest_stays(repository: RegistryRepository) -> None:
    first = build_image(repository, [{"data/a": b"1"}], annotations={}, tag="latest")
    second = build_image(repository, [{"data/a": b"2"}], annotations={}, tag="latest")
    assert repository.tags() == {"latest": second.digest}
    assert repository.has(first.digest)
    retag(first, "latest")
    assert repository.resolve("latest") == first.digest


def test_untagging_keeps_what_another_tag_points_at(repository: RegistryRepository) -> None:
    image = build_image(repository, LAYERS, annotations={}, tag="checkpoint")
    retag(image, "latest")
    repository.untag("checkpoint")
    assert repository.resolve("latest") == image.digest
    assert repository.has("latest")
    repository.untag("never-there")


def test_untagging_the_last_tag_is_done_where_the_registry_can(repository: RegistryRepository) -> None:
    image = build_image(repository, LAYERS, annotations={}, tag="checkpoint")
    repository.untag("checkpoint")
    assert repository.tags() == {}
    assert not repository.has("checkpoint")
    # This registry drops no tags, so the manifest went.
    assert not repository.has(image.digest)


def test_a_blob_that_is_there_is_not_sent_again(repository: RegistryRepository) -> None:
    class Counted:
        iterated = 0

        def __iter__(self) -> Iterator[bytes]:
            Counted.iterated += 1
            yield b"abc"

    first = repository.put_blob(Counted(), "text/plain")
    assert Counted.iterated == 2
    assert repository.put_blob(Counted(), "text/plain") == first
    assert Counted.iterated == 3
    with repository.open_blob(first.digest) as blob:
        assert blob.read() == b"abc"


def test_bytes_that_can_be_had_only_once_are_refused(repository: RegistryRepository) -> None:
    with pytest.raises(TypeError, match="more than once"):
        repository.put_blob(iter([b"abc"]), "text/plain")


@pytest.mark.parametrize("second", [b"other", b"short", b"much longer than it was"], ids=["other", "short", "long"])
def test_files_that_change_while_they_are_sent_leave_no_image(repository: RegistryRepository, second: bytes) -> None:
    class Changing:
        given = (b"first", second)
        turn = -1

        def __iter__(self) -> Iterator[bytes]:
            Changing.turn += 1
            yield self.given[min(self.turn, 1)] if len(second) != 5 or self.turn == 0 else second

    with pytest.raises(ImageError, match="files-changed"):
        repository.put_blob(Changing(), "text/plain")


@pytest.mark.parametrize("reference", ["absent", "sha256:" + "0" * 64])
def test_what_is_not_there_is_not_found(repository: RegistryRepository, reference: str) -> None:
    with pytest.raises(ImageError, match="image-not-found"):
        repository.resolve(reference)
    with pytest.raises(ImageError, match="image-not-found"):
        repository.manifest(reference)
    assert not repository.has(reference)
    assert repository.tags() == {}


def test_an_image_with_a_missing_layer_is_not_had(registry: Any, repository: RegistryRepository) -> None:
    image = build_image(repository, [{"data/a": b"only here"}], annotations={}, tag="latest")
    digest = repository.manifest("latest")["layers"][0]["digest"]
    link = storage_of(registry, repository) / "_layers/sha256" / digest.removeprefix("sha256:") / "link"
    link.unlink()
    assert not repository.has("latest")
    assert not repository.has(image.digest)


def test_many_tags_come_in_pages(repository: RegistryRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kaito_flows.oci.registry._TAGS_A_PAGE", 3)
    image = build_image(repository, [{"data/a": b"1"}], annotations={})
    for i in range(8):
        retag(image, f"t{i}")
    assert repository.tags() == {f"t{i}": image.digest for i in range(8)}


def test_a_damaged_layer_is_told_by_its_digest(registry: Any, repository: RegistryRepository, tmp_path: Path) -> None:
    image = build_image(repository, [{"data/a": b"to be damaged"}], annotations={}, tag="latest")
    digest = repository.manifest("latest")["layers"][0]["digest"].removeprefix("sha256:")
    stored = registry.storage / "docker/registry/v2/blobs/sha256" / digest[:2] / digest / "data"
    stored.write_bytes(stored.read_bytes().replace(b"to be damaged", b"that is other"))
    with pytest.raises(ImageError, match="image-damaged"):
        read_file(image, "data/a")
    with pytest.raises(ImageError, match="image-damaged"):
        extract(image, tmp_path / "out")


def test_the_right_to_push_is_known_beforehand_and_nothing_is_left(
    registry: Any, repository: RegistryRepository
) -> None:
    repository.probe_push()
    # The registry keeps a hash of nothing, and no upload.
    assert not list((storage_of(registry, repository) / "_uploads").glob("*/data"))
    assert repository.tags() == {}


@pytest.mark.parametrize("act", ["probe", "push", "pull"])
def test_a_wrong_password_is_refused_in_one_line_without_it(registry: Any, act: str) -> None:
    raw = json.dumps({"auths": {registry.host: {"username": "jane", "password": "hunter2"}}}).encode()
    repository = RegistryRepository(registry.host, "team/x", Credentials.from_dockerconfig(raw, place="secret/push"))
    acts = {
        "probe": repository.probe_push,
        "push": lambda: build_image(repository, LAYERS, annotations={}, tag="t"),
        "pull": lambda: repository.manifest("latest"),
    }
    with pytest.raises(AccessError) as refused:
        acts[act]()
    text = str(refused.value)
    assert refused.value.code == ("pull-refused" if act == "pull" else "push-refused")
    assert f"used secret/push: {registry.host}" in text
    assert "hunter2" not in text and "\n" not in text


def test_a_secret_for_another_registry_is_named(registry: Any) -> None:
    raw = json.dumps({"auths": {"other.example": {"username": "jane", "password": "hunter2"}}}).encode()
    repository = RegistryRepository(registry.host, "team/x", Credentials.from_dockerconfig(raw, place="secret/push"))
    with pytest.raises(AccessError, match=f"push-refused.*other.example.*an entry for {registry.host}") as refused:
        repository.probe_push()
    assert "hunter2" not in str(refused.value)


def test_a_secret_that_is_renewed_is_used_at_once(
    registry: Any, repository: RegistryRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "secrets" / "push"
    mounted.mkdir(parents=True)
    monkeypatch.setattr("kaito_flows.oci.credentials.SECRETS", tmp_path / "secrets")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
    mine = open_repository(repository.reference("latest"))
    with pytest.raises(AccessError, match="no credentials in"):
        mine.probe_push()
    (mounted / ".dockerconfigjson").write_bytes(registry.dockerconfig)
    mine.probe_push()


def test_a_registry_that_does_not_listen_is_told_after_some_tries() -> None:
    repository = RegistryRepository("127.0.0.1:1", "team/x", retries=Retries(attempts=2, first_seconds=0.01))
    with pytest.raises(RegistryError, match=r"registry-unavailable: docker://127.0.0.1:1/team/x: no answer"):
        repository.resolve("latest")


def test_docker_containerd_and_kaitos_puller_know_the_media_types(repository: RegistryRepository) -> None:
    build_image(repository, LAYERS, annotations={}, tag="latest")
    assert repository.descriptor("latest").media_type == "application/vnd.oci.image.manifest.v1+json"
    manifest = repository.manifest("latest")
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert {layer["mediaType"] for layer in manifest["layers"]} == {"application/vnd.oci.image.layer.v1.tar"}
    with repository.open_blob(manifest["config"]["digest"]) as blob:
        config = json.loads(blob.read())
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    assert config["rootfs"] == {"type": "layers", "diff_ids": [layer["digest"] for layer in manifest["layers"]]}
