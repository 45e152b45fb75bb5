"""How a URL is shown: without what could be a secret."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

# A signature can have any name, so only these keep their values.
_HARMLESS = frozenset(
    {"download", "dl", "export", "file", "filename", "format", "name", "page", "part", "path", "raw", "ref"}
    | {"revision", "split", "v", "version"}
)


def public_url(url: str) -> str:
    """Return the URL without user name and password, and with `…` for query values that could be secrets."""
    try:
        parts = urlsplit(url)
        netloc = parts.netloc.rpartition("@")[2]
    except ValueError:
        return url.partition("?")[0].rpartition("@")[2]
    shown = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        shown.append(f"{quote(name)}={quote(value, safe='/') if name.lower() in _HARMLESS else '…'}")
    return urlunsplit((parts.scheme, netloc, parts.path, "&".join(shown), ""))


def without_secrets(text: str) -> str:
    """Return the text with every URL in it as `public_url` shows it."""
    return re.sub(r"https?://[^\s'\"]+", lambda found: public_url(found[0]), text)
