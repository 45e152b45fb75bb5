"""Programs that tests need and that Debian packages."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str, package: str) -> str:
    """The path of a program that Debian packages; without it a test is skipped, and in CI it fails."""
    if found := shutil.which(name):
        return found
    reason = f"no {name}: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
