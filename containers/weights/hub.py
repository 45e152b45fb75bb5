"""Fetching a model from the Hugging Face Hub: safetensors, configuration and tokenizer, never a pickle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kaito_flows.containers.weights.job import HubSource
from kaito_flows.errors import WeightsError

__all__ = ["TENSORS", "UNWANTED", "WANTED", "fetch_snapshot"]

TENSORS = ["*.safetensors", "*.safetensors.index.json"]
WANTED = ["*config.json", "tokenizer*", "*.jinja", "vocab.*", "merges.txt", "special_tokens_map.json"]
WANTED += ["added_tokens.json", "LICENSE*"]
TOKEN_FILE = Path("/var/run/secrets/kaito-flows/huggingface/HF_TOKEN")
"""Where pods have their Secret with the token mounted."""
# Pickles under names that the patterns above would let in, Python code, and copies in other formats below folders.
UNWANTED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "*/*"]


def fetch_snapshot(source: HubSource, cache: Path, folder: Path, *, tensors: bool = True) -> None:
    """Put the repository's model files into `folder`; downloads are kept in `cache` and go on where they broke off.

    `HF_ENDPOINT`, `HF_TOKEN` and the proxy settings of the environment hold; without `HF_TOKEN`, the token in a pod's
    Secret. Without `tensors`, the weights themselves are left out.

    Raises:
        WeightsError: (code `weights-not-found`) no such repository or revision; (code `weights-gated`) its terms are
            not accepted, or no token; (code `weights-unreachable`) no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = f"{source.repo}@{source.revision}"
    try:
        snapshot = snapshot_download(
            source.repo,
            revision=source.revision,
            cache_dir=cache / "hub",
            allow_patterns=WANTED + (TENSORS if tensors else []),
            ignore_patterns=UNWANTED,
            token=_token(),
        )
    except GatedRepoError as exc:
        raise WeightsError(
            "the model's owner asks you to accept its terms first",
            place=place,
            hint="accept them on the model's page and set HF_TOKEN",
            code="weights-gated",
        ) from exc
    except RevisionNotFoundError as exc:
        raise WeightsError("no such revision on the Hub", place=place, code="weights-not-found") from exc
    except (RepositoryNotFoundError, HFValidationError) as exc:
        raise WeightsError(
            "no such model on the Hub, or it is private",
            place=place,
            hint="check the name; set HF_TOKEN for a private one",
            code="weights-not-found",
        ) from exc
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as exc:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise WeightsError(
            f"{endpoint} was not reached: {_cause(exc)}",
            place=place,
            hint="check the network, set HF_ENDPOINT to a mirror, or put the model's folder on a volume",
            code="weights-unreachable",
        ) from exc
    # Of a download before, the tensors may lie there too.
    for path in Path(snapshot).iterdir():
        if path.is_file() and (tensors or path.suffix != ".safetensors"):
            _link(path.resolve(), folder / path.name)


def _token() -> str | None:
    """The token in the pod's Secret, unless the environment has one; None leaves it to the Hub's client."""
    if os.environ.get("HF_TOKEN") or not TOKEN_FILE.is_file():
        return None
    return TOKEN_FILE.read_text(encoding="utf-8").strip() or None


def _cause(exc: BaseException) -> str:
    """The innermost reason: the Hub client wraps it several times."""
    while (inner := exc.__cause__ or exc.__context__) is not None:
        exc = inner
    return f"{type(exc).__name__}: {exc}".splitlines()[0][:300]


def _link(source: Path, target: Path) -> None:
    """Link where both lie on one file system, so that a large model is not stored twice; copy elsewhere."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
