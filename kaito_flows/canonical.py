"""The one byte form of a JSON value, and its hash: what digests and identities are made of."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Return the one byte form of a JSON value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def canonical_digest(value: Any) -> str:
    """Return the sha256 of a JSON value's one byte form, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
