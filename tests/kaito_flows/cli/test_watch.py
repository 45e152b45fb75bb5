"""`kaito-flows watch` says what it needs before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KAITO_FLOWS = Path(sys.executable).parent / "kaito-flows"


def refusal(*arguments: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("KAITO_FLOWS_NAMESPACE", "PREFECT_API_URL")}
    done = subprocess.run(
        [KAITO_FLOWS, "watch", *arguments], env=kept, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_it_is_told_where_to_look() -> None:
    assert refusal() == "error: usage: --namespace: is missing (name one, or say --all-namespaces)\n"


def test_it_is_told_where_prefect_is(tmp_path: Path) -> None:
    assert "PREFECT_API_URL" in refusal("--namespace", "team")
