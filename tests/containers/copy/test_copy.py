"""A volume becomes an image and an image fills a volume; what cannot be copied is told in one line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.containers.copy import volume
from kaito_flows.containers.copy.__main__ import copy
from kaito_flows.containers.copy.job import CopyJob
from kaito_flows.errors import AccessError, DiskFullError, ImageError, InputError
from kaito_flows.oci.images import build_image, open_image, read_file
from kaito_flows.oci.layout import Layout

FILES = {"train.jsonl": b"rows", "deep/er/b.parquet": b"2" * 1000, ".hidden": b"", "ümlaut": b"u"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A volume with files, mounted at `/mnt/volume` of the root `tmp_path`."""
    folder = tmp_path / "mnt/volume"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def job(root: Path, source: str, target: str) -> CopyJob:
    return CopyJob(1, "tune", root, source, target)


def packed(root: Path) -> dict[str, Any]:
    return copy(job(root, "/mnt/volume", f"oci:{root}/registry:data"))


def found(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_volume_goes_into_an_image_and_comes_out_the_same(folder: Path, tmp_path: Path) -> None:
    facts = packed(tmp_path)
    assert (facts["files"], facts["bytes"]) == (4, 1005)
    assert read_file(open_image(facts["image"]), "data/train.jsonl") == b"rows"
    target = job(tmp_path, facts["image"], "/mnt/other")
    assert copy(target)["reused"] is False
    assert found(tmp_path / "mnt/other") == FILES | {volume.MARKER: facts["digest"].encode()}
    assert copy(target)["reused"] is True
    # What lies there now goes into the same image.
    again = copy(job(tmp_path, "/mnt/other", f"oci:{tmp_path}/registry:again"))
    assert again["digest"] == facts["digest"]


def test_the_same_files_give_the_same_digest_whatever_their_times_and_layers_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = packed(tmp_path)["digest"]
    for i, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (i, i))
    assert packed(tmp_path)["digest"] == first
    monkeypatch.setattr(volume, "LAYER_BYTES", 500)
    image = open_image(packed(tmp_path)["image"])
    assert len(Layout(tmp_path / "registry").manifest(image.digest)["layers"]) == 2
    assert [read_file(image, f"data/{name}") for name in FILES] == list(FILES.values())


def test_what_the_kubelet_and_file_systems_keep_there_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "mnt/volume"
    (folder / "..2026_11_25").mkdir(parents=True)
    (folder / "lost+found").mkdir()
    (folder / "lost+found/x").write_bytes(b"x")
    (folder / "..2026_11_25/rows.csv").write_bytes(b"rows")
    (folder / "..data").symlink_to("..2026_11_25")
    (folder / "rows.csv").symlink_to("..data/rows.csv")
    facts = packed(tmp_path)
    copy(job(tmp_path, facts["image"], "/out"))
    assert found(tmp_path / "out") == {"rows.csv": b"rows", volume.MARKER: facts["digest"].encode()}


@pytest.mark.parametrize(
    ("link", "target"),
    [("link", "/etc/passwd"), ("link", "../../outside"), ("deep/link", "nowhere"), ("link", "link"), ("link", "deep")],
    ids=["absolute", "climbing", "broken", "itself", "a folder"],
)
def test_a_link_that_cannot_be_followed_is_named(folder: Path, tmp_path: Path, link: str, target: str) -> None:
    (tmp_path / "outside").write_text("secret")
    (folder / link).symlink_to(target)
    with pytest.raises(InputError, match=f"volume-link: {folder / link}: a link to '{target}'"):
        packed(tmp_path)
    assert not (tmp_path / "registry").exists()


def test_a_socket_is_named(folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder):
        listener.bind("s")
    with pytest.raises(InputError, match=f"volume-file: {folder / 's'}: neither a file nor a folder"):
        packed(tmp_path)


@pytest.mark.parametrize(("make", "code"), [(True, "volume-empty"), (False, "volume-missing")])
def test_a_volume_with_nothing_in_it_is_refused(tmp_path: Path, make: bool, code: str) -> None:
    if make:
        (tmp_path / "mnt/volume/empty/folder").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{code}: {tmp_path}/mnt/volume: no "):
        packed(tmp_path)


@pytest.fixture
def somebody() -> Iterator[Path]:
    """A folder of root's, seen by a user who is not: file modes mean nothing to root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "mnt/volume").mkdir(parents=True)
    (folder / "mnt/volume/a").write_bytes(b"1")
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def as_somebody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["a", "."])
def test_what_may_not_be_read_is_named(somebody: Path, name: str) -> None:
    path = somebody / "mnt/volume" / name
    path.chmod(0)
    with as_somebody(), pytest.raises(InputError, match=r"volume-unreadable: .*Permission denied.*fsGroup"):
        packed(somebody)
    path.chmod(0o700)


def test_what_may_not_be_written_is_named(somebody: Path) -> None:
    facts = packed(somebody)
    for blob in (somebody / "registry/blobs/sha256").iterdir():
        blob.chmod(0o644)
    (somebody / "mnt/volume").chmod(0o555)
    with as_somebody(), pytest.raises(InputError, match=r"volume-unwritable: .*fsGroup"):
        copy(job(somebody, facts["image"], "/mnt/volume"))
    (somebody / "registry").chmod(0o555)
    (somebody / "registry/blobs/sha256").chmod(0o555)
    with as_somebody(), pytest.raises(AccessError, match="push-refused"):
        packed(somebody)


def test_an_image_that_is_too_large_for_the_volume_is_told_before_it_is_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = packed(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"disk-full: .*larger volume"):
        copy(job(tmp_path, facts["image"], "/out"))
    assert found(tmp_path / "out") == {}


def test_a_volume_that_fills_up_meanwhile_is_told_and_nothing_half_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = packed(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(DiskFullError, match="disk-full"):
        copy(job(tmp_path, facts["image"], "/out"))
    assert found(tmp_path / "out") == {}


def test_an_image_without_data_is_refused_and_what_was_there_stays(tmp_path: Path) -> None:
    image = build_image(Layout(tmp_path / "registry"), [{"etc/passwd": b"x"}], annotations={})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(ImageError, match="file-not-in-image"):
        copy(job(tmp_path, image.reference, "/out"))
    assert found(tmp_path / "out") == {"mine": b"mine"}


def test_an_adapter_goes_to_a_volume_beside_what_is_there(tmp_path: Path) -> None:
    image = build_image(Layout(tmp_path / "registry"), [{"data/a": b"new"}, {"data/b/c": b"2"}], annotations={})
    (tmp_path / "out/b").mkdir(parents=True)
    (tmp_path / "out/a").write_text("old")
    (tmp_path / "out/b/mine").write_text("mine")
    copy(job(tmp_path, image.reference, "/out"))
    assert found(tmp_path / "out") == {
        "a": b"new", "b/c": b"2", "b/mine": b"mine", volume.MARKER: image.digest.encode()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("/a", "/b", "an image goes into a folder"),
        ("oci:/a:b", "docker://a.example/b:c", "an image goes into a folder"),
        ("a", "oci:/a:b", "source: 'a' is not an absolute path"),
        ("/../a", "oci:/a:b", "source: '/../a' is not an absolute path"),
        ("oci:/a:b", "b", "target: 'b' is not an absolute path"),
        ("/a", f"docker://a.example/b@sha256:{'0' * 64}", "target: a tag is needed"),
        ("/a", "docker://a.example/b", "no tag and no digest"),
        ("/a", "docker://A.example/UPPER:x", "the repository must be lowercase"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(tmp_path: Path, source: str, target: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        job(tmp_path, source, target)


def start(tmp_path: Path, source: str, target: str, **environment: str) -> subprocess.Popen[str]:
    path = tmp_path / "job.json"
    path.write_text(
        json.dumps({"version": 1, "workspace": "tune", "root": str(tmp_path), "source": source, "target": target})
    )
    return subprocess.Popen(
        [sys.executable, "-m", "kaito_flows.containers.copy", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.registry
def test_the_program_goes_through_a_registry_with_a_mounted_login(registry: Any, folder: Path, tmp_path: Path) -> None:
    image = f"docker://{registry.host}/team/volume:data"
    process = start(tmp_path, "/mnt/volume", image, DOCKER_CONFIG=str(registry.config_folder))
    events = [json.loads(line) for line in process.communicate()[0].splitlines()]
    assert (process.returncode, events[-1]["event"], events[-1]["files"]) == (0, "completed", 4)
    assert events[-1]["digest"] == packed(tmp_path)["digest"]
    process = start(tmp_path, image, "/out", DOCKER_CONFIG=str(registry.config_folder))
    assert (process.communicate()[0].count("completed"), process.returncode) == (1, 0)
    assert found(tmp_path / "out") == FILES | {volume.MARKER: events[-1]["digest"].encode()}
    process = start(tmp_path, "/mnt/volume", image, DOCKER_CONFIG=str(tmp_path))
    events = [json.loads(line) for line in process.communicate()[0].splitlines()]
    assert (process.returncode, events[-1]["event"], events[-1]["code"]) == (19, "failed", "push-refused")


def test_sigterm_ends_the_program_with_the_code_for_that(tmp_path: Path) -> None:
    (tmp_path / "mnt/volume").mkdir(parents=True)
    with (tmp_path / "mnt/volume/large").open("wb") as file:
        file.truncate(40_000_000_000)
    process = start(tmp_path, "/mnt/volume", "docker://127.0.0.1:1/x:data")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    last = json.loads(process.communicate()[0].splitlines()[-1])
    assert (process.returncode, last["event"], last["code"]) == (143, "failed", "preempted")
