"""What the server needs before it loads a model: its port, the weights folder, the adapters in images or folders."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import tempfile
from pathlib import Path

from kaito_flows.containers.server.job import Adapter, ServerJob
from kaito_flows.errors import ImageError, InputError, PortTakenError, WeightsError, disk_errors
from kaito_flows.oci.images import extract, open_image, read_file

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "check_adapter", "check_weights", "listen", "unpack_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_DIGEST = ".digest"
BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen, so that the port is ours before anything costly is done.

    Raises:
        PortTakenError: another process listens there.
        InputError: (code `cannot-listen`) the host is none of this machine's, or the port is not allowed.
    """
    place = f"{host}:{port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
        listener = socket.socket(family, kind)
    except OSError as exc:
        raise InputError(str(exc.strerror or exc), place=place, code="cannot-listen") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            raise PortTakenError(
                "another process listens there", place=place, hint="stop it, or give the service another port"
            ) from exc
        raise InputError(str(exc.strerror or exc), place=place, code="cannot-listen") from exc
    return listener


def check_weights(job: ServerJob) -> None:
    """See that the weights folder holds a model in safetensors form, and its tokenizer.

    Raises:
        WeightsError: (code `weights-missing`) something is not there.
    """
    folder = job.weights
    hint = "run the weights job first"
    if not folder.is_dir():
        raise WeightsError("no such folder", place=str(folder), hint=hint, code="weights-missing")
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise WeightsError(f"no {name}", place=str(folder), hint=hint, code="weights-missing")
    if not any(folder.glob("*.safetensors")):
        raise WeightsError("no *.safetensors", place=str(folder), hint=hint, code="weights-missing")


def check_adapter(job: ServerJob, adapter: Adapter) -> None:
    """See that the image or the folder is there, and that it holds a LoRA adapter in safetensors form.

    Raises:
        ImageError: it does not; the code says which.
    """
    if adapter.image is None:
        folder = job.adapter_folder(adapter.name)
        if missing := [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]:
            hint = "the volume's top folder must hold the adapter's files"
            raise ImageError(f"no {missing[0]}", place=str(folder), hint=hint, code="adapter-missing")
        _check_config(job, adapter, (folder / ADAPTER_CONFIG).read_bytes(), place=str(folder))
        return
    image = open_image(adapter.image)
    _check_config(job, adapter, read_file(image, f"data/{ADAPTER_CONFIG}"), place=adapter.image)
    if not image.repository.has(image.digest):
        raise ImageError("a layer is missing", place=adapter.image, code="image-damaged")


def _check_config(job: ServerJob, adapter: Adapter, raw: bytes, *, place: str) -> None:
    try:
        config = json.loads(raw)
        kind = config["peft_type"]
    except (ValueError, TypeError, KeyError) as exc:
        raise ImageError(f"{ADAPTER_CONFIG} is no PEFT configuration", place=place, code="adapter-unreadable") from exc
    if kind != "LORA":
        raise ImageError(f"a {kind!r} adapter", place=place, hint="only LoRA is served", code="adapter-kind")
    if adapter.strength in (None, 1.0) and adapter.name not in job.combined:
        return
    # These put values in the place of the base's own: there is no sum of which a part could be taken.
    for key, none in (("use_dora", (None, False)), ("modules_to_save", (None, [])), ("bias", (None, "none"))):
        if config.get(key) not in none:
            message = f"an adapter with {key}: {config[key]} can be neither scaled nor combined"
            raise ImageError(message, place=place, hint="leave its strength out", code="adapter-strength")


def unpack_adapter(job: ServerJob, adapter: Adapter) -> Path:
    """Return the adapter's folder, `<root>/mnt/adapter/<name>/`, with the image's `data/` in it if it has an image.

    What lies there already of that image is not unpacked again.

    Raises:
        ImageError: (code `file-not-in-image`) no adapter weights in it; (code `image-damaged`).
        DiskFullError: no space left.
    """
    folder = job.adapter_folder(adapter.name)
    if adapter.image is None:
        return folder
    image = open_image(adapter.image)
    marker = folder / _DIGEST
    if marker.is_file() and marker.read_text(encoding="utf-8") == image.digest:
        return folder
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{adapter.name}-", dir=folder.parent))
        try:
            extract(image, partial, only="data")
            data = partial / "data"
            if not (data / ADAPTER_WEIGHTS).is_file():
                raise ImageError(
                    f"no file 'data/{ADAPTER_WEIGHTS}' in the image", place=adapter.image, code="file-not-in-image"
                )
            (data / _DIGEST).write_text(image.digest, encoding="utf-8")
            _put_in_place(data, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _put_in_place(source: Path, folder: Path) -> None:
    """Rename `source` to `folder`; where `folder` is a mount point and cannot be replaced, fill it, marker last."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        source.replace(folder)
    except OSError as exc:
        if exc.errno not in (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY):
            raise
        for item in sorted(source.iterdir(), key=lambda path: path.name == _DIGEST):
            shutil.copyfile(item, folder / item.name)
