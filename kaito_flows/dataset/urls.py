"""A dataset's URLs: local files, and how they are recorded and logged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from kaito_flows.errors import DatasetError
from kaito_flows.urls import public_url


def recorded_url(url: str) -> str:
    """Return the URL as images and reports hold it: public, and a local file by its name only.

    Where a file lay on somebody's machine is nobody's business, and must not change a digest.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        return f"file:{quote(Path(unquote(parts.path)).name)}"
    return public_url(url)


def local_path(url: str) -> Path:
    """Return the file that a `file://` URL names.

    Raises:
        DatasetError: (`dataset-url`) not an absolute path on this machine; (`dataset-not-found`) no such file.
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise DatasetError(
            "not an absolute path on this machine",
            place=public_url(url),
            hint="write file:///absolute/path",
            code="dataset-url",
        )
    path = Path(unquote(parts.path))
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise DatasetError(what, place=public_url(url), hint="name a file that is there", code="dataset-not-found")
    return path


class _Redaction(logging.Filter):
    """Takes secrets out of the URLs that httpx logs for each request."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_shown(argument) for argument in record.args)
        return True


def _shown(argument: Any) -> Any:
    text = str(argument)
    return public_url(text) if text.startswith(("http://", "https://")) else argument


logging.getLogger("httpx").addFilter(_Redaction())
