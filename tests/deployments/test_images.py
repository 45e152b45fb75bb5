"""The images: what they hold, and how they run; and the pinned packages that they are made of."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from pod_fixtures import IMAGE_TAG

IMAGES = ("tuner", "server", "worker")
LOCKED_DOWN = ("--rm", "--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL")


def pinned(folder: Path, image: str) -> dict[str, str]:
    lines = (folder / "containers" / image / "requirements.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_pinned_packages_fit_the_project(repository_root: Path) -> None:
    project = tomllib.loads((repository_root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [Requirement(text) for text in [*project["dependencies"], *extras["cluster"], *extras["aks"]]]
    wanted = [requirement for requirement in named if requirement.name != project["name"]]
    worker = pinned(repository_root, "worker")
    for requirement in wanted:
        assert requirement.specifier.contains(worker[plain(requirement.name)]), f"{requirement}: .ci/lock"
    everything = [*wanted, *(Requirement(text) for text in [*extras["tuner"], *extras["server"]])]
    for image in ("tuner", "server"):
        for requirement in everything:
            if (version := pinned(repository_root, image).get(plain(requirement.name))) is not None:
                assert requirement.specifier.contains(version), f"{image}: {requirement}: .ci/lock"


def test_images_agree_on_the_packages_that_they_share(repository_root: Path) -> None:
    tuner, server, worker = (pinned(repository_root, image) for image in IMAGES)
    assert tuner.items() <= server.items()
    assert {name: worker[name] for name in tuner.keys() & worker.keys()} == {
        name: tuner[name] for name in tuner.keys() & worker.keys()
    }
    assert "torch" not in worker and "prefect" not in server


def run(docker: str, image: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [docker, "run", *LOCKED_DOWN, *options, f"kaito-flows/{image}:{IMAGE_TAG}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def python(docker: str, image: str, code: str) -> str:
    done = run(docker, image, "-c", code, options=("--entrypoint=python",))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.docker
@pytest.mark.parametrize("program", ["tuner", "server"])
def test_a_bad_job_file_ends_in_a_failed_event_and_exit_code_2(docker: str, program: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"version": 1, "rooot": "/"}')
    tmp_path.chmod(0o755)
    done = run(docker, program, "/job/job.json", options=(f"--volume={tmp_path}:/job:ro",))
    [event] = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, event["event"], event["code"]) == (2, "failed", "invalid-input"), done.stderr
    assert "rooot" in event["message"] and "/job/job.json" in event["place"]


@pytest.mark.docker
@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_with_a_read_only_root(docker: str, image: str) -> None:
    code = "import os, getpass; print(os.getuid(), os.getgid(), getpass.getuser(), os.environ['HOME'], os.getcwd())"
    assert python(docker, image, code).split() == ["10001", "10001", "kaito", "/tmp", "/tmp"]


@pytest.mark.docker
@pytest.mark.parametrize(
    ("image", "packages"),
    [
        ("tuner", "containers.program containers.tuner containers.weights oci canonical errors"),
        ("server", "containers.program containers.server oci canonical errors"),
        ("worker", "cli flows tasks nodes platforms dataset cluster oci planning workspace presets"),
    ],
)
def test_every_module_that_an_image_is_for_can_be_imported_in_it(docker: str, image: str, packages: str) -> None:
    code = f"""
import importlib, pkgutil
for package in {[f"kaito_flows.{name}" for name in packages.split()]}:
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), package + "."):
        importlib.import_module(found.name)
"""
    python(docker, image, code)


@pytest.mark.docker
def test_the_worker_has_no_pytorch_and_the_others_have_no_orchestrator(docker: str) -> None:
    code = "import importlib.util as u, sys; print([n for n in ('torch', 'prefect', 'pip') if u.find_spec(n)])"
    assert python(docker, "tuner", code) == "['torch', 'pip']\n"
    assert python(docker, "server", code) == "['torch', 'pip']\n"
    assert python(docker, "worker", code) == "['prefect', 'pip']\n"


@pytest.mark.docker
def test_the_server_and_the_tuner_share_all_layers_but_the_last_few_megabytes(docker: str) -> None:
    def layers(image: str) -> list[str]:
        shown = subprocess.run(
            [docker, "image", "inspect", f"kaito-flows/{image}:{IMAGE_TAG}"], capture_output=True, check=True
        )
        found: list[str] = json.loads(shown.stdout)[0]["RootFS"]["Layers"]
        return found

    tuner, server = layers("tuner"), layers("server")
    shared = [a for a, b in zip(tuner, server, strict=False) if a == b]
    own = set(tuner) - set(shared)
    assert len(own) <= 2
    sizes = subprocess.run(
        [docker, "history", "--human=false", "--format={{.Size}}", f"kaito-flows/tuner:{IMAGE_TAG}"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    code_bytes = next(int(size) for size in sizes if size != "0")
    assert code_bytes < 5_000_000, "a change of the code is a few megabytes to push and to pull"


@pytest.mark.docker
@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_no_secret_and_nothing_of_this_machine(docker: str, image: str) -> None:
    shown = subprocess.run(
        [docker, "image", "inspect", f"kaito-flows/{image}:{IMAGE_TAG}"], capture_output=True, check=True
    )
    config: dict[str, Any] = json.loads(shown.stdout)[0]["Config"]
    variables = {line.partition("=")[0] for line in config["Env"]}
    assert variables <= {"PATH", "HOME", "USER", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"} | {
        name for name in variables if name.startswith("PYTHON_") or name in ("LANG", "GPG_KEY")
    }, "Python's own images bring the latter"
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.title"] == f"kaito-flows {image}"
    code = """
import pathlib, sys
suspects = ("*.pem.key", "id_rsa*", ".netrc", ".pypirc", "pip.conf", "config.json", "HF_TOKEN", ".git", ".env")
for folder in ("/etc", "/home", "/opt", "/source", "/srv", "/tmp", "/usr/local/etc", "/var/tmp"):
    for name in suspects:
        print(*pathlib.Path(folder).rglob(name), end="")
"""
    assert python(docker, image, code) == ""
    packages = python(docker, image, "import kaito_flows, pathlib; print(pathlib.Path(kaito_flows.__file__).parent)")
    assert "packages/kaito_flows" in packages, "the code is the installed wheel, not a copy of the checkout"
